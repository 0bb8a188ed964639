"""The shape of the package: imports point one way, it works without auto_LiRPA, and files stay small."""

import ast
import inspect
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import flowverify as fv

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flowverify"
LAYERS = (
    "errors", "registry", "quiet", "conventions", "notebook", "deadline", "records", "settings", "data", "grid",
    "transport", "ball", "network", "zoo", "results", "witness", "attack", "bounds", "lirpa", "certifiers",
    "smoothing", "training", "export", "targeted", "api", "adapters", "figures", "curves", "bench", "doctor", "cli",
    "__main__",
)  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports anywhere, as a dotted name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
class TestEveryFile:
    def test_imports_only_from_layers_above(self, path):
        own = layer(path)
        if path == PACKAGE / "__init__.py":
            return  # names the public interface, which lies in all layers
        assert own in LAYERS, f"{own} has no place in the order of the layers"
        used = {name.split(".")[1] for name in imported_modules(path) if name.startswith("flowverify.")}
        below = {name for name in used if name in LAYERS and LAYERS.index(name) > LAYERS.index(own)}
        assert not below

    def test_only_the_adapter_imports_auto_lirpa(self, path):
        if path.relative_to(PACKAGE).as_posix() != "bounds/crown/backend.py":
            assert not [name for name in imported_modules(path) if name.split(".")[0] == "auto_LiRPA"]

    def test_says_what_it_is_for(self, path):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_no_absolute_paths():
    suffixes = {".py", ".toml", ".md", ".json", ".yml", ".ipynb", ".cff", ""}
    folders = ("flowverify", "tests", "benchmarks", "models", "docs", ".ci")
    files = [path for name in folders for path in (ROOT / name).rglob("*")] + list(ROOT.glob("*"))
    wrong = re.compile(r"(?<![\w.$:/])/(?:home|root|work|Users|opt|tmp)/[\w.]")
    for path in files:
        hidden = {".git", ".venv", "build", "dist"} & set(path.relative_to(ROOT).parts)
        if path.is_file() and path.suffix in suffixes and not hidden and path != Path(__file__):
            assert not wrong.search(path.read_text(encoding="utf-8")), path


def test_public_names():
    for name in fv.__all__:
        assert getattr(fv, name) is not None
        assert name in dir(fv)
    assert fv.__version__ == version("flowverify")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fv.nonsense
    assert (PACKAGE / "py.typed").is_file()


def test_certify_is_a_function():
    assert inspect.isfunction(fv.certify)
    assert fv.certify.__module__ == "flowverify.api"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


HEAVY = ("torch", "numpy", "scipy", "numba", "sklearn", "onnx", "matplotlib", "auto_LiRPA")


@pytest.mark.parametrize(
    "arguments", ["", "--help", "verify --help", "smooth certify --help", "bench --help", "check --help", "plot -h"]
)
def test_import_and_help_load_nothing_heavy(arguments):
    """They answer at once: a module of these takes longer to load than all that help needs."""
    code = "import sys, flowverify\n"
    if arguments:
        code += f"from flowverify.cli import app\napp({arguments.split()!r}, standalone_mode=False)\n"
    done = run(f"{code}loaded = {set(HEAVY)!r} & set(sys.modules)\nassert not loaded, loaded")
    assert done.returncode == 0, done.stderr


class TestWithoutAutoLirpa:
    def test_only_certification_misses_it_and_says_what_to_install(self):
        done = run(
            "import sys; sys.modules['auto_LiRPA'] = None; import flowverify as fv\n"
            "model, data, ball = fv.load_model('digits-fc3'), fv.load_dataset('digits'), fv.WassersteinBall(0.1)\n"
            "fv.fold(model)\n"
            "try: fv.certify(model, data.images[0], 0, ball, bound='crown')\n"
            "except fv.FlowverifyError as error: print(type(error).__name__, error)"
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("DependencyError auto_LiRPA cannot be used")
        assert "pip install --no-deps auto-LiRPA==0.3" in done.stdout

    def test_intervals_and_networks_of_relus_do_without_it(self):
        done = run(
            "import sys; sys.modules['auto_LiRPA'] = None; import flowverify as fv\n"
            "model, data, ball = fv.load_model('digits-fc3'), fv.load_dataset('digits'), fv.WassersteinBall(0.001)\n"
            "for bound in ('ibp', 'best'):\n"
            "    print(fv.certify(model, data.images[0], data.labels[0], ball, bound=bound).verdict)"
        )
        assert done.stdout.split() == ["certified"] * 2, done.stderr

    @pytest.mark.parametrize(("command", "code"), [("verify digits-fc3 --index 0 --bound crown", 2), ("doctor", 1)])
    def test_command_line_says_what_to_install(self, command, code):
        done = run(
            f"import sys; sys.modules['auto_LiRPA'] = None; sys.argv = 'flowverify {command}'.split()\n"
            "from flowverify.cli import main; main()"
        )
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        assert "pip install --no-deps auto-LiRPA==0.3" in done.stdout + done.stderr
