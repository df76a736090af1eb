"""Cells, resuming, tables and the command line, on the untrained model and a few questions of the real benchmark."""

import json
import shutil
from dataclasses import fields, replace

import pytest
import torch
from tiny_models import untrained_checkpoint

from focuslib import cli
from focuslib.errors import UserError
from focuslib.evaluation.lmms import question
from focuslib.evaluation.settings import method_settings
from focuslib.experiments.cell import make_cell
from focuslib.experiments.runner import run_cells
from focuslib.experiments.single import median_index
from focuslib.experiments.store import claimed, collect, read_result, read_status
from focuslib.methods import METHODS
from focuslib.models import TinyOnevision
from focuslib.prefill.ops import SITES
from focuslib.report import notebook as report

COMMON = {
    "model": "tiny_onevision",
    "dataset": "tinyvideo_motion",
    "limit": 3,
    "device": "cpu",
    "dtype": "float32",
    "seed": 0,
}
SMALL = {"selected_layers": [1, 3, 5], "retention": [0.6, 0.4, 0.2], "vector_size": 16, "m_tile": 64}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(untrained_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def cells(checkpoint):
    make = lambda kind, method, **settings: make_cell(  # noqa: E731
        kind, method=method, checkpoint=checkpoint, settings=settings, **COMMON
    )
    return [make("accuracy", "dense"), make("accuracy", "focus", **SMALL), make("trace", "focus", **SMALL)]


@pytest.fixture(scope="module")
def answered(monkeypatch_module):
    """Counts the answers generated."""
    count = []
    original = TinyOnevision.generate_ids

    def counting(self, *args, **kwargs):
        count.append(1)
        return original(self, *args, **kwargs)

    monkeypatch_module.setattr(TinyOnevision, "generate_ids", counting)
    return count


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def tables(folder):
    report.write_tables(folder)
    return {path.name: path.read_bytes() for path in (*folder.glob("*.csv"), *folder.glob("focus_main/*.pth"))}


def test_interrupted_run_resumes_to_the_same_tables(cells, tmp_path, answered, monkeypatch):
    whole = run_cells("main", cells, tmp_path / "whole", tmp_path / "whole" / "focus_main")
    assert (whole.ran, len(whole.results), whole.failed) == (3, 3, {})
    assert len(answered) == 9
    expected = tables(tmp_path / "whole")

    folder = tmp_path / "broken"
    original, left = TinyOnevision.prepare, [5]

    def dies(self, *args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(self, *args)

    monkeypatch.setattr(TinyOnevision, "prepare", dies)
    with pytest.raises(KeyboardInterrupt):
        run_cells("main", cells, folder, folder / "focus_main")
    monkeypatch.setattr(TinyOnevision, "prepare", original)
    answered.clear()
    resumed = run_cells("main", cells, folder, folder / "focus_main")
    assert resumed.ran == 2
    assert len(answered) == 9 - 5
    assert tables(folder) == expected
    assert not list((folder / "work").iterdir())

    answered.clear()
    again = run_cells("main", cells, folder, folder / "focus_main")
    assert (again.ran, len(answered)) == (0, 0)
    assert "0 cells run, 3 resumed, 0 failed" in again.summary()


def test_written_trace_is_the_simulators(cells, tmp_path):
    outcome = run_cells("main", cells, tmp_path, tmp_path / "focus_main")
    trace = torch.load(tmp_path / "focus_main" / "tiny_onevision_tinyvideo_motion.pth", weights_only=True)
    assert {kind: value["q_proj"].dtype for kind, value in trace.items()} == {
        "mask_zero": torch.bool,
        "mask_similar": torch.bool,
        "group_idx": torch.int32,
    }
    vectors = {"q_proj": 8, "o_proj": 8, "query": 8, "gate_proj": 8, "down_proj": 16}
    for sites in trace.values():
        assert {site: tuple(tensor.shape) for site, tensor in sites.items()} == {
            site: (8, 1, 288, v) for site, v in vectors.items()
        }
    assert set(trace["mask_zero"]) == set(SITES)
    result = outcome.results[-1]
    sample = result.samples[result.median_index]
    for site in SITES:
        sparsity = (trace["mask_zero"][site] | trace["mask_similar"][site]).double().mean((1, 2, 3))
        assert sparsity.tolist() == pytest.approx(sample["site_sparsity"][site])


def test_tables_have_the_published_columns(cells, tmp_path):
    run_cells("main", cells, tmp_path, tmp_path / "focus_main")
    files = tables(tmp_path)
    header = lambda name: files[name].decode().splitlines()[0]  # noqa: E731
    assert header("accuracy.csv") == "Models,Dataset,Metric,Dense,FF,Adaptiv,CMC,Focus,INT8_Dense,INT8_Focus"
    assert header("meta_data.csv") == "Model,Dataset,Sequence length,Num frames,Num patches,Median index"
    row = files["meta_data.csv"].decode().splitlines()[1].split(",")
    assert row[:5] == ["tiny_onevision", "tinyvideo_motion", "288", "8", "36"]
    assert len(collect(tmp_path)) == 3
    provenance = collect(tmp_path)[0].provenance
    assert {"packages", "git", "device", "seconds"} <= set(provenance)


def test_a_failing_cell_does_not_stop_the_others(cells, tmp_path):
    missing = make_cell("accuracy", method="dense", checkpoint=str(tmp_path / "no"), **COMMON)
    outcome = run_cells("main", [missing, cells[0]], tmp_path)
    assert len(outcome.results) == 1
    (reason,) = outcome.failed.values()
    assert "no such folder" in reason and "\n" not in reason


def test_an_unreadable_video_is_one_recorded_failure_and_asked_again(cells, tmp_path, monkeypatch, answered):
    whole = run_cells("main", cells, tmp_path / "whole", tmp_path / "whole" / "focus_main")
    assert not any(result.failures for result in whole.results)
    expected = tables(tmp_path / "whole")

    original = TinyOnevision.prepare
    media, _ = question("tinyvideo_motion", "tiny_onevision", 2)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(b"\0\0\0\x18ftypmp42")
    lost = lambda self, path, prompt: original(self, str(cut) if path == media else path, prompt)  # noqa: E731
    monkeypatch.setattr(TinyOnevision, "prepare", lost)
    folder = tmp_path / "broken"
    for _ in range(2):  # the second run finds it no better
        answered.clear()
        outcome = run_cells("main", cells, folder, folder / "focus_main")
        assert [[failure["doc_id"] for failure in result.failures] for result in outcome.results] == [[2]] * 3
        assert outcome.summary().count("unreadable: ") == 3 and "cut.mp4" in outcome.summary()
        assert outcome.results[0].samples[2]["score"] == 0 and len(outcome.results[0].samples) == 3
        assert not read_status(folder, "main")["complete"]
    assert len(answered) == 0

    monkeypatch.setattr(TinyOnevision, "prepare", original)
    mended = run_cells("main", cells, folder, folder / "focus_main")
    assert len(answered) == 3 and not any(result.failures for result in mended.results)
    assert tables(folder) == expected
    assert not list((folder / "work").iterdir())


def test_what_a_method_cannot_take_is_asked_once(checkpoint, tmp_path, monkeypatch, answered):
    cell = make_cell("accuracy", method="framefusion", checkpoint=checkpoint, settings={"cost": 0.5}, **COMMON)
    original, media = TinyOnevision.prepare, question("tinyvideo_motion", "tiny_onevision", 2)[0]

    def prepare(self, path, prompt):
        inputs = original(self, path, prompt)
        if path == media:  # as one long frame
            grid = inputs.grid
            inputs.grid = replace(grid, num_frames=1, height=grid.length, width=1, height_stride=1)
        return inputs

    monkeypatch.setattr(TinyOnevision, "prepare", prepare)
    first = run_cells("main", [cell], tmp_path)
    assert "not possible" in first.summary() and "one frame" in first.summary()
    assert read_status(tmp_path, "main")["complete"] and not list((tmp_path / "work").iterdir())
    answered.clear()
    again = run_cells("main", [cell], tmp_path)
    assert (again.ran, len(answered)) == (0, 0) and again.results[0].failures == first.results[0].failures


def test_a_cell_is_run_by_one_process_at_a_time(cells, tmp_path):
    path = tmp_path / "cells" / f"{cells[0].name()}.json"
    with claimed(path):
        (reason,) = run_cells("main", cells[:1], tmp_path).failed.values()
    assert "another process is running it" in reason
    assert run_cells("main", cells[:1], tmp_path).ran == 1


def test_a_checkpoint_that_moved_keeps_its_results(cells, checkpoint, tmp_path):
    run_cells("main", cells[:1], tmp_path / "results")
    moved = replace(cells[0], checkpoint=str(shutil.copytree(checkpoint, tmp_path / "moved")))
    outcome = run_cells("main", [moved], tmp_path / "results")
    assert outcome.ran == 0 and outcome.result(moved).score == outcome.results[0].score


def test_without_git_there_is_a_result_all_the_same(cells, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run_cells("main", cells[:1], tmp_path).results[0].provenance["git"] is None


def test_the_commands(checkpoint, tmp_path, capsys):
    """focus run with a trace, and the trace exported, are one file."""
    chosen = [f"--set={name}={','.join(map(str, value)) if isinstance(value, list) else value}"
              for name, value in SMALL.items()]  # fmt: skip
    usual = [*RUN, "--checkpoint", checkpoint, "--limit", "2", "--out", str(tmp_path), "--dtype", "float32"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*usual, "--trace-dir", str(tmp_path / "traces"), *chosen])
    assert ended.value.code == 0 and "2 cells run, 0 resumed, 0 failed" in capsys.readouterr().out
    (native,) = (tmp_path / "cells").glob("*.trace")
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(native), str(tmp_path / "again.pth")])
    (written,) = (tmp_path / "traces").glob("*.pth")
    assert ended.value.code == 0 and written.read_bytes() == (tmp_path / "again.pth").read_bytes()


def test_every_hyper_parameter_is_listed(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "--list-settings"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    for method in METHODS.values():
        assert all(f"{field.name}={field.default}" in said for field in fields(method))


def test_a_result_names_everything_that_decides_it(cells, tmp_path):
    dense, focus, _ = cells
    assert len({cell.name() for cell in cells}) == 3
    settings = {**SMALL, "similarity_threshold": 0.8}
    other = make_cell("accuracy", method="focus", checkpoint=focus.checkpoint, settings=settings, **COMMON)
    assert other.name() != focus.name()
    run_cells("main", [dense], tmp_path)
    stored = read_result(tmp_path / "cells" / f"{dense.name()}.json")
    assert stored.cell == dense


def test_lower_median():
    assert median_index([3.0, 1.0, 2.0, 1.0]) == 1
    assert median_index([2.0, 1.0, 3.0]) == 0


def command(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code, capsys.readouterr().err.strip()


RUN = ("run", "--task", "tinyvideo_motion")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((*RUN, "--model", "tiny_onevison"), "unknown model 'tiny_onevison'; did you mean tiny_onevision?"),
        (("run", "--task", "tinyvideo_motoin"), "unknown dataset 'tinyvideo_motoin'; did you mean tinyvideo_motion?"),
        ((*RUN, "--method", "focsu"), "unknown method 'focsu'; did you mean focus?"),
        ((*RUN, "--set", "m_tiles=3"), "unknown setting of focus 'm_tiles'; did you mean m_tile?"),
        ((*RUN, "--set", "m_tile=big"), "focus: m_tile='big' is not int"),
        ((*RUN, "--set", "retention=.5"), "selected_layers has 5 entries and retention 1"),
        ((*RUN, "--set", "similarity_threshold=-1"), "similarity_threshold -1.0 must be a number from 0"),
        ((*RUN, "--set", "m_tile"), "--set m_tile: write NAME=VALUE"),
        ((*RUN, "--set", "m_tile=inf"), "focus: m_tile='inf' is not int"),
        ((*RUN, "--set", "similarity_threshold=nan"), "similarity_threshold nan must be a number from 0"),
        ((*RUN, "--method", "cmc", "--trace-dir", "x"), "--trace-dir: cmc has no traces"),
        (("lmms-eval", "--model", "focuslib", "--model_args", "model=tiny_onevison"), "unknown model 'tiny_onevison'"),
        (("lmms-eval", "--model=focuslib", "--model_args=method=focus,m_tiles=3"), "unknown setting of focus"),
        (("reproduce", "--only", "mian"), "unknown notebook 'mian'; one of main, baselines"),
        (("reproduce", "--profile", "desktop"), "no such parameter file"),
    ],
)
def test_a_users_mistake_is_one_line(capsys, arguments, line):
    status, error = command(capsys, *arguments)
    assert status == 1
    assert line in error and "\n" not in error and error.startswith("focus: ")


def test_a_checkpoint_that_is_missing_fails_the_run(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        cli.main([*RUN, "--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path)])
    assert ended.value.code == 1
    assert "no such folder" in capsys.readouterr().out


def test_batches_are_refused():
    from focuslib.evaluation.lmms import FocusLmms

    with pytest.raises(UserError, match="batch_size is 4"):
        FocusLmms(batch_size=4)


def test_yaml_typo_is_one_line(tmp_path):
    from focuslib.experiments.params import read_params

    bad = tmp_path / "main.yaml"
    for text, line in [
        ("modles: [tiny]", "unknown parameter 'modles'; did you mean models?"),
        ("limit: ten", "limit is 'ten'; it must be int or null"),
        ("limit: 0", "limit is 0; it must be at least 1"),
        ("models: [tiny_onevision]", "datasets is missing"),
        ("models: [tiny", "line 1: not valid YAML"),
        ("just words", "must hold names and values"),
    ]:
        bad.write_text(text)
        with pytest.raises(UserError, match=r"main\.yaml") as error:
            read_params(bad)
        assert line in str(error.value)


def test_a_typo_in_the_methods_file_is_one_line(tmp_path):
    bad = tmp_path / "methods.yaml"
    for text, line in [
        ("focsu: [{m_tile: 3}]", "unknown method 'focsu'; did you mean focus?"),
        ("focus: [{models: [llava_vdi], m_tile: 3}]", "unknown model 'llava_vdi'; did you mean llava_vid?"),
        ("focus: [{datasets: [videome], m_tile: 3}]", "unknown dataset 'videome'; did you mean videomme?"),
        ("focus: [{models: llava_vid, m_tile: 3}]", "models is 'llava_vid'; it must be a list"),
    ]:
        bad.write_text(text)
        with pytest.raises(UserError, match=r"methods\.yaml") as error:
            method_settings("focus", "llava_vid", "videomme", bad)
        assert line in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("device", "cdua"), ("dtype", "float31")])
def test_an_unknown_device_or_type_fails_the_cell_in_one_line(cells, tmp_path, name, value):
    (reason,) = run_cells("main", [replace(cells[0], **{name: value})], tmp_path).failed.values()
    assert f"unknown {name} '{value}'" in reason


def test_a_place_where_nothing_can_be_written_fails_the_cells(cells, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOCUS_CACHE", str(tmp_path / "file"))
    (reason,) = run_cells("main", cells[:1], tmp_path).failed.values()
    assert "its data could not be made" in reason


def test_a_cut_journal_line_is_dropped(tmp_path):
    from focuslib.evaluation.journal import Journal

    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.add("a", {"answer": "A"})
    journal.close()
    path.write_bytes(path.read_bytes() + b'{"key": "b", "ans')
    journal = Journal(path)
    assert set(journal.entries) == {"a"}
    journal.add("c", {"answer": "C"})
    journal.close()
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "c"]
