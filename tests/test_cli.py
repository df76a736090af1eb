"""The command line itself: help, completion, mistakes in the options, pipes, interrupts, and `focus hardware`."""

import os
import subprocess
import sys

import pandas as pd
import pytest

import focuslib
from focuslib import cli
from focuslib.cli.options import method_names, model_names, profile_names, task_names
from focuslib.errors import UserError
from focuslib.evaluation.datasets import DATASETS
from focuslib.methods import METHODS, Focus
from focuslib.methods.settings import make_method
from focuslib.models import MODELS

COMMANDS = ("run", "tune", "lmms-eval", "reproduce", "verify", "report", "check", "fetch", "export", "hardware")


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_the_help_names_every_command(capsys):
    status, out, _ = command(capsys, "--help")
    assert status == 0 and all(f" {name} " in out for name in COMMANDS)
    assert "Score a method" in out and "focus run --task" in out  # a panel, an example
    status, out, _ = command(capsys)  # alone it says how to use it
    assert status == 2 and "Usage: focus" in out


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "lmms-eval"])
def test_the_help_of_a_command(capsys, name):
    status, out, _ = command(capsys, name, "--help")
    assert status == 0 and f"Usage: focus {name}" in out and "─ Options ─" in out


def test_the_version(capsys):
    assert command(capsys, "--version")[:2] == (0, f"focus {focuslib.__version__}\n")


def test_names_for_completion_are_those_of_the_registries():
    assert sorted(model_names()) == sorted(MODELS)
    assert sorted(method_names()) == sorted(METHODS)
    assert task_names() == list(DATASETS)
    assert set(profile_names()) >= {"laptop", "paper"} and "published" not in profile_names()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("run --model llava_o", {"llava_onevision"}),
        ("tune --method f", {"fastv", "fewer_frames", "fewer_pixels", "flashvid", "focus", "framefusion"}),
        ("run --task tinyimage", {"tinyimage_attributes", "tinyimage_attributes_tune"}),
        ("verify --profile lap", {"laptop"}),
        ("fetch m", {"minicpm_v", "mlvu", "mvbench", "mme", "mmbench"}),
        ("repo", {"report"}),
    ],
)
def test_the_shell_completes_names(capsys, monkeypatch, typed, offered):
    words = f"focus {typed}"
    monkeypatch.setenv("_FOCUS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    status, out, _ = command(capsys)
    assert status == 0 and set(out.split()) == offered


@pytest.mark.parametrize(
    ("line", "said", "where"),
    [
        ("rnu", "No such command 'rnu'", "focus"),
        ("run", "Missing option '--task'", "focus run"),
        ("run --task x --limit 0", "'--limit'", "focus run"),
        ("run --task x --workers none", "'--workers'", "focus run"),
        ("run --taks x", "No such option: --taks", "focus run"),
        ("run --task", "Option '--task' requires an argument", "focus"),
        ("tune --task x", "give either --grid NAME=A,B,C or --bisect NAME=LOW,HIGH", "focus tune"),
        ("tune --task x --grid a=1 --bisect b=1,2", "give either --grid", "focus tune"),
        ("reproduce laptop", "laptop", "focus reproduce"),
        ("export one.trace", "Missing argument", "focus export"),
        ("hardware --m-tile wide", "'--m-tile'", "focus hardware"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(capsys, line, said, where):
    status, out, error = command(capsys, *line.split())
    assert (status, out) == (2, "") and said in error
    assert error.startswith("focus: ") and error.endswith(f" ({where} --help)\n") and error.count("\n") == 1


@pytest.mark.parametrize(
    "settings", [{"m_tile": "big"}, {"m_tile": 0}, {"retention": ".5"}, {"similarity_threshold": -1}, {"block": 0}]
)
def test_no_line_says_focus_twice(capsys, settings):
    with pytest.raises(UserError, match=r"^method focus: "):
        make_method("focus", settings)
    ((name, value),) = settings.items()
    _, _, error = command(capsys, "run", "--task", "tinyvideo_motion", "--set", f"{name}={value}")
    assert error.startswith("focus: method focus: ") and error.count("\n") == 1


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("focuslib.prefill.trace.Trace.load", interrupted)
    status, _, error = command(capsys, "export", "a.trace", "a.pth")
    assert status == 130
    assert error == "focus: interrupted; run the same command again to go on from here\n"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def faulty(*_):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("focuslib.prefill.trace.Trace.load", faulty)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["export", "a.trace", "a.pth"])


@pytest.mark.skipif(os.name == "nt", reason="pipes end otherwise there")
@pytest.mark.parametrize("line", ["--help", "hardware"])
def test_a_reader_that_leaves_is_no_error(line):
    """As in `focus hardware | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        arguments = [sys.executable, "-m", "focuslib.cli", *line.split()]
        done = subprocess.run(arguments, stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.stderr == "" and done.returncode in (0, 1)


def test_help_loads_no_heavy_library():
    """So that it, and the completion of names, answer at once."""
    code = (
        "import sys\nfrom focuslib import cli\nfrom focuslib.cli import options\n"
        "options.model_names(), options.method_names(), options.task_names(), options.profile_names()\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_lmms_eval_gets_its_arguments_as_they_are(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("lmms_eval.cli.dispatch.main", lambda: seen.append(sys.argv))
    given = ["--model", "focuslib", "--model_args=model=tiny_onevision,method=dense", "--tasks", "a,b", "--help", "-x"]
    monkeypatch.setattr(sys, "argv", ["focus"])
    assert command(capsys, "lmms-eval", *given)[0] == 0
    assert command(capsys, "lmms-eval")[0] == 0
    assert seen == [["lmms-eval", *given], ["lmms-eval"]]


def test_hardware_of_the_published_inputs(capsys, tmp_path):
    status, out, _ = command(capsys, "hardware", "--out", str(tmp_path / "tables"))
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    dense = next(row for row in rows if row[:3] == ["llava_vid", "videomme", "dense"])
    assert dense[4] == "95,937" and dense[6] == "1.00"  # million cycles, speed-up
    assert "focus left out for llava_vid × videomme" in out and str(tmp_path / "tables") in out
    assert "need CACTI" in out  # SEC alone has other buffers, whose energy is not published
    written = pd.read_csv(tmp_path / "tables" / "main_dense.csv")
    assert len(written) == 15 and written["total_cycles"].notna().all()


def test_hardware_sweeps_and_names_what_is_wrong(capsys):
    sweep = ("--accelerator", "focus_sec_only", "--m-tile", "512", "--m-tile", "-1", "--corrected")
    status, out, _ = command(capsys, "hardware", *sweep)
    assert status == 0 and "m_tile_size" in out and "left out for" not in out
    assert len([line for line in out.splitlines() if "focus_sec_only" in line]) == 30
    for arguments, said in (
        (("none.trace",), "none.trace: no such file or folder"),
        (("--accelerator", "focsu"), "unknown accelerator 'focsu'; did you mean focus?"),
        (("--scatter", "0"), "scatter 0: it must be at least 1"),
    ):
        status, _, error = command(capsys, "hardware", *arguments)
        assert status == 1 and said in error and error.startswith("focus: ") and error.count("\n") == 1


def test_every_setting_of_focus_has_its_help(capsys):
    out = command(capsys, "tune", "--list-settings")[1]
    assert "similarity_threshold=" in out and (Focus.__doc__ or "").split("\n")[0] in out


def test_the_module_runs_as_the_script_does():
    done = subprocess.run([sys.executable, "-m", "focuslib.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"focus {focuslib.__version__}\n")
