"""The one family of errors that flowverify raises for things a user can mend.

Every message says what was given and what was expected. The command line prints it on one line and
exits with code 2; a bug in flowverify itself is never one of these.
"""


class FlowverifyError(Exception):
    """Base class of every error that flowverify raises on purpose."""


class InvalidInputError(FlowverifyError, ValueError):
    """A value that no computation can be run on: shape, sign, NaN, mass, radius, label, index."""


class UnknownNameError(FlowverifyError, KeyError):
    """A name (model, data set, method, bound, ground cost) that is not in the list of valid ones."""

    def __init__(self, kind: str, given: object, valid: "list[str] | tuple[str, ...]") -> None:
        self.kind, self.given, self.valid = kind, given, tuple(valid)
        super().__init__(f"unknown {kind} {given!r}: expected one of {', '.join(sorted(valid))}")

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class UnsupportedOperationError(FlowverifyError, NotImplementedError):
    """A network contains an operation that the converter or a certifier does not know."""


class FoldError(UnsupportedOperationError):
    """A(delta) cannot be folded into the first layer of this network."""


class ModelFileError(FlowverifyError):
    """A model file is missing, corrupt, or not what its card says."""


class DataError(FlowverifyError):
    """A data set is missing, corrupt, or malformed."""


class SolverError(FlowverifyError, RuntimeError):
    """An optimal transport or linear programming solver did not return a checked optimum."""


class DependencyError(FlowverifyError, ImportError):
    """An optional or unusable third-party package; the message says what to install."""


class BoundError(FlowverifyError, RuntimeError):
    """A certifier broke down (not: it could not certify, which is the verdict ``unknown``)."""
