"""All five experiments on two questions of the untrained model: every file and column of the simulator's contract."""

from dataclasses import asdict, replace

import nbformat
import pandas as pd
import pytest
import torch
from tiny_models import untrained_checkpoint, untrained_vlm

from focuslib.errors import UserError
from focuslib.evaluation.lmms import question
from focuslib.experiments import paper as experiments
from focuslib.experiments.cell import make_cell
from focuslib.experiments.params import experiment_params, read_params
from focuslib.experiments.runner import load_cell
from focuslib.experiments.store import Outcome
from focuslib.experiments.verify import compare_folder, compare_tables, expected_tables
from focuslib.files import write_json
from focuslib.methods import Focus
from focuslib.models.quantize import linear_layers
from focuslib.paths import project_root
from focuslib.prefill.ops import SITES, concentrated_operations
from focuslib.prefill.trace import Trace
from focuslib.report import dse as report_dse
from focuslib.report import int8 as report_int8
from focuslib.report import notebook as report
from focuslib.report.html import write_report

VIDEO = ["tinyvideo_attributes", "tinyvideo_motion"]
SWEEPS = {
    "m_tile_size": {"dataset": "tinyvideo_motion", "values": [-1, 128, 4096]},
    "vector_size": {"dataset": "tinyvideo_attributes", "values": [16, 64]},
    "block_size": {"dataset": "tinyvideo_motion", "values": ["1x1x1", "2x2x2"]},
}
# SPEC 5: table → columns
TABLES = {
    "accuracy": "Models,Dataset,Metric,Dense,FF,Adaptiv,CMC,Focus,INT8_Dense,INT8_Focus",
    "meta_data": "Model,Dataset,Sequence length,Num frames,Num patches,Median index",
    "adaptiv_sparsity": "Model,Dataset,Sparsity",
    "cmc_sparsity": "Model,Dataset,linear_sparsity,query_sparsity,attn_score_sparsity",
    "dse_a_m_tile_accuracy": "m_tile_size,block_size,vector_size,accuracy",
    "dse_b_vector_accuracy": "m_tile_size,block_size,vector_size,accuracy",
    "dse_c_block_accuracy": "m_tile_size,block_size,vector_size,accuracy",
}
TRACES = [
    *(f"{folder}/tiny_onevision_{dataset}" for folder in ("focus_main", "focus_int8") for dataset in VIDEO),
    "focus_main/tiny_onevision_tinyimage_attributes",
    *(
        f"{sweep}_dse/tiny_onevision_{what['dataset']}_{value}"
        for sweep, what in SWEEPS.items()
        for value in what["values"]
    ),
]


def changes(name: str, checkpoint: str) -> dict:
    """What replaces the laptop's parameters."""
    params = {"checkpoints": {"tiny_onevision": checkpoint}, "limit": 2, "trace_samples": 2, "workers": 1}
    if name != "image":
        params["datasets"] = VIDEO
    if name == "dse":
        params |= {"sweeps": SWEEPS, "ablation_limit": 2}
    if name == "baselines":
        params |= {"datasets": VIDEO[:1], "matched": None}
    return params


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """experiment → its outcome, and the results folder."""
    folder = tmp_path_factory.mktemp("results")
    checkpoint = str(untrained_checkpoint(tmp_path_factory.mktemp("checkpoint")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "results_folder", lambda name: folder)
        outcomes = {
            name: experiments.run(name, "laptop", changes(name, checkpoint))
            for name in ("main", "baselines", "dse", "int8", "image")
        }
    assert not any(outcome.failed for outcome in outcomes.values())
    report.write_tables(folder)
    points = experiments.sweep_points(experiment_params("dse", "laptop", changes("dse", checkpoint)))
    report_dse.write_dse_tables(outcomes["dse"], points)
    return folder, outcomes, points


@pytest.mark.parametrize("name", TABLES)
def test_every_table_of_the_contract(done, name):
    assert (done[0] / f"{name}.csv").read_text().splitlines()[0] == TABLES[name]


@pytest.mark.parametrize("name", TRACES)
def test_every_trace_of_the_contract(done, name):
    trace = torch.load(done[0] / f"{name}.pth", weights_only=True)
    kinds = {"mask_zero": torch.bool, "mask_similar": torch.bool, "group_idx": torch.int32}
    assert {kind: value["query"].dtype for kind, value in trace.items()} == kinds
    tokens = 300 if "image" in name else 288
    for sites in trace.values():
        assert set(sites) == set(SITES)
        for tensor in sites.values():
            assert tensor.shape[:3] == (8, 1, tokens)


def test_no_other_traces(done):
    assert {str(path.relative_to(done[0]))[:-4] for path in done[0].rglob("*.pth")} == set(TRACES)


def test_one_row_for_each_pair(done):
    table = pd.read_csv(done[0] / "accuracy.csv")
    assert sorted(table["Dataset"]) == ["tinyimage_attributes", *VIDEO]
    assert table.set_index("Dataset").loc[VIDEO[0]].notna().all()  # all methods ran there
    assert sorted(pd.read_csv(done[0] / "meta_data.csv")["Dataset"]) == ["tinyimage_attributes", *VIDEO]
    assert sorted(pd.read_csv(done[0] / "adaptiv_sparsity.csv")["Dataset"]) == ["tinyimage_attributes", VIDEO[0]]
    sweep = pd.read_csv(done[0] / "dse_c_block_accuracy.csv")
    assert list(sweep["block_size"]) == ["1x1x1", "2x2x2"]


def test_the_default_point_is_the_main_run(done):
    _, outcomes, points = done
    shared = report_dse.shared_with_main(outcomes["dse"], points, outcomes["main"].results)
    assert set(zip(shared["Sweep"], shared["Value"], strict=True)) == {
        ("m_tile_size", "128"), ("vector_size", "16"), ("block_size", "2x2x2"),
    }  # fmt: skip
    assert (shared["Same answer"] == shared["Questions"]).all() and (
        shared["Same sparsity"] == shared["Questions"]
    ).all()
    assert (shared["Questions"] == 2).all()
    assert outcomes["dse"].result(points[1].accuracy) == outcomes["main"].result(points[1].accuracy)
    one = (done[0] / "m_tile_size_dse" / "tiny_onevision_tinyvideo_motion_128.pth").read_bytes()
    assert one == (done[0] / "focus_main" / "tiny_onevision_tinyvideo_motion.pth").read_bytes()


def test_one_tile_is_a_tile_larger_than_the_sequence(done):
    folder = done[0] / "m_tile_size_dse"
    one, large = ((folder / f"tiny_onevision_tinyvideo_motion_{m}.pth").read_bytes() for m in (-1, 4096))
    assert one == large


def test_without_sic_is_a_threshold_beyond_one():
    vlm = untrained_vlm()
    media, prompt = question("tinyvideo_motion", vlm.name, 0)
    settings = {"selected_layers": (2, 4, 6), "retention": (0.4, 0.2, 0.1), "vector_size": 16, "m_tile": 64}
    logits, records = [], []
    for method in (Focus(**settings, sec_only=True), Focus(**settings, similarity_threshold=1.1)):
        with method(vlm) as run:
            logits.append(vlm.prefill(vlm.prepare(media, prompt)))
            records.append(run.last)
    assert torch.equal(*logits)
    assert records[0].retained == records[1].retained
    assert all(torch.equal(records[0].kept[layer], records[1].kept[layer]) for layer in (2, 4, 6))
    assert records[0].counts == records[1].counts
    # the published count of SEC only takes the tokens that enter a layer for its MLP as well
    one, other = (concentrated_operations(r.shape, r.counts, sec_only=True) for r in records)
    assert one == other >= concentrated_operations(records[1].shape, records[1].counts)


def test_the_ablation_compares_the_same_questions(done):
    table = pd.read_csv(done[0] / "ablation.csv")
    assert list(table["Method"]) == ["dense", "focus, SEC only", "focus"] * len(VIDEO)
    left = table.set_index(["Dataset", "Method"])["Operations left (%)"]
    for dataset in VIDEO:
        assert left[dataset, "focus"] <= left[dataset, "focus, SEC only"] < left[dataset, "dense"] == 100


def test_quantised_modules_are_8_bit(done):
    _, outcomes, _ = done
    cells = [result.cell for result in outcomes["int8"].results]
    plain, quantised = (next(c for c in cells if c.quantization == precision) for precision in (None, "int8"))
    assert plain.name() != quantised.name()
    whole = report_int8.precision_table(outcomes["int8"].results)
    table = whole[whole["Part"] == "language model"].reset_index(drop=True)
    assert list(table["in 8 bit"]) == [0, 56] and list(table["weight type"]) == ["float32", "int8"]
    assert table["weights (MiB)"][1] * 4 == table["weights (MiB)"][0]
    in_8_bit = whole[whole["Precision"] == "int8"].set_index("Part")
    assert set(in_8_bit.index) == {"language model", "vision_tower", "multi_modal_projector", "output head"}
    all_but_the_head = in_8_bit.drop("output head")  # published: load_in_8bit without exceptions
    assert (all_but_the_head["in 8 bit"] == all_but_the_head["linear layers"]).all()
    assert in_8_bit.loc["output head", "weight type"] == "float32"
    vlm = load_cell(quantised)
    assert linear_layers(vlm.model)["language model"]["in 8 bit"] == 56
    assert vlm.model.lm_head.weight.dtype == torch.float32
    alone = load_cell(replace(quantised, quantization="int8_llm"))
    assert not any(p.dtype == torch.int8 for p in alone.model.model.vision_tower.parameters())
    assert linear_layers(alone.model)["language model"]["in 8 bit"] == 56
    media, prompt = question("tinyvideo_motion", vlm.name, 0)
    with Focus(selected_layers=(2,), retention=(0.5,), vector_size=16, m_tile=64)(vlm, trace=True) as run:
        vlm.prefill(vlm.prepare(media, prompt))
    assert run.last.retained[-1] == 144 and run.trace.num_layers == 8  # the hooks fire on 8-bit modules


def test_int8_traces_are_of_the_main_samples(done):
    traces = [r for r in done[1]["int8"].results if r.cell.kind == "trace"]
    medians = {r.cell.dataset: r.median_index for r in traces if not r.cell.quantization}
    assert {r.cell.dataset: r.median_index for r in traces if r.cell.quantization} == medians
    table = report_int8.degradation_table(done[1]["int8"].results)
    assert len(table) == 2 * len(VIDEO) and {"Change", "Change ±", "Sparsity change"} <= set(table)


def test_the_native_trace_is_a_twentieth_of_the_simulators(done):
    result = next(r for r in done[1]["main"].results if r.cell.kind == "trace")
    native = done[0] / "cells" / result.trace
    written = done[0] / "focus_main" / f"tiny_onevision_{result.cell.dataset}.pth"
    assert native.stat().st_size * 20 <= written.stat().st_size
    trace, exported = Trace.load(native).to_dict(), torch.load(written, weights_only=True)
    assert all(torch.equal(trace[kind][site], exported[kind][site]) for kind in trace for site in SITES)


def test_an_image_is_the_picture_and_its_tiles():
    vlm = untrained_vlm()
    media, _ = question("tinyimage_attributes", vlm.name, 0)
    grid = vlm.prepare(media, "What is it?").grid
    assert media.size == (96, 96)
    assert (grid.length, grid.width, grid.height_stride) == (12 * 12 + 12 * 13, 13, 13)


def test_verify_sees_differences(done, tmp_path):
    folder = done[0]
    expected = expected_tables(folder)
    assert compare_folder(expected, folder) == []
    for path in folder.glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    accuracy = pd.read_csv(tmp_path / "accuracy.csv")
    accuracy.loc[0, "Dense"] += 1.9
    accuracy.to_csv(tmp_path / "accuracy.csv", index=False)
    assert compare_folder(expected, tmp_path) == []
    accuracy.loc[0, "Dense"] += 0.2
    accuracy.to_csv(tmp_path / "accuracy.csv", index=False)
    (tmp_path / "meta_data.csv").unlink()
    lines = compare_folder(expected, tmp_path)
    assert len(lines) == 2 and "Dense is" in lines[0] and lines[1].startswith("meta_data.csv: missing")
    assert "row" in compare_tables(accuracy, accuracy[1:], "accuracy.csv")[0]
    assert "columns" in compare_tables(accuracy, accuracy.rename(columns={"FF": "F"}), "accuracy.csv")[0]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no expected tables"):
        expected_tables(tmp_path / "none")


def test_the_committed_tables_can_be_compared():
    """Every row is told apart from the others, in all tables that a profile commits."""
    folder = experiments.expected_folder("laptop")
    expected = expected_tables(folder)
    assert {"accuracy.csv", "curves.csv", "methods.csv"} <= expected.keys()
    assert compare_folder(expected, folder) == []
    worse = expected["methods.csv"].copy()
    worse.loc[5, "Right"] -= 6
    (line,) = compare_tables(expected["methods.csv"], worse, "methods.csv")
    assert line.startswith("methods.csv: tiny_onevision") and "Right is" in line


def test_the_latest_settings_win(tmp_path):
    common = {"model": "tiny_onevision", "dataset": VIDEO[1], "method": "focus", "device": "cpu", "dtype": "float32"}
    (tmp_path / "cells").mkdir()

    def ran(experiment: str, when: float, score: float, limit: int, **settings) -> None:
        cell = make_cell("accuracy", settings={"vector_size": 16, **settings}, limit=limit, seed=0, **common)
        sample = {
            "task": "t", "score": score / 100, "computation_sparsity": 0.5, "retained": [1], "visual_tokens": 2,
        }  # fmt: skip
        samples = [{**sample, "doc_id": number} for number in range(limit)]
        result = {"score": score, "samples": samples, "failures": [], "provenance": {}}
        name = f"{experiment}_{limit}.json"
        write_json(tmp_path / "cells" / name, {"cell": asdict(cell), **result})
        index = {"cells": [name], "complete": True, "text": "", "time": when}
        write_json(tmp_path / "cells" / f"{experiment}.index", index)

    ran("baselines", 1.0, 10.0, 9, similarity_threshold=0.8)
    ran("main", 2.0, 90.0, 3, similarity_threshold=0.9)
    ran("int8", 3.0, 80.0, 2, similarity_threshold=0.9)
    report.write_tables(tmp_path)
    assert pd.read_csv(tmp_path / "accuracy.csv")["Focus"].tolist() == [90.0]


def test_tables_and_figures_of_nothing(tmp_path):
    """Notebooks whose cells all failed still say why."""
    nothing: list = []
    for table in (
        report.comparison_table(nothing), report.average_table(report.comparison_table(nothing)),
        report.beside_published(nothing), report.layout_of_table_two(nothing), report.paired_table(nothing),
        report.sparsity_table(nothing, "cmc", {}), report.meta_data_table(nothing), report.cost_table(nothing),
        report_int8.degradation_table(nothing), report_int8.precision_table(nothing),
        report_dse.ablation_table(nothing), report_dse.shared_with_main(Outcome(tmp_path), [], nothing),
        report_dse.sweep_table(Outcome(tmp_path), [], "m_tile_size"),
    ):  # fmt: skip
        assert table.empty
        report.show(table)
    for figure in (
        report.site_sparsity_figure(nothing), report.retained_figure(nothing), report.trade_off_figure(nothing),
        report.example_clip(Outcome(tmp_path)), report.example_view(Outcome(tmp_path)),
        report_dse.sweep_figure(table, "m_tile_size"),
    ):  # fmt: skip
        assert figure is None


def test_the_report_is_one_page_without_a_network(done, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Main\n\ntext")])
    nbformat.write(notebook, tmp_path / "main.ipynb")
    page = write_report(tmp_path).read_text()
    assert "Main" in page and 'src="http' not in page and 'href="http' not in page


def test_wrong_sweeps_are_one_line():
    for sweeps, line in (
        ({"m_tiles": SWEEPS["m_tile_size"]}, "unknown sweep 'm_tiles'; did you mean m_tile_size"),
        ({"block_size": {"dataset": VIDEO[0], "values": ["2x3"]}}, "block size '2x3': write frames x side x side"),
        ({"m_tile_size": {"values": [1]}}, "m_tile_size must hold dataset and values"),
    ):
        with pytest.raises(UserError, match=line):
            experiments.plan("dse", "laptop", {"sweeps": sweeps})


def test_matched_settings_can_differ_by_data_set():
    params = read_params(project_root() / "params" / "laptop" / "baselines.yaml")
    entries = [{"threshold": 0.5}, {"datasets": VIDEO[1:], "threshold": 0.25}]
    chosen = experiments.comparison_cells({**params, "datasets": VIDEO, "matched": {"adaptiv": entries}})
    assert [cell.settings["threshold"] for cell in chosen if cell.kind == "matched"] == [0.5, 0.25]
    with pytest.raises(UserError, match="must be a list of entries"):
        experiments.comparison_cells({**params, "matched": {"adaptiv": {"threshold": 0.5}}})


def test_a_report_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="no executed notebooks"):
        write_report(tmp_path)
