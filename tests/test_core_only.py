"""With nothing but the core dependencies: the library works, and what needs an extra says which, in one line."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from focuslib.errors import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# A package outside of what is installed looks as if it were not there, to import and to find_spec alike.
WITHOUT = """
import json, os
from importlib.machinery import PathFinder

def hide(missing, find_spec):
    def find(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in missing else find_spec(name, path, target)
    PathFinder.find_spec = classmethod(find)

hide(set(json.loads(os.environ["MISSING"])), PathFinder.find_spec)
"""


def distributions(*extras: str) -> set[str]:
    """What `pip install focuslib[extras]` brings, by the metadata of what is installed here."""
    left = [Requirement(line) for line in PROJECT["dependencies"]]
    for extra in extras:
        left += [Requirement(line) for line in PROJECT["optional-dependencies"][extra]]
    found: set[tuple[str, str]] = set()  # a distribution and an extra of it, "" without one
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for known, extra in found if known == name}:
            try:
                lines = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            found.add((name, extra))
            needed = (Requirement(line) for line in lines)
            left += [each for each in needed if not each.marker or each.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def modules(*extras: str) -> tuple[set[str], set[str]]:
    """The top-level modules that an installation with these extras has, and those that it lacks."""
    brought, everything = distributions(*extras), metadata.packages_distributions()
    there = {name for name, owners in everything.items() if brought & set(map(canonicalize_name, owners))}
    return there, set(everything) - there - {"focuslib"}


def installed_with(code: str, folder: Path, *extras: str) -> str:
    """What code prints in an empty folder, where only the core and these extras are installed."""
    environment = {**os.environ, "MISSING": json.dumps(sorted(modules(*extras)[1])), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT + code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


LIBRARY = """
import av
import numpy as np

with av.open("clip.mp4", "w") as clip:
    stream = clip.add_stream("mpeg4", rate=8)
    stream.width = stream.height = 96
    stream.pix_fmt = "yuv420p"
    for number in range(16):
        picture = np.zeros((96, 96, 3), np.uint8)
        picture[20:50, 4 * number : 4 * number + 30] = 220, 30, 30
        for packet in stream.encode(av.VideoFrame.from_ndarray(picture)):
            clip.mux(packet)
    clip.mux(stream.encode())

from focuslib.methods import Focus
from focuslib.models import TinyOnevision

vlm = TinyOnevision.load()
with Focus(selected_layers=(2, 4, 6), retention=(0.4, 0.2, 0.1), vector_size=16)(vlm, trace=True) as run:
    answer = vlm.generate("clip.mp4", "What happens?")
print(bool(answer), run.sparsity > 0.8, tuple(run.trace.mask_similar("q_proj").shape))

import pkgutil
from importlib import import_module
from importlib.util import find_spec

for room in ("kernels", "prefill", "models", "methods"):
    package = import_module(f"focuslib.{room}")
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"focuslib.{room}.{module.name}")
import focuslib.explore.view  # what a view shows is recorded without the libraries that draw it

print([name for name in ("jupyterlab", "lmms_eval", "pandas", "IPython") if find_spec(name)])
try:
    from focuslib.explore import explore
except ValueError as error:
    print(error)
"""


def test_the_library_needs_no_extra(tmp_path):
    assert installed_with(LIBRARY, tmp_path).splitlines() == [
        "True True (8, 288, 8)",
        "[]",
        "explore needs the extra [lab]: pip install 'focuslib[lab]'",
    ]


NEEDS = {
    "run --task tinyvideo_motion": "eval",
    "tune --task tinyvideo_motion_tune --grid m_tile=64": "eval",
    "lmms-eval --help": "eval",
    "hardware": "eval",
    "reproduce": "lab",
    "verify": "lab",
    "report": "lab",
    "check": "lab",
    "fetch llava_vid": "lab",
}
COMMANDS = """
import io
from contextlib import redirect_stderr, redirect_stdout
from focuslib.cli import main

said = {}
for line in json.loads(os.environ["LINES"]):
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(line.split())
    except SystemExit as ended:
        said[line] = ended.code, out.getvalue(), err.getvalue()
print(json.dumps(said))
"""


def test_a_command_names_the_extra_it_needs(tmp_path, monkeypatch):
    alone = ("run --list-settings", "--help", "--version", "export none.trace out.pth")
    monkeypatch.setenv("LINES", json.dumps([*NEEDS, *alone]))
    said = json.loads(installed_with(COMMANDS, tmp_path))
    for line, extra in NEEDS.items():
        command = line.split()[0]
        assert said[line] == [1, "", f"focus: {command} needs the extra [{extra}]: pip install 'focuslib[{extra}]'\n"]
    assert [said[line][0] for line in alone] == [0, 0, 0, 1]
    assert "similarity_threshold=" in said[alone[0]][1] and said[alone[3]][2].startswith("focus: none.trace: ")


def test_a_run_needs_no_notebook(tmp_path, monkeypatch):
    line = "run --task tinyvideo_motion --limit 2 --out results"
    monkeypatch.setenv("LINES", json.dumps([line, "hardware"]))
    said = json.loads(installed_with(COMMANDS, tmp_path, "eval").splitlines()[-1])
    assert said[line][0] == 0 and "1 cells run, 0 resumed, 0 failed" in said[line][1], said[line]
    assert said["hardware"][0] == 0 and "DRAM MB" in said["hardware"][1]


def imports(path: Path) -> set[str]:
    """The top-level modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"focuslib"}


def test_every_optional_package_is_known():
    """What the library imports is in the core or has an extra that its absence is explained with."""
    core = modules()[0]
    used = set().union(*map(imports, (ROOT / "focuslib").rglob("*.py")))
    assert used - core <= {package for packages in EXTRAS.values() for package in packages}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_its_packages(extra):
    brought = ("eval", "lab") if extra == "lab" else (extra,)
    assert set(EXTRAS[extra]) <= modules(*brought)[0]
