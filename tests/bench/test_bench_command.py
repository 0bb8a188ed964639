"""The commands ``bench`` and ``report``, and the jobs that start other programs, from end to end."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from base64 import b64decode
from functools import partial
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from suites import misbehaving, records, run_local, write_suite
from typer.testing import CliRunner

import flowverify as fv
from flowverify.attack.base import make_attack
from flowverify.bench import report, sources
from flowverify.bench.charts import pictures
from flowverify.bench.tasks import packed
from flowverify.cli import app
from flowverify.figures import worst_cases
from flowverify.figures.files import white_of
from flowverify.notebook import SIGNATURE, data_address

SUITE = """
name: small <suite>
description: two methods & an attack
chunk: 5
data: {name: digits, index: "0:12"}
models: digits-fc3
runs:
  - {methods: [vanilla, fine-tuned], bounds: crown}
  - {methods: vanilla, bounds: ibp, radii: [0.005, 0.01]}
  - {kind: attack, attacks: minimal, options: {effort: fast}}
  - {kind: script, module: talk, arguments: [3]}
  - {kind: script, module: fail}
  - {kind: instances, file: instances.csv, command: [sh, verifier.sh, "{onnx}", "{vnnlib}", "{timeout}", "{results}"]}
comparisons:
  - {claim: never worse, source: "framework, 3.2", paper: 1, measure: share of radii not below,
     of: "*/fine-tuned/*", over: "*/vanilla/crown/*"}
"""
VERIFIER = """
case "$2" in
  *safe*) echo unsat > "$4" ;;
  *broken*) echo "sat" > "$4"; echo "((X_0 1))" >> "$4" ;;
  *chatty*) echo "verifying..."; echo "Result: holds"; echo "holds" ;;
  *) echo "cannot read the property" >&2; exit 4 ;;
esac
"""


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The suite above, run by the command once for all tests that only read."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "talk.py").write_text("import sys; print('<b>', int(sys.argv[1]) * 2)")
    (folder / "fail.py").write_text("print('step 1'); raise SystemExit('no way')")
    path = write_suite(folder, SUITE.replace("sh, verifier.sh", f"sh, {folder}/verifier.sh"))
    (folder / "verifier.sh").write_text(VERIFIER)
    names = ("safe", "broken", "chatty", "strange")
    for name in names:
        (folder / f"{name}.vnnlib").touch()
    (folder / "net.onnx").touch()
    (folder / "instances.csv").write_text("".join(f"net.onnx,{name}.vnnlib,5\n" for name in names))
    result = run("bench", path, "--out", folder / "out", code=1)
    return folder, result


def of_task(folder, pattern):
    found = [record for (task, _), record in sorted(records(folder / "out").items()) if re.search(pattern, task)]
    assert found, pattern
    return found


class TestBench:
    def test_every_record_is_there(self, finished):
        folder, result = finished
        assert len(records(folder / "out")) == 5 * 12 + 2 + 4
        assert "never worse: 1; paper: 1 (framework, 3.2)" in result.output
        assert "overhead" in result.output

    def test_radii_are_those_of_the_library(self, finished):
        data = fv.load_dataset("digits")
        model = fv.load_model("digits-fc3")
        expected = [
            fv.certified_radius(model, data.images[k : k + 5], data.labels[k : k + 5], bound="crown") for k in (0, 5)
        ]
        expected = [value for part in expected for value in part.tolist()]
        found = of_task(finished[0], "fine-tuned/crown")
        assert [record["index"] for record in found] == list(range(12))
        assert [record["radius"] for record in found[:10]] == pytest.approx(expected, rel=1e-6)

    def test_attacks_are_not_below_certificates(self, finished):
        certified = {record["index"]: record["radius"] for record in of_task(finished[0], "fine-tuned/crown")}
        attacked = [record for record in of_task(finished[0], "^attack") if "upper_radius" in record]
        assert len(attacked) > 5
        for record in attacked:
            assert record["verdict"] == "falsified" and record["upper_radius"] >= certified[record["index"]]

    def test_scripts(self, finished):
        (talk,), (fail,) = of_task(finished[0], "script/talk"), of_task(finished[0], "script/fail")
        assert talk["verdict"] == "done" and talk["output"] == "<b> 6"
        assert fail["verdict"] == "error" and fail["note"] == "fail ended with exit code 1: step 1 / no way"

    def test_instances(self, finished):
        found = of_task(finished[0], "instances")
        assert [record["verdict"] for record in found] == ["certified", "unknown", "certified", "error"]
        assert "2 certified on the verifier's word" in finished[1].output
        assert found[1]["answer"] == "sat" and "not replayed" in found[1]["note"]
        assert "exit code 4 and without an answer: cannot read the property" in found[3]["note"]

    def test_a_second_run_adds_what_failed(self, finished):
        folder, _ = finished
        before = records(folder / "out")
        result = run("bench", folder / "suite.yaml", "--out", folder / "out", code=1)
        assert "2 records added" in result.output
        assert records(folder / "out") == before


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("gone.yaml", "--out", "out"), "error: suite gone.yaml: cannot be read"),
            (("suite.yaml", "--out", "suite.yaml"), "error: suite.yaml: cannot be written to (File exists)"),
            (("suite.yaml", "--out", "out", "--runner", "abacus"), "error: unknown runner 'abacus'"),
            (("suite.yaml", "--out", "out", "--data-dir", "."), "error: .: has no folder mnist or cifar10_sample"),
            (("other.yaml", "--out", "there"), "error: there: holds results of another suite, 'a'"),
            (("gpu.yaml", "--out", "out"), "error: device cuda:9: torch finds"),
        ],
    )
    def test_one_line(self, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        write_suite(
            tmp_path, {"name": "b", "data": {"name": "digits"}, "models": "digits-fc3", "runs": [{}]}, "other.yaml"
        )
        gpu = {"name": "c", "device": "cuda:9", "data": {"name": "digits"}, "models": "digits-fc3", "runs": [{}]}
        write_suite(tmp_path, gpu, "gpu.yaml")
        run_local(misbehaving(tmp_path, count=0 + 1), tmp_path / "there")
        write_suite(tmp_path, (tmp_path / "suite.yaml").read_text().replace("name: test", "name: a"))
        suite = json.loads((tmp_path / "there" / "suite.json").read_text())
        (tmp_path / "there" / "suite.json").write_text(json.dumps({**suite, "name": "a"}))
        result = run("bench", *arguments, code=2)
        assert result.stderr.startswith(message) and result.stderr.count("\n") == 1

    def test_report_of_no_results(self, tmp_path):
        result = run("report", tmp_path, code=2)
        assert "holds no suite.json, expected the folder of a run" in result.stderr

    def test_full_disk(self, tmp_path, monkeypatch):
        path = tmp_path / "suite.yaml"
        misbehaving(tmp_path, count=6, chunk=2)
        write, written = os.write, []

        def full(file, content):
            if b'"index"' in content and len(written) >= 2:
                raise OSError(28, "No space left on device")
            written.extend([content] if b'"index"' in content else [])
            return write(file, content)

        monkeypatch.setattr(os, "write", full)
        result = run("bench", path, "--out", tmp_path / "out", "--workers", 1, code=2)
        monkeypatch.undo()
        line = result.stderr.splitlines()[-1]
        assert line.startswith("error: ") and "(No space left on device); the 4 records before are kept" in line
        assert len(records(tmp_path / "out")) == 4


def start(path, out):
    """The command in a process of its own, with one worker."""
    command = [sys.executable, "-m", "flowverify", "bench", str(path), "--out", str(out), "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def test_interrupted_killed_and_continued(tmp_path, hanging, interruptible):
    """First by Ctrl-C, then by kill -9; its workers go with it, and the third command ends as if nothing had been."""
    path, out = tmp_path / "suite.yaml", tmp_path / "out"
    suite = misbehaving(
        tmp_path, count=80, chunk=2, budget={"seconds": 1e6}, deeds={20: "hang once", 50: "hang once"},
        marks=str(tmp_path), tell=str(hanging.path),
    )  # fmt: skip
    process = start(path, out)
    assert hanging.wait(process.stdout), process.communicate()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and b"Traceback" not in errors
    assert re.search(rb"error: interrupted with 20 of 80 records in .*out; the same command goes on", errors)
    assert len(records(out)) == 20
    process = start(path, out)
    assert hanging.wait(process.stdout), process.communicate()
    process.kill()
    process.communicate()  # ends when no process is left that holds its standard error
    assert (out / "records.jsonl").read_bytes().count(b"\n") == 50
    assert "80 records in" in run("bench", path, "--out", out).stderr
    run_local(suite, tmp_path / "undisturbed")
    assert records(out) == records(tmp_path / "undisturbed")


class Page(HTMLParser):
    """A page: what it refers to, its elements with their attributes, its text, and what its script reads."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.elements, self.text, self.scripts = [], [], "", []
        self.feed(text)
        self.content = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.sources += [value for name, value in attributes if name in ("src", "href", "data", "srcset", "action")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script" and not data.isspace():
            self.scripts[-1] += data
        else:
            self.text += data

    def of(self, tag, **wanted):
        return [given for name, given in self.elements if name == tag and wanted.items() <= given.items()]


@pytest.fixture(scope="module")
def page(finished):
    run("report", finished[0] / "out")
    return Page((finished[0] / "out" / "report.html").read_text())


class TestReport:
    def test_needs_no_network(self, page):
        files = {"records.csv", "summary.csv", "tables.tex", "records.jsonl", "suite.json"}
        for source in page.sources:
            assert source.startswith(("data:", "#")) or source in files, source
        (policy,) = page.of("meta", **{"http-equiv": "Content-Security-Policy"})
        assert policy["content"].startswith("default-src 'none'; img-src data:;")
        assert not page.of("iframe") and all("src" not in one for one in page.of("script"))
        assert [one["href"] for one in page.of("link")] == ["data:,"]

    def test_links_lead_to_files_and_to_parts_of_the_page(self, page, finished):
        names = {given["id"] for _, given in page.elements if "id" in given}
        for source in page.sources:
            if source.startswith("#"):
                assert source[1:] in names
            elif not source.startswith("data:"):
                assert (finished[0] / "out" / source).is_file()

    def test_has_landmarks_captions_and_names(self, page):
        for landmark in ("header", "nav", "main"):
            assert page.of(landmark)
        assert page.of("html", lang="en") and page.of("meta", name="viewport")
        assert len(page.of("table")) == len(page.of("caption"))
        assert all("scope" in given for given in page.of("th"))
        assert all("alt" in given for given in page.of("img"))
        names = {given["for"] for given in page.of("label") if "for" in given}
        assert all(given["id"] in names for given in page.of("input", type="checkbox"))
        assert all("aria-label" in given for given in page.of("svg", role="img"))
        ids = [given["id"] for _, given in page.elements if "id" in given]
        assert len(ids) == len(set(ids))

    def test_tasks_have_readable_names_with_their_own_beside_them(self, page):
        named = {given["title"] for given in page.of("th") if "title" in given}
        assert "certify/digits-fc3/fine-tuned/crown/l1/search" in named
        assert "digits-fc3: fine-tuned, crown (W1, l1), largest radius" in page.text
        assert "digits-fc3: attack minimal, effort fast (W1, l1), nearest image" in page.text
        assert "digits-fc3/fine-tuned" not in page.text

    def test_every_image_is_there_as_it_is(self, page):
        images = page.content["images"]["digits test"]
        assert sorted(map(int, images)) == list(range(12))
        assert all(address.startswith("data:image/png;base64,") for address in images.values())
        assert b64decode(images["3"].partition(",")[2])[:8] == SIGNATURE

    def test_every_result_is_a_row_with_its_numbers(self, page, finished):
        known = records(finished[0] / "out")
        rows = page.content["rows"]
        titles = {task["title"]: number for number, task in enumerate(page.content["tasks"])}
        assert len(rows) == 12 * 5 and rows == sorted(rows, key=lambda row: (row[1], row[0]))
        number = titles["digits-fc3: fine-tuned, crown (W1, l1), largest radius"]
        for task, index, label, prediction, status, radius, upper, margin, *_ in rows:
            if task != number:
                continue
            record = known["certify/digits-fc3/fine-tuned/crown/l1/search", index]
            assert (label, prediction, status) == (record["label"], record["prediction"], record["verdict"])
            assert radius == pytest.approx(record["radius"], rel=1e-5) and upper is None
            assert margin == (None if record["margin"] is None else pytest.approx(record["margin"], rel=1e-5))

    def test_worst_cases_are_those_of_their_images(self, page, finished):
        cases, tasks = page.content["cases"], page.content["tasks"]
        shown = {tuple(map(int, key.split("/"))) for key in cases}
        wanted = {(row[0], row[1]) for row in page.content["rows"] if row[10] is not None}
        assert shown == wanted and len(shown) > 40
        network, data = fv.load_model("digits-fc3").double(), fv.load_dataset("digits")
        for number, index in [place for place in sorted(shown) if not tasks[place[0]]["attack"]][::7]:
            case = cases[f"{number}/{index}"]
            row = next(row for row in page.content["rows"] if row[:2] == [number, index])
            (one,) = worst_cases(fv.load_model("digits-fc3"), data.images[index : index + 1], [row[2]], [row[10]])
            assert case["distance"] == pytest.approx(one.distance, abs=1e-5) and case["rival"] == one.rival
            logits = network(one.worst[None].double())[0]
            assert case["margins"][1] == pytest.approx(float(logits[row[2]] - logits[one.rival]), abs=1e-3)
            assert case["arrows"] and len(case["arrows"]) <= case["all"] and case["by"] == ""
        assert all("distance" in task for task in tasks if "data" in task)

    def test_adversarial_images_are_those_that_were_found(self, page, finished):
        (number,) = [k for k, task in enumerate(page.content["tasks"]) if task.get("attack")]
        data, network = fv.load_dataset("digits"), fv.load_model("digits-fc3")
        again = make_attack("minimal", network, effort="fast")
        attacked = of_task(finished[0], "^attack")
        found = [record for record in attacked if record["verdict"] == "falsified"]
        assert len(found) > 5 and not any("witness" in record for record in attacked)
        for record in found[::3]:
            index = record["index"]
            chunk = slice(index // 5 * 5, index // 5 * 5 + 5)  # images that are attacked together
            result = again.minimise(data.images[chunk], data.labels[chunk])
            case, image = page.content["cases"][f"{number}/{index}"], result.images[index % 5]
            assert case["by"] == "minimal" and case["predicted"] == record["prediction"] != record["label"]
            assert case["distance"] == pytest.approx(record["upper_radius"], abs=1e-5) and case["margins"][1] < 0
            assert case["other"] == data_address(image.numpy(), white_of(data.images[index].double()))
        assert "the adversarial image that an attack or a complete method found" in " ".join(page.text.split())
        (script,) = page.scripts[1:]
        assert "Adversarial image, found by ${found.by} at radius" in script and "worst case within" in script

    def test_without_the_images_that_were_found_there_are_worst_cases(self, finished, tmp_path):
        """As in folders of earlier versions; what is kept and is none is said to be so."""
        shutil.copytree(finished[0] / "out", tmp_path / "out")
        kept = tmp_path / "out" / "witnesses.jsonl"
        lines = kept.read_text().splitlines()
        assert len(lines) > 5
        kept.unlink()
        run("report", tmp_path / "out")
        page = Page((tmp_path / "out" / "report.html").read_text())
        assert page.content["cases"] and not any(case["by"] for case in page.content["cases"].values())
        first = json.loads(lines[0])
        clean = packed(fv.load_dataset("digits").images[first["index"]].numpy())
        kept.write_text(json.dumps({**first, "witness": clean}) + "\n")
        run("report", tmp_path / "out")
        assert "expected a counterexample" in Page((tmp_path / "out" / "report.html").read_text()).text

    def test_attacks_have_their_radius_at_the_upper_end(self, page):
        (number,) = [k for k, task in enumerate(page.content["tasks"]) if task.get("attack")]
        found = [row for row in page.content["rows"] if row[0] == number and row[4] == "falsified"]
        assert found and all(row[5] is None and row[6] > 0 for row in found)

    def test_says_what_was_found(self, page, finished):
        radii = sorted(r["radius"] for r in of_task(finished[0], "fine-tuned/crown") if r["verdict"] != "misclassified")
        middle = (radii[(len(radii) - 1) // 2] + radii[len(radii) // 2]) / 2
        assert f"{middle:.4g}" in page.text
        assert "small <suite>" in page.text and "two methods & an attack" in page.text and "<b> 6" in page.text
        assert "fail ended with exit code 1" in page.text and "never worse" in page.text
        assert "certified (W1, l1); 11 images" in page.text  # a claim's radii, over pairs that are classified right

    def test_without_matplotlib_nothing_is_missing(self, finished, tmp_path):
        code = (
            "import sys; sys.modules['matplotlib'] = None\n"
            "from flowverify.bench.report import write_report\n"
            f"write_report({str(finished[0] / 'out')!r}, {str(tmp_path)!r})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert Page((tmp_path / "report.html").read_text()).content["cases"]
        assert (tmp_path / "records.csv").is_file() and (tmp_path / "tables.tex").is_file()

    def test_models_that_are_gone_leave_their_pictures_out_and_say_so(self, finished, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "digest", lambda model: "0" * 64)
        run("report", finished[0] / "out", "--out", tmp_path)
        page = Page((tmp_path / "report.html").read_text())
        assert page.content["cases"] == {} and len(page.content["images"]["digits test"]) == 12
        assert "not drawn, digits-fc3: model digits-fc3: SHA-256 is 0" in page.text

    def test_a_page_stays_small_and_says_what_it_leaves_out(self, finished, tmp_path, monkeypatch):
        monkeypatch.setattr(report, "MOST_ROWS", 20)
        monkeypatch.setattr(report, "pictures", partial(report.pictures, most=7))
        run("report", finished[0] / "out", "--out", tmp_path)
        page = Page((tmp_path / "report.html").read_text())
        assert len(page.content["rows"]) == 20 and len(page.content["cases"]) == 7
        text = " ".join(page.text.split())
        assert "The table has the first 20 of 60 results, by image; records.csv has all." in text
        assert re.search(r"The pictures of 7 of \d+ results are in this page", text)
        monkeypatch.setattr(report, "pictures", partial(pictures, most_bytes=700))
        run("report", finished[0] / "out", "--out", tmp_path)
        page = Page((tmp_path / "report.html").read_text())
        assert 0 < len(page.content["images"]["digits test"]) < 12 and len(page.content["cases"]) < 12

    def test_records_elsewhere_are_linked_from_where_the_page_is(self, finished, tmp_path):
        run("report", finished[0] / "out", "--out", tmp_path / "a b")
        page = Page((tmp_path / "a b" / "report.html").read_text())
        (link,) = [source for source in page.sources if source.endswith("records.jsonl")]
        assert (tmp_path / "a b" / unquote(link)).samefile(finished[0] / "out" / "records.jsonl")

    def test_csv_and_latex(self, page, finished):
        out = finished[0] / "out"
        with (out / "records.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 66
        known = records(out)
        for row in rows:
            radius = known[row["task"], int(row["index"])].get("radius")
            assert row["radius"] == ("" if radius is None else str(radius))
        latex = (out / "tables.tex").read_text()
        assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 3
        for line in latex.splitlines():
            if line.endswith(r"\\"):
                assert line.count("&") - line.count(r"\&") in (15, 5, 4)

    def test_an_unfinished_run(self, finished, tmp_path):
        for name in ("suite.json", "records.jsonl"):
            (tmp_path / name).write_bytes(
                (finished[0] / "out" / name).read_bytes()[: None if "suite" in name else 9000]
            )
        run("report", tmp_path, "--out", tmp_path / "elsewhere")
        assert " of 66 records" in (tmp_path / "elsewhere" / "report.html").read_text()
