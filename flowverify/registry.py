"""What goes by a name: methods, engines, attacks, data sets. One entry each, and ``MODULE:CLASS`` for anybody else's.

An entry says in one line what it is, where it is found and what its options are. Nothing is imported before it is
used, so that the command line can list and explain all of it at once.

Options are the fields of a dataclass. A field's ``metadata["help"]`` says what it is for; one without help holds what
cannot be written down, such as a callback. The command line, suites of ``bench`` and ``flowverify.api`` all come here
with the names and values that they were given (:meth:`Registry.options`).
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from flowverify.errors import FlowverifyError, InvalidInputError, UnknownNameError

OUTSIDE = "MODULE:CLASS"  # stands for it in lists of names


@dataclass(frozen=True)
class Entry:
    """One thing with a name.

    Attributes:
        description: in one line.
        target: ``module:attribute`` of the class or function.
        options: ``module:attribute`` of the dataclass of its options, a module that imports nothing heavy; without
            it they are ``Options`` of the class, or the keyword-only parameters of what is called.
        family: what entries that are alike have in common.
    """

    description: str
    target: str
    options: str = ""
    family: str = ""


@dataclass(frozen=True)
class NoOptions:
    """The options of what has none."""


def option(default: Any, about: str) -> Any:
    """A field of an options dataclass: its default, and what it is for."""
    return dataclasses.field(default=default, metadata={"help": about})


class Registry(MutableMapping[str, Entry]):
    """The entries of one kind by name.

    Args:
        kind: such as "method", for messages.
        base: ``module:attribute`` of the class from which a class in place of a name must be derived; without one it
            may be anything that can be called.
        forms: of what else may be given, such as paths, for messages.
    """

    def __init__(self, kind: str, entries: Mapping[str, Entry], base: str = "", forms: Sequence[str] = ()) -> None:
        self.kind, self._entries, self._base, self._forms = kind, dict(entries), base, (*forms, OUTSIDE)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __setitem__(self, name: str, entry: Entry) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def family(self, *families: str) -> tuple[str, ...]:
        """The names of these families."""
        return tuple(name for name, entry in self._entries.items() if entry.family in families)

    def check_family(self, name: str, family: str) -> str:
        """Returns a name of this family, or raises UnknownNameError with those that it has."""
        if name not in self.family(family):
            raise UnknownNameError(self.kind, name, self.family(family))
        return name

    def listing(self) -> str:
        """The names for a help text: "flow-pgd, sinkhorn or MODULE:CLASS"."""
        return f"{', '.join([*self, *self._forms[:-1]])} or {OUTSIDE}"

    def is_outside(self, name: object) -> bool:
        """Whether a name has the form MODULE:CLASS, and no entry."""
        return name not in self._entries and is_outside(name)

    def check(self, name: object) -> str:
        """Returns a name that has an entry or the form MODULE:CLASS; imports nothing.

        Raises:
            UnknownNameError: another one.
        """
        if not isinstance(name, str) or (name not in self and not self.is_outside(name)):
            raise UnknownNameError(self.kind, name, (*self, *self._forms))
        return name

    def find(self, name: str) -> Any:
        """The class or function of this name.

        Raises:
            UnknownNameError: no entry, and not of the form MODULE:CLASS.
            InvalidInputError: there is no such class, or it is not derived from the base of its kind.
        """
        if self.check(name) in self._entries:
            return imported(self._entries[name].target)
        return find_outside(self.kind, name, self._base)

    def options_type(self, name: str) -> type:
        """The dataclass of the options of this name; raises as :meth:`find`."""
        if self.check(name) in self._entries and (path := self._entries[name].options):
            return imported(path)  # type: ignore[no-any-return]
        found = self.find(name)
        return getattr(found, "Options", None) or _keywords(found)

    def options(self, name: str, given: Mapping[str, Any]) -> Any:
        """The options of this name with the values given; the rest by default.

        Raises:
            InvalidInputError: an option that this name has not, or a value that it does not take.
        """
        wanted = self.options_type(name)
        valid = {field.name: field for field in dataclasses.fields(wanted)}
        for key, value in given.items():
            if key not in valid:
                expected = f"one of {', '.join(valid)}" if valid else "none"
                raise InvalidInputError(f"option {key!r} of {self.kind} {name}: unknown, expected {expected}")
            if not _fits(value, valid[key]):
                expected = str(valid[key].type)
                raise InvalidInputError(f"option {key!r} of {self.kind} {name}: given {value!r}, expected {expected}")
        return wanted(**given)

    def make(self, name: str, options: Any, *arguments: Any, **more: Any) -> Any:
        """Calls what has this name: with the dataclass as ``options`` if it takes that, else with each as a keyword."""
        found = self.find(name)
        if "options" in inspect.signature(found).parameters:
            return found(*arguments, options=options, **more)
        fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        return found(*arguments, **fields, **more)


def is_outside(name: object) -> bool:
    """Whether a name has the form MODULE:CLASS."""
    return isinstance(name, str) and bool(re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", name))


def find_outside(kind: str, name: str, base: str = "") -> Any:
    """The class or function MODULE:CLASS.

    Args:
        kind: what it is wanted as, for messages.
        base: ``module:attribute`` of the class from which it must be derived; without one it must be callable.

    Raises:
        InvalidInputError: there is none, or it is something else.
    """
    try:
        found = imported(name)
    except FlowverifyError:
        raise
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInputError(f"{kind} {name!r}: {error}, expected a class {OUTSIDE}") from error
    wanted = imported(base) if base else None
    if wanted is None and not callable(found):
        raise InvalidInputError(f"{kind} {name!r}: {found!r}, expected something to call")
    if wanted is not None and not (isinstance(found, type) and issubclass(found, wanted)):
        raise InvalidInputError(f"{kind} {name!r}: {found!r}, expected a class derived from {wanted.__name__}")
    return found


def imported(path: str) -> Any:
    """What ``module:attribute`` names; raises ImportError, AttributeError or ValueError."""
    module, _, attribute = path.partition(":")
    found: Any = import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def help_of(options: str, name: str) -> str:
    """What a field of an options dataclass is for: ``module:attribute``, and the field's name."""
    return str({field.name: field for field in dataclasses.fields(imported(options))}[name].metadata["help"])


def parsed(assignments: list[str] | None) -> dict[str, Any]:
    """``NAME=VALUE`` from a command line as options; a value that is no JSON is text.

    Raises:
        InvalidInputError: no "=", or a name twice.
    """
    result: dict[str, Any] = {}
    for one in assignments or ():
        name, equals, value = one.partition("=")
        key = name.strip().replace("-", "_")
        if not equals or not key or key in result:
            raise InvalidInputError(f"option {one!r}: expected NAME=VALUE, each name once")
        try:
            result[key] = json.loads(value)
        except json.JSONDecodeError:
            result[key] = value
    return result


def _fits(value: Any, field: dataclasses.Field[Any]) -> bool:
    """Whether a value may be what a field of a plain type holds; a whole number may be a float."""
    plain: dict[str, Any] = {"bool": bool, "int": int, "float": (float, int), "str": str}
    names = [name.strip() for name in str(field.type).split("|")]
    if value is None or any(name not in (*plain, "None") for name in names):
        return value is not None or "None" in names or "Any" in names
    return any(isinstance(value, plain[name]) for name in names if name in plain) and (
        not isinstance(value, bool) or "bool" in names
    )


@cache
def _keywords(factory: Any) -> type:
    """A dataclass of the keyword-only parameters of a class or function, with help from its ``Args:``."""
    help_texts = dict(re.findall(r"^ +(\w+)(?:, \w+)*: (.+)", inspect.getdoc(factory) or "", re.MULTILINE))
    parameters = [
        one
        for one in inspect.signature(factory).parameters.values()
        if one.kind is one.KEYWORD_ONLY and one.name not in ("options", "input_shape")
    ]
    return dataclasses.make_dataclass(
        f"{factory.__name__}Options",
        [
            (
                one.name,
                "Any" if one.annotation is one.empty else one.annotation,
                dataclasses.field(default=one.default, metadata={"help": help_texts.get(one.name, "")}),
            )
            for one in parameters
        ],
        frozen=True,
    )


INCOMPLETE, LINEAR, COMPLETE = "incomplete", "linear", "complete"
_INCOMPLETE_OPTIONS = "flowverify.certifiers.options:IncompleteOptions"
_COMPLETE_OPTIONS = "flowverify.certifiers.options:CompleteOptions"

METHODS = Registry(
    "method",
    {
        "vanilla": Entry(
            "the L1 ball in the flow domain (framework paper, Theorem 3)",
            "flowverify.certifiers.incomplete:Certifier",
            _INCOMPLETE_OPTIONS,
            INCOMPLETE,
        ),
        "fine-tuned": Entry(
            "the flows of the L1 ball that lead to images, R + A delta >= 0 (Theorem 6)",
            "flowverify.certifiers.incomplete:Certifier",
            _INCOMPLETE_OPTIONS,
            INCOMPLETE,
        ),
        "linear": Entry(
            "affine networks: the exact radius, without a solver (Lemma 8, by duality)",
            "flowverify.certifiers.linear:LinearCertifier",
            family=LINEAR,
        ),
        "linear-lp": Entry(
            "affine networks: the exact radius by linear programs (Lemma 8)",
            "flowverify.certifiers.linear:LinearCertifier",
            family=LINEAR,
        ),
        "complete": Entry(
            "ReLU networks: the exact radius, by branch and bound on the flows that lead to images",
            "flowverify.certifiers.complete.certifier:CompleteCertifier",
            _COMPLETE_OPTIONS,
            COMPLETE,
        ),
        "vanilla-complete": Entry(
            "ReLU networks: exact for the L1 ball in the flow domain",
            "flowverify.certifiers.complete.certifier:CompleteCertifier",
            _COMPLETE_OPTIONS,
            COMPLETE,
        ),
        "milp": Entry(
            "ReLU networks: the exact radius, by mixed-integer programs; slow, to check against",
            "flowverify.certifiers.complete.milp:MilpCertifier",
            _COMPLETE_OPTIONS,
            COMPLETE,
        ),
    },
    base="flowverify.certifiers.base:BaseCertifier",
)

OWN_ENGINE = "flowverify"
ENGINES = Registry(
    "engine",
    {
        OWN_ENGINE: Entry("what the method says", "flowverify.certifiers.incomplete:Certifier"),
        "marabou": Entry(
            "Marabou 2.0.0 in a process of its own: complete, slow, for vanilla and fine-tuned",
            "flowverify.export.marabou:MarabouCertifier",
            "flowverify.certifiers.options:MarabouOptions",
        ),
        "alpha-beta-crown": Entry(
            "alpha-beta-CROWN in a process of its own: complete, for vanilla and fine-tuned",
            "flowverify.export.abcrown:AlphaBetaCrownCertifier",
            "flowverify.certifiers.options:AlphaBetaCrownOptions",
        ),
    },
    base="flowverify.certifiers.base:BaseCertifier",
)

ATTACKS = Registry(
    "attack",
    {
        "flow-pgd": Entry(
            "projected gradient descent on flows (framework paper)", "flowverify.attack.flow_descent:FlowDescent"
        ),
        "sinkhorn": Entry("projected Sinkhorn (Wong et al. 2019)", "flowverify.attack.sinkhorn:ProjectedSinkhorn"),
        "frank-wolfe": Entry("Frank-Wolfe on the exact ball", "flowverify.attack.frank_wolfe:FrankWolfe"),
        "minimal": Entry("the nearest adversarial image, directly", "flowverify.attack.frank_wolfe:MinimalRadius"),
    },
    base="flowverify.attack.base:BaseAttack",
)

DATASETS = Registry(
    "data set",
    {
        "digits": Entry("8x8 digits of scikit-learn, always there", "flowverify.data.files:read_digits"),
        "mnist": Entry("28x28 digits, from files or downloaded", "flowverify.data.files:read_mnist"),
        "fashion-mnist": Entry("28x28 clothes, likewise", "flowverify.data.files:read_fashion_mnist"),
        "kmnist": Entry("28x28 letters, likewise", "flowverify.data.files:read_kmnist"),
        "cifar10": Entry("32x32 colour images, likewise", "flowverify.data.files:read_cifar10"),
        "cifar100": Entry("the same with 100 classes", "flowverify.data.files:read_cifar100"),
        "cifar10-sample": Entry("some of CIFAR-10, from a file", "flowverify.data.files:read_cifar10_sample"),
    },
    forms=("PATH.npz", "FOLDER/", "hf:OWNER/NAME"),
)
