"use strict";
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const { tasks, rows, images, cases, curves } = content;
  const TASK = 0, IMAGE = 1, LABEL = 2, PREDICTED = 3, STATUS = 4, RADIUS = 5, UPPER = 6, MARGIN = 7, SECONDS = 8, NOTE = 9,
    SHOWN = 10;
  const PART = 50, SVG = "http://www.w3.org/2000/svg";
  const INKS = { "-1": "#111111", 0: "#b5121b", 1: "#1a7f37", 2: "#1f4fd8" };
  const by = (id) => document.getElementById(id);

  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function draw(name, attributes = {}, ...children) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  const short = (value, digits = 4) => (value === null || value === undefined ? "" : String(Number(value.toPrecision(digits))));
  const name = (row) => `image ${row[IMAGE]} of ${tasks[row[TASK]].called}`;
  const address = (row) => (images[tasks[row[TASK]].data] || {})[row[IMAGE]];
  const status = (word) => make("span", { class: `status-${word.includes(" ") ? "word" : word}` }, word);

  // The table of images
  const body = by("rows"), filters = by("filters");
  let order = { key: IMAGE, up: true }, chosen = [], count = PART;

  function within(value, low, high) {
    if (low === "" && high === "") return true;
    return value !== null && value !== undefined && (low === "" || value >= Number(low)) && (high === "" || value <= Number(high));
  }

  function choose() {
    const given = Object.fromEntries([...filters.elements].filter((one) => one.name).map((one) => [one.name, one.value]));
    chosen = rows.filter((row) =>
      (given.task === "" || row[TASK] === Number(given.task)) &&
      (given.status === "" || row[STATUS] === given.status) &&
      (given.image === "" || row[IMAGE] === Number(given.image)) &&
      within(row[RADIUS], given["radius-from"], given["radius-to"]) &&
      within(row[MARGIN], given["margin-from"], given["margin-to"]) &&
      within(row[SECONDS] === null ? null : 1000 * row[SECONDS], given["time-from"], given["time-to"]));
    const value = (row) => (order.key === TASK ? tasks[row[TASK]].title : row[order.key]);
    const sign = order.up ? 1 : -1;
    chosen.sort((first, second) => {
      const a = value(first), b = value(second);
      if (a === b) return first[IMAGE] - second[IMAGE] || first[TASK] - second[TASK];
      if (a === null || a === undefined) return 1; // what is not known stands last, whatever the order
      if (b === null || b === undefined) return -1;
      return sign * (typeof a === "string" ? a.localeCompare(b) : a - b);
    });
    show();
  }

  function line(row) {
    const source = address(row);
    const picture = source ? make("img", { src: source, alt: ""}) : String(row[IMAGE]);
    const button = make("button", { type: "button", class: "open", "aria-label": `Show ${name(row)}, ${tasks[row[TASK]].title}` }, picture);
    const cells = [short(row[IMAGE]), short(row[LABEL]), short(row[PREDICTED]), null, null, short(row[RADIUS]), short(row[UPPER]),
      short(row[MARGIN]), row[SECONDS] === null ? "" : short(1000 * row[SECONDS], 3)];
    const result = make("tr", {}, make("td", {}, button));
    cells.forEach((text, number) => {
      if (number === 3) result.append(make("th", { scope: "row", class: "left" }, tasks[row[TASK]].title));
      else if (number === 4) result.append(make("td", { class: "left" }, status(row[STATUS])));
      else result.append(make("td", { class: "right" }, text));
    });
    result.addEventListener("click", () => open(row, button));
    return result;
  }

  function show() {
    body.replaceChildren(...chosen.slice(0, count).map(line));
    const shown = Math.min(count, chosen.length);
    by("count").textContent = `${chosen.length} of ${rows.length} results; ${shown} shown`;
    by("more").hidden = by("all").hidden = shown === chosen.length;
    by("all").textContent = `Show all ${chosen.length}`;
  }

  for (const head of document.querySelectorAll(".images thead th[data-key]")) {
    head.querySelector("button").addEventListener("click", () => {
      const key = Number(head.dataset.key);
      order = { key, up: order.key === key ? !order.up : true };
      for (const other of document.querySelectorAll(".images thead th[data-key]")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order.up ? "ascending" : "descending");
      choose();
    });
  }
  filters.addEventListener("input", () => { count = PART; choose(); });
  filters.addEventListener("reset", () => setTimeout(() => { count = PART; choose(); }));
  filters.addEventListener("submit", (event) => event.preventDefault());
  by("more").addEventListener("click", () => { count += PART; show(); });
  by("all").addEventListener("click", () => { count = Infinity; show(); });
  for (const link of document.querySelectorAll("a[data-task]")) {
    link.addEventListener("click", () => { filters.elements.task.value = link.dataset.task; count = PART; choose(); });
  }

  // One image
  const dialog = by("image");
  let current = null, opener = null;

  function open(row, button) {
    opener = button;
    fill(row);
    dialog.showModal();
  }

  function figure(title, drawn) {
    return make("figure", {}, drawn, make("figcaption", {}, title));
  }

  function arrow([x, y, direction, strength, channel], length) {
    const [along, down] = [[1, 0], [0, 1], [-1, 0], [0, -1]][direction];
    const half = (0.07 + 0.08 * strength) * Math.max(1, length) * (channel < 0 ? 1 : 0.7);
    const head = Math.min(0.42 * length, 0.12 + 2.2 * half), wide = 0.04 + 2.1 * half;
    const aside = channel < 0 ? 0 : 0.24 * (channel - 1);
    const middle = [x + 0.5 + along / 2 - aside * down, y + 0.5 + down / 2 + aside * along];
    const at = (forward, sideways) => `${middle[0] + forward * along - sideways * down},${middle[1] + forward * down + sideways * along}`;
    const back = -length / 2, tip = length / 2, neck = tip - head;
    const points = [at(back, half), at(neck, half), at(neck, wide), at(tip, 0), at(neck, -wide), at(neck, -half), at(back, -half)];
    return draw("polygon", { points: points.join(" "), fill: INKS[channel], stroke: "#ffffff", "stroke-width": 0.03 });
  }

  function flow(source, found) {
    const [width, height] = found.size, view = found.view;
    const length = Math.max(0.84, Math.max(view[2], view[3]) / 34);
    return draw("svg", { viewBox: view.join(" "), role: "img", "aria-label": `${found.arrows.length} arrows along which mass flows` },
      draw("image", { href: source, width, height, opacity: 0.3, preserveAspectRatio: "none" }),
      ...found.arrows.slice().reverse().map((one) => arrow(one, length)));
  }

  function fill(row) {
    current = row;
    const task = tasks[row[TASK]], source = address(row), found = cases[`${row[TASK]}/${row[IMAGE]}`];
    by("image-title").textContent = `${name(row)[0].toUpperCase()}${name(row).slice(1)}, label ${row[LABEL]}`;
    const facts = [
      ["task", task.title], ["status", status(row[STATUS])], ["predicted", short(row[PREDICTED])],
      ["radius", row[RADIUS] === null ? "" : `${short(row[RADIUS])} pixels (${task.distance})`],
      ["at most", row[UPPER] === null ? "" : `${short(row[UPPER])} pixels (${task.distance})`],
      ["margin proven of the whole ball", row[STATUS].startsWith("certified") ? short(row[MARGIN]) : ""],
      ["bound of the margin, which proves nothing", row[STATUS].startsWith("certified") ? "" : short(row[MARGIN])],
      ["milliseconds", row[SECONDS] === null ? "" : short(1000 * row[SECONDS], 3)], ["note", row[NOTE] || ""],
    ];
    by("facts").replaceChildren(...facts.filter(([, value]) => value !== "").map(([key, value]) =>
      make("tr", {}, make("th", { scope: "row", class: "left" }, key), make("td", { class: "left" }, value))));
    const panels = by("panels"), slide = by("slide");
    panels.replaceChildren();
    slide.hidden = !found;
    if (!source) panels.append(make("p", {}, "The image is not in this page, which holds a limited number of images, or was not found."));
    else if (found) {
      const y = row[LABEL], t = found.rival;
      panels.append(figure(`Original: f${y} - f${t} = ${short(found.margins[0])}`, make("img", { src: source, alt: `The original, ${name(row)}` })));
      const other = make("img", { src: found.other, alt: found.by ? "The adversarial image" : "The worst case", id: "other" });
      const what = found.by ? `Adversarial image, found by ${found.by} at radius ${short(found.distance)}`
        : `${found.exact ? "First-order" : "Nearly the first-order"} worst case within ${short(row[SHOWN])}`;
      const words = `${what}: predicted ${found.predicted}, ` +
        `f${y} - f${t} = ${short(found.margins[1])}` +
        (!found.by && row[STATUS] === "certified" && row[MARGIN] !== null ? `; proven of the whole ball: at least ${short(row[MARGIN])}` : "") +
        (found.above ? `. ${found.above}` : "");
      panels.append(figure(words, make("div", { class: "stack" }, make("img", { src: source, alt: "" }), other)));
      const left = found.all > found.arrows.length ? `; the largest ${found.arrows.length} of ${found.all} arrows` : "";
      panels.append(figure(`The flow between the two: ${short(found.distance)} pixels (${task.distance})${left}`, flow(source, found)));
      by("share").value = 100;
    } else {
      panels.append(figure("Original", make("img", { src: source, alt: `The original, ${name(row)}` })));
      const radius = row[SHOWN];
      panels.append(radius === null
        ? make("p", {}, row[STATUS] === "misclassified" ? "The image itself is misclassified: there is no worst case." : "There is no radius above 0 to show a worst case for.")
        : make("p", {}, "Its worst case is not in this page, which holds a limited number. It is drawn by ",
          make("code", {}, `${task.command} --index ${row[IMAGE]} --radius ${radius} --picture worst.png`)));
    }
    const same = rows.filter((one) => one[IMAGE] === row[IMAGE] && tasks[one[TASK]].data === task.data);
    by("same").replaceChildren(...same.map((one) => {
      const button = make("button", { type: "button", ...(one === row ? { "aria-current": "true" } : {}) }, one === row ? "shown" : "show");
      button.addEventListener("click", () => { fill(one); dialog.querySelector("[aria-current]").focus(); });
      return make("tr", {}, make("td", {}, button), make("th", { scope: "row", class: "left" }, tasks[one[TASK]].title),
        make("td", { class: "left" }, status(one[STATUS])), make("td", { class: "right" }, short(one[RADIUS])),
        make("td", { class: "right" }, short(one[UPPER])), make("td", { class: "right" }, short(one[MARGIN])));
    }));
    const place = chosen.indexOf(row);
    by("previous").disabled = place <= 0;
    by("next").disabled = place < 0 || place + 1 >= chosen.length;
  }

  by("share").addEventListener("input", (event) => { by("other").style.opacity = event.target.value / 100; });
  by("previous").addEventListener("click", () => fill(chosen[chosen.indexOf(current) - 1]));
  by("next").addEventListener("click", () => fill(chosen[chosen.indexOf(current) + 1]));
  by("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => { if (opener && opener.isConnected) opener.focus(); });

  // Curves
  function countAt(curve, radius) {
    if (!curve.steps) {
      const at = curve.radii.findIndex((one) => Math.abs(one - radius) < 1e-9);
      return at < 0 ? null : curve.counts[at];
    }
    const last = curve.radii[curve.radii.length - 1];
    if (radius > last && !curve.open) return 0;
    let found = curve.counts[0];
    curve.radii.forEach((one, k) => { if (one <= radius) found = curve.counts[k]; });
    return found;
  }

  for (const chart of document.querySelectorAll("svg[data-chart]")) {
    const number = Number(chart.dataset.chart), own = curves[number], across = Number(chart.dataset.across);
    const cursor = chart.querySelector(".cursor"), width = chart.viewBox.baseVal.width;
    const left = Number(cursor.getAttribute("x1")), right = width - 12;
    const points = [...new Set(own.flatMap((curve) => curve.radii))].sort((a, b) => a - b);
    const section = chart.closest("section"), boxes = [...section.querySelectorAll("input[data-curve]")];
    let radius = null;

    function read(wanted) {
      radius = Math.min(Math.max(wanted, 0), across);
      const near = points.reduce((best, one) => (Math.abs(one - radius) < Math.abs(best - radius) ? one : best), 0);
      if (own.some((curve) => !curve.steps) && Math.abs(near - radius) < across / 100) radius = near;
      const place = left + (right - left) * radius / across;
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      cursor.setAttribute("visibility", "visible");
      section.querySelector(".read").textContent = `At radius ${short(radius, 3)}:`;
      own.forEach((curve, k) => {
        const here = countAt(curve, radius);
        section.querySelector(`output[data-curve="${k}"]`).textContent =
          here === null || !boxes[k].checked ? "" : `${(100 * here / curve.images).toFixed(1)}% (${here} of ${curve.images})`;
      });
    }

    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      read(((event.clientX - box.left) * width / box.width - left) / (right - left) * across);
    });
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -across / 50, ArrowRight: across / 50 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      read((radius === null ? 0 : radius) + step);
    });
    boxes.forEach((box) => box.addEventListener("input", () => {
      chart.querySelector(`g[data-curve="${box.dataset.curve}"]`).style.display = box.checked ? "" : "none";
      if (radius !== null) read(radius);
    }));
  }

  choose();
})();
