"""Cells, resuming, tables and the command line, on the untrained model and a few questions of the real benchmark."""

import json

import pytest
import torch
from tiny_models import untrained_checkpoint

from focuslib import cli, report
from focuslib.cells import collect, make_cell, median_index, read_result, read_status, run_cells
from focuslib.errors import UserError
from focuslib.evaluate import question
from focuslib.models import TinyOnevision
from focuslib.ops import SITES

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
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.csv"))}


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
        ((*RUN, "--set", "similarity_threshold=-1"), "similarity_threshold -1.0 must not be negative"),
        ((*RUN, "--set", "m_tile"), "--set m_tile: write NAME=VALUE"),
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
    from focuslib.evaluate import FocusLmms

    with pytest.raises(UserError, match="batch_size is 4"):
        FocusLmms(batch_size=4)


def test_yaml_typo_is_one_line(tmp_path):
    from focuslib.params import read_params

    bad = tmp_path / "main.yaml"
    for text, line in [
        ("modles: [tiny]", "unknown parameter 'modles'; did you mean models?"),
        ("limit: ten", "limit is 'ten'; it must be int or null"),
        ("models: [tiny", "line 1: not valid YAML"),
        ("just words", "must hold names and values"),
    ]:
        bad.write_text(text)
        with pytest.raises(UserError, match=r"main\.yaml") as error:
            read_params(bad)
        assert line in str(error.value)


def test_a_cut_journal_line_is_dropped(tmp_path):
    from focuslib.journal import Journal

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
