"""What a number stands for: results named by all that decides them, faults that cost one question, honest intervals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import untrained_checkpoint

import focuslib
from focuslib.errors import InputError, UserError
from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.evaluate import evaluate
from focuslib.evaluation.lmms import FocusLmms, dataset_of
from focuslib.evaluation.settings import method_settings
from focuslib.evaluation.statistics import proportion_interval, score_interval
from focuslib.experiments.cell import make_cell
from focuslib.experiments.runner import run_cells
from focuslib.experiments.store import CellResult, paired_scores
from focuslib.methods import Cmc, Dense, Focus
from focuslib.models import TinyOnevision
from focuslib.models.checkpoint import resolve_folder
from focuslib.models.fingerprint import LARGE, fingerprint
from focuslib.report.tables import accuracy_table, average_table, comparison_table, failures_table, layout_of_table_two

COMMON = {"model": "tiny_onevision", "dataset": "tinyvideo_motion", "limit": 2, "device": "cpu", "dtype": "float32"}

RUN = """
import sys
from pathlib import Path
from focuslib.experiments.cell import make_cell
from focuslib.experiments.runner import run_cells
common = dict(model="tiny_onevision", dataset="tinyvideo_motion", limit=2, device="cpu", dtype="float32", seed=0)
cells = [make_cell("accuracy", method=name, checkpoint=sys.argv[1], **common) for name in ("dense", "cmc")]
outcome = run_cells("main", cells, Path(sys.argv[2]))
assert not outcome.failed, outcome.failed
print("ran", outcome.ran)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(untrained_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def run_copy(package: Path, checkpoint: str, results: Path) -> str:
    """Run two cells with a copy of the package, in a process of its own; says how many ran."""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, "-c", RUN, checkpoint, str(results)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=package, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_change_of_code_runs_its_cells_again(checkpoint, tmp_path):
    package = tmp_path / "copy"
    shutil.copytree(Path(focuslib.__file__).parent, package / "focuslib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(focuslib.__file__).parents[1] / "params", package / "params")
    results = tmp_path / "results"
    assert run_copy(package, checkpoint, results) == "ran 2"
    assert run_copy(package, checkpoint, results) == "ran 0"
    kernel = package / "focuslib" / "kernels" / "motion.py"
    text = kernel.read_text()
    kernel.write_text(text.replace('"""Motion search', '"""A motion search', 1) + "\n# a comment changes no answer\n")
    assert run_copy(package, checkpoint, results) == "ran 0"
    changed = text.replace("_COARSE, _FINE = 64, 16", "_COARSE, _FINE = 32, 16")
    assert changed != text
    kernel.write_text(changed)
    assert run_copy(package, checkpoint, results) == "ran 2"


def test_swapped_weights_are_seen(tmp_path, monkeypatch):
    """80 MiB under the same names, of the same size: another checkpoint."""
    monkeypatch.setenv("FOCUS_CACHE", str(tmp_path / "cache"))
    folder = untrained_checkpoint(tmp_path / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    shard = folder / "model-2.safetensors"
    save_file({"more": torch.zeros(20 << 20)}, shard)
    assert shard.stat().st_size > 80 << 20 > LARGE
    first = fingerprint(folder)
    assert first == fingerprint(folder) and len(list((tmp_path / "cache" / "digests").iterdir())) == 1
    save_file({"more": torch.ones(20 << 20)}, tmp_path / "swapped")
    assert (tmp_path / "swapped").stat().st_size == shard.stat().st_size
    shutil.copyfile(tmp_path / "swapped", shard)
    second = fingerprint(folder)
    assert second != first
    shard.unlink()
    assert fingerprint(folder) not in (first, second) and weights


def test_a_file_of_the_hubs_cache_is_known_by_its_blob(tmp_path):
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("a" * 64)
    blob.write_bytes(b"x")
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blob)
    first = fingerprint(snapshot)
    blob.write_bytes(b"y")  # the hub never does that: the name is taken at its word, and nothing is read
    assert fingerprint(snapshot) == first


def test_nothing_is_downloaded_unasked():
    """The library's own default, without any variable set: the test's socket would refuse, and note, every call."""
    with pytest.raises(UserError, match="the hub's cache lacks it"):
        resolve_folder("nobody/no-such-model")


@pytest.mark.parametrize(
    ("where", "error", "final"),
    [
        ("prepare", ValueError("aspect ratio\nof 900"), False),
        ("generate_ids", torch.OutOfMemoryError("CUDA out of memory"), False),
        ("generate_ids", RuntimeError("sizes do not match"), False),
        ("generate_ids", InputError("one frame"), True),
    ],
)
def test_a_fault_costs_one_question(checkpoint, tmp_path, monkeypatch, where, error, final):
    original, calls = getattr(TinyOnevision, where), []

    def once(self, *arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return original(self, *arguments, **settings)

    monkeypatch.setattr(TinyOnevision, where, once)
    cell = make_cell("accuracy", method="dense", checkpoint=checkpoint, seed=0, **{**COMMON, "limit": 4})
    outcome = run_cells("main", [cell], tmp_path)
    (result,) = outcome.results
    (failure,) = result.failures
    assert str(error).split("\n")[0] in failure["error"] and "\n" not in failure["error"]
    assert failure.get("final", False) == final and len(result.answered) == 3
    table = comparison_table([result])
    for fed in (table, average_table(table), layout_of_table_two([result])):
        assert (fed["Failed"] == 1).all() and (fed["Questions"].astype(int) == 4).all() and len(fed)
    assert failures_table([result])["Why"].tolist() == [failure["error"]]
    assert failure["error"] in outcome.summary()


def test_a_question_without_media_is_a_recorded_failure(checkpoint, monkeypatch):
    vlm, asked = TinyOnevision.load(checkpoint), []
    original = FocusLmms._answer

    def without_media(self, run, context, generation, to_visual, *rest):
        asked.append(1)
        media = (lambda doc: []) if len(asked) == 1 else to_visual
        return original(self, run, context, generation, media, *rest)

    monkeypatch.setattr(FocusLmms, "_answer", without_media)
    result = evaluate(vlm, Dense(), DATASETS["tinyvideo_motion"], limit=3)
    (failure,) = result.failures
    assert failure["final"] and "no image or video" in failure["error"] and len(result.samples) == 3


def test_settings_that_fit_no_question_still_fail_the_cell(checkpoint):
    vlm = TinyOnevision.load(checkpoint)
    with pytest.raises(UserError, match="selected layer 30"):
        evaluate(vlm, Focus(selected_layers=(30,), retention=(0.5,)), DATASETS["tinyvideo_motion"], limit=2)


def test_the_plug_in_has_the_settings_of_focus_run(checkpoint):
    model = FocusLmms(model="tiny_onevision", method="focus", pretrained=checkpoint, device="cpu", m_tile="64")
    for task in ("tinyvideo_motion", "tinyimage_attributes"):
        settings = {**method_settings("focus", "tiny_onevision", task), "m_tile": 64}
        expected = Focus(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})
        assert model.method_for(task) == expected
    assert model.method_for("tinyvideo_motion") != model.method_for("tinyimage_attributes")
    assert [dataset_of(task) for task in ("mvbench_scene_transition", "mmbench_cn_dev", "mlvu_dev", "other")] == [
        "mvbench", "mmbench", "mlvu", "",
    ]  # fmt: skip


def test_a_mistake_in_the_stock_command_is_one_line(checkpoint):
    arguments = f"model=tiny_onevision,method=focus,pretrained={checkpoint},device=cpu"
    with pytest.raises(SystemExit, match=r"^focuslib: unknown setting of focus 'm_tiles'"):
        FocusLmms.create_from_arg_string(arguments + ",m_tiles=3")
    model = FocusLmms.create_from_arg_string(arguments + ",selected_layers=30,retention=.5")
    with pytest.raises(SystemExit, match=r"focuslib: .*selected layer 30"):
        evaluate_with(model)


def evaluate_with(model: FocusLmms) -> None:
    """Have a stock model answer one question of the embedded benchmark."""
    from focuslib.evaluation.lmms import Instance, load_tasks

    task = load_tasks(DATASETS["tinyvideo_motion"], "tiny_onevision")[1][0]
    doc = task.eval_docs[0]
    model.task_dict["tinyvideo_motion"] = {"test": [doc]}
    arguments = (task.doc_to_text(doc), {}, task.doc_to_visual, 0, "tinyvideo_motion", "test")
    model.generate_until(
        [Instance("generate_until", arguments, 0, {"task": "tinyvideo_motion", "doc_id": 0, "repeats": 1})]
    )


def answered(scores, kind="accuracy", method="dense", quantization=None, first=0, **cell) -> CellResult:
    made = make_cell(kind, method=method, seed=0, quantization=quantization, **{**COMMON, **cell})
    samples = [
        {
            "task": "t", "doc_id": first + number, "score": float(score), "computation_sparsity": 0.5, "retained": [1],
            "visual_tokens": 2,
        }
        for number, score in enumerate(scores)
    ]  # fmt: skip
    return CellResult(made, 100 * float(np.mean(scores)), samples, [], {})


def test_a_row_holds_one_set_of_questions():
    results = [
        answered([1, 1, 0, 1], limit=None),
        answered([1, 0, 0, 1], method="focus", limit=None),
        answered([1, 1], quantization="int8", limit=2),
        answered([1, 1], method="focus", quantization="int8", limit=2),
    ]
    (row,) = accuracy_table(results).to_dict("records")
    assert (row["Dense"], row["Focus"]) == ("75.00", "50.00")
    assert all(np.isreal(row[name]) and np.isnan(row[name]) for name in ("INT8_Dense", "INT8_Focus"))
    assert comparison_table(results)["Asked"].tolist() == ["all", "all", *["a sample, kinds in proportion"] * 2]


def test_a_question_that_failed_in_one_is_not_paired():
    base, other = answered([1, 1, 0]), answered([1, 0, 0])
    base.samples[1]["error"] = "its video is cut"
    assert paired_scores(base, other) == ([1.0, 0.0], [1.0, 0.0])


def test_the_interval_of_a_mean_over_categories():
    rng, covered = np.random.default_rng(0), 0
    truth = np.array([0.95, 0.7, 0.4, 0.99])
    sizes = (40, 60, 30, 50)
    for trial in range(300):
        groups = [rng.random(n) < p for n, p in zip(sizes, truth, strict=True)]
        low, high = score_interval(groups, seed=trial, draws=2000)
        assert low <= np.mean([g.mean() for g in groups]) <= high
        covered += low <= truth.mean() <= high
    assert covered >= 275
    assert score_interval([np.array([1, 0, 1, 1])]) == proportion_interval(3, 4)
    low, high = score_interval([np.ones(20), np.ones(30)])
    assert low < 0.99 and high == 1  # all right is no proof


def test_an_interval_is_of_the_drawn_score():
    """MLVU: the mean over seven categories, those without a question counting as 0."""
    samples = [
        {"task": "mlvu_dev", "doc_id": number, "score": score, "category": category}
        for number, (category, score) in enumerate([("ego", 1.0)] * 8 + [("count", 0.0)] * 2 + [("count", 1.0)] * 2)
    ]
    cell = make_cell("accuracy", method="dense", seed=0, **COMMON)
    result = CellResult(cell, 100 * (1 + 0.5) / 7, samples, [], {})
    low, high = result.score_interval()
    assert low < result.score < high < 100 * 2 / 7


def test_what_the_sparsity_of_cmc_skips_is_not_counted(checkpoint):
    """Layers whose attention rows are left alone save nothing there, whatever the mean over the others."""
    vlm = TinyOnevision.load(checkpoint)
    frames = np.random.default_rng(0).integers(0, 255, (1, 96, 96, 3), dtype=np.uint8).repeat(8, 0)
    sparsities = {}
    for skipped in ((), tuple(range(8))):
        with Cmc(score_threshold=1.0, skip_score_layers=skipped)(vlm) as run:
            vlm.prefill(vlm.prepare(frames, "What?"))
        sparsities[skipped] = run.sparsity
        json.dumps(run.last.stats)
    assert sparsities[()] > sparsities[tuple(range(8))]
