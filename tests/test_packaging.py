"""The traps of the layout: `kernels`, the two relative links, and one version."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ttt_fast

ROOT = Path(__file__).parents[1]
LINKS = {"ttt_fast/kernels": "kernels", "ttt_fast/naive.py": "bench/naive.py"}
SKIPPED = {".venv", ".git", ".hypothesis", ".benchmarks", "build", "dist"}
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".h", ".cpp", ".cu", ".cuh", ""}


def files() -> list[Path]:
    found = []
    for top in ROOT.iterdir():
        if top.name not in SKIPPED and not top.name.endswith("cache"):
            found += [top, *top.rglob("*")]
    return [path for path in found if path.is_file() and path.suffix in TEXT]


def machine_paths(text: str) -> list[str]:
    return re.findall(r"(?<![\w.~$}])/(?:home|root|work|Users|mnt)/\w[\w./-]*", text)


def test_kernels_is_not_a_package_of_its_own():
    # It would be found before the Hugging Face package of that name, which transformers probes for.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(("link", "target"), LINKS.items(), ids=LINKS)
def test_link_is_relative_and_stays_in_the_checkout(link, target):
    path = ROOT / link
    assert path.is_symlink()
    assert not path.readlink().is_absolute()
    assert path.resolve() == (ROOT / target).resolve()


def test_import_leaves_kernels_alone():
    code = (
        "import sys, ttt_fast, ttt_fast.kernels, ttt_fast.naive\nsys.exit('kernels' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_typed():
    assert (ROOT / "ttt_fast" / "py.typed").is_file()


def test_one_version():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r'^version = "(.*)"$', pyproject, re.M) == [ttt_fast.__version__]


def test_every_package_is_listed():
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in (ROOT / "ttt_fast").rglob("__init__.py")
    }
    pyproject = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*)\]$", pyproject, re.M)[1]
    assert set(re.findall(r'"([\w.]+)"', listed)) == folders | {"ttt_fast.kernels"}


def test_setup_stays_small_and_the_sdist_has_every_source():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 80
    manifest = (ROOT / "MANIFEST.in").read_text()
    suffixes = set(re.search(r"recursive-include csrc (.*)", manifest)[1].replace("*", "").split())
    assert {path.suffix for path in (ROOT / "csrc").rglob("*.*")} == suffixes


def test_no_path_of_one_machine():
    found = {path: machine_paths(path.read_text(encoding="utf-8")) for path in files()}
    assert {str(path): paths for path, paths in found.items() if paths} == {}


def test_a_path_of_one_machine_would_be_seen():
    path = "/".join(["", "home", "somebody", "data.json"])
    assert machine_paths(f"open('{path}')") == [path]
    assert ROOT / "README.md" in files()
