"""What is released: one version, a wheel with all of its data, and a source archive that makes the same wheel."""

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import flowverify as fv

ROOT = Path(__file__).parents[1]
DATA = {".json", ".onnx", ".typed", ".jinja", ".css", ".js"}


def build(target: str, source: Path, folder: Path) -> Path:
    """A distribution, made without isolation and without network."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    return made


def contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def test_version_is_said_once_and_released():
    assert re.search(r"^version\b", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE) is None
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    number, date = re.findall(r"^## \[([\d.]+)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[0]
    assert (citation["version"], str(citation["date-released"])) == (fv.__version__, date) and number == fv.__version__


def test_wheel_has_all_modules_and_data(wheel):
    assert wheel.name == f"flowverify-{fv.__version__}-py3-none-any.whl"
    suffixes = DATA | {".py"}
    folders = ((ROOT / "flowverify", ""), (ROOT / "models", "models/"))
    expected = {
        f"flowverify/{inside}{path.relative_to(folder).as_posix()}"
        for folder, inside in folders
        for path in folder.rglob("*")
        if path.suffix in suffixes
    }
    files = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert files == expected
    assert {Path(name).suffix for name in files} == suffixes


def test_archive_of_the_source_makes_the_same_wheel(wheel, tmp_path):
    archive = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    for name in ("Makefile", "mkdocs.yml", "docs/theory.md", "tests/test_readme.py", "benchmarks/suites/quick.yaml"):
        assert (source / name).is_file()
    again = build("wheel", source, tmp_path / "again")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


@pytest.mark.slow
def test_installed_from_the_wheel_it_verifies(wheel, tmp_path):
    """In an environment of its own, which has the dependencies of this one."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    binaries, library = home / "bin", Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (library / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(str(binaries / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    assert str(home) in run(str(binaries / "python"), "-c", "import flowverify; print(flowverify.__file__)")
    program = str(binaries / "flowverify")
    assert "verify" in run(program, "--help")
    assert run(program, "--version").split() == ["flowverify", fv.__version__]
    assert '"certified"' in run(program, "verify", "digits-fc3", "--index", "0", "--radius", "0.01", "--json")
