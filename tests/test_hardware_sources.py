"""Where the hardware models take their counts from: equal numbers by every way in, and bad input in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
from focuslib.hardware import QWEN2_7B, hardware_table, run_hardware, sample_cost
from focuslib.hardware.focus import focus_cost
from focuslib.hardware.paper import speedups
from focuslib.hardware.reproduction import reproduce_hardware
from focuslib.hardware.samples import mean_estimate, record_cost
from focuslib.hardware.shapes import shape_of
from focuslib.hardware.sources import read_source
from focuslib.hardware.study import product_table
from focuslib.hardware.sweeps import published_sweep, sweep_table
from focuslib.hardware.traces import read_counts
from focuslib.kernels.similarity import ITSELF, ZERO, num_vectors
from focuslib.prefill.ops import SITES, DecoderShape
from focuslib.prefill.record import PrefillRecord
from focuslib.prefill.trace import Trace
from focuslib.report import hardware as figures

PUBLISHED = Path(__file__).parents[1] / "params" / "published" / "hardware"
GOLDEN = Path(__file__).parent / "golden" / "hardware" / "llava_vid_videomme"
SHAPE = DecoderShape(layers=3, hidden=64, mlp=104, heads=4, kv_heads=2, head_dim=16)
TOKENS, FRAMES, VECTOR = 48, 4, 8
SHAPES = {"small": SHAPE}


def small_trace(seed: int = 0) -> Trace:
    """A trace with zero, similar and own vectors, whole tokens pruned after the second layer's attention."""
    generator = torch.Generator().manual_seed(seed)
    codes = {}
    for site in SITES:
        vectors = num_vectors(SHAPE.site_channels(site), VECTOR)
        layers = torch.randint(0, 4, (SHAPE.layers, TOKENS, vectors), generator=generator).to(torch.uint8)
        layers[layers == 3] = ZERO
        layers[:, 0][layers[:, 0] != ZERO] = ITSELF  # token 0 has no candidate before it
        layers[:, :13] = torch.where(layers[:, :13] == ZERO, ZERO, ITSELF).to(torch.uint8)
        layers[1 if site in ("gate_proj", "down_proj") else 2 :, ::3] = ZERO
        codes[site] = layers
    return Trace(VisualGrid(5, TOKENS, FRAMES, 3, 4, 12, 4), codes, 2, 2)


@pytest.fixture
def folder(tmp_path):
    """A results folder of one model and data set, with its .pth."""
    row = {"Model": "small", "Dataset": "clips"}
    tables = {
        "meta_data": {"Sequence length": TOKENS, "Num frames": FRAMES, "Num patches": 12, "Median index": 0},
        "adaptiv_sparsity": {"Sparsity": 0.4},
        "cmc_sparsity": {"linear_sparsity": 0.4, "query_sparsity": 0.3, "attn_score_sparsity": 0.2},
    }
    for name, values in tables.items():
        pd.DataFrame([row | values]).to_csv(tmp_path / f"{name}.csv", index=False)
    small_trace().save_pth(tmp_path / "focus_main" / "small_clips.pth")
    return tmp_path


def table(source, *args, **options) -> pd.DataFrame:
    return hardware_table(source, *args, shapes=SHAPES, **options)


def test_native_and_pth_give_the_same_numbers(folder):
    trace = small_trace()
    trace.save(folder / "small_clips.trace")
    native, pth = (
        read_counts(folder / "small_clips.trace")[0],
        read_counts(folder / "focus_main" / "small_clips.pth")[0],
    )
    assert native == pth
    for layer, site in ((0, "query"), (2, "down_proj")):
        codes = trace.codes[site][layer]
        found = native.layers[layer][site]
        assert found.zero == int((codes == ZERO).sum()) and found.similar == int(((codes > 0) & (codes < ZERO)).sum())
        assert found.empty_tokens == int((codes == ZERO).all(1).sum())
    names = ["focus", "focus_sec_only", "dense"]
    whole = table(folder, names)
    for path in (folder / "small_clips.trace", folder / "focus_main" / "small_clips.pth"):
        pd.testing.assert_frame_equal(table(path, names), whole)


def test_a_folder_of_native_traces(folder):
    """cells/main.index names the trace; its cell is preferred to the .pth."""
    shutil.rmtree(folder / "focus_main")
    assert "focus" not in set(table(folder)["accelerator"])
    cells = folder / "cells"
    small_trace().save(cells / "trace_a.trace")
    cell = {"model": "small", "dataset": "clips", "checkpoint": None}
    (cells / "trace_a.json").write_text(json.dumps({"cell": cell, "trace": "trace_a.trace"}))
    (cells / "main.index").write_text(json.dumps({"cells": ["trace_a.json", "accuracy_b.json"]}))
    found = table(folder)
    assert list(found["accelerator"]) == ["dense", "adaptiv", "cmc", "focus", "focus_sec_only"]
    assert list(table(cells / "trace_a.trace")["dataset"].unique()) == ["clips"]


def test_sweeps_need_no_buffer_tables(folder):
    swept = table(folder, ["focus"], m_tile=[-1, 16, 1024], vector_size=[8, 32], scatter=[1, 2])
    assert len(swept) == 12
    known = swept[swept["total_energy"].notna()]
    assert known[["m_tile_size", "vector_size", "num_scatter"]].to_numpy().tolist() == [[1024, 32, 2]]
    assert swept["dram_energy"].notna().all() and swept["core_energy"].notna().all()


def test_a_sweep_is_written_to_its_own_file(folder):
    run_hardware(folder, folder / "out", accelerators=["focus"], m_tile=[-1, 16], shapes=SHAPES)
    written = pd.read_csv(folder / "out" / "dse_a_m_tile_size.csv")
    assert written["m_tile_size"].tolist() == [-1, 16] and "vector_size" not in written
    run_hardware(folder, folder / "both", accelerators=["focus"], m_tile=[-1, 16], scatter=[1, 2], shapes=SHAPES)
    assert list(pd.read_csv(folder / "both" / "main_focus.csv"))[-2:] == ["m_tile_size", "num_scatter"]


def test_the_corrected_bytes_stand_beside(folder):
    published, corrected = (table(folder, ["focus", "dense"], corrected=value) for value in (False, True))
    assert (
        published["corrected_dram_access"][0] == corrected["total_dram_access"][0] > published["total_dram_access"][0]
    )
    assert published["total_dram_access"][1] == corrected["total_dram_access"][1]


def test_the_study_in_one_call(folder):
    done = reproduce_hardware(folder, PUBLISHED, shapes=SHAPES)
    assert not done.missing and set(done.ours["basis"]) == {"ours"}
    assert set(done.all_rows()["basis"]) == {"ours", "published", "recomputed here"}
    assert (folder / "hardware" / "main_focus.csv").is_file()
    rows = done.all_rows()
    for draw in (figures.speedup_figure, figures.ablation_figure, figures.traffic_figure):
        plt.close(draw(rows))
    for draw in (figures.utilisation_figure, figures.time_figure, figures.roofline_figure):
        plt.close(draw(done.products))
    assert "0.4 to 18.8 %" in figures.defect_text(done.defect) and "this profile" in figures.defect_text(done.defect)
    shutil.rmtree(folder / "focus_main")
    done = reproduce_hardware(folder, PUBLISHED, shapes=SHAPES)
    assert [line.split(" left out")[0] for line in done.missing] == ["focus", "focus_sec_only"]
    assert figures.time_figure(done.products) is None
    plt.close(figures.speedup_figure(done.all_rows()))
    done = reproduce_hardware(folder / "none", PUBLISHED)
    assert done.ours.empty and "no meta_data.csv" in done.missing[0]


def test_a_run_of_the_papers_own_cells_stands_beside_them():
    """Rows of the same model and data set, with another baseline each."""
    paper = reproduce_hardware(PUBLISHED / "none", PUBLISHED).videos
    ours = paper.assign(basis="ours", execution_time=paper["execution_time"] * paper["accelerator"].map(len))
    rows = pd.concat([paper, ours], ignore_index=True)
    gains = speedups(rows)["speed-up"].to_numpy()
    assert gains[: len(paper)] == pytest.approx(speedups(paper)["speed-up"].to_numpy(), nan_ok=True)
    assert gains[len(paper) :] == pytest.approx(speedups(ours)["speed-up"].to_numpy(), nan_ok=True)
    for draw in (figures.speedup_figure, figures.ablation_figure, figures.traffic_figure):
        plt.close(draw(rows))


def test_sweep_folder(folder):
    assert sweep_table(folder, "m_tile_size").empty
    settings = [
        {"m_tile_size": size, "block_size": "2x2x2", "vector_size": 8, "accuracy": 70 + size} for size in (16, -1)
    ]
    pd.DataFrame(settings).to_csv(folder / "dse_a_m_tile_accuracy.csv", index=False)
    for size in (16, -1):
        small_trace().save_pth(folder / "m_tile_size_dse" / f"small_clips_{size}.pth")
    found = sweep_table(folder, "m_tile_size", SHAPES)
    assert found[["value", "accuracy", "dataset"]].to_numpy().tolist() == [["16", 86, "clips"], ["-1", 69, "clips"]]
    assert found["total_cycles"].iloc[0] > 0
    for sweep in ("m_tile_size", "vector_size", "block_size", "num_scatter"):
        assert published_sweep(PUBLISHED, sweep)["total_cycles"].notna().all()


def test_written_csvs_need_no_trace(folder):
    shutil.rmtree(folder / "focus_main")
    run_hardware(folder, folder / "out", shapes=SHAPES)
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "main_adaptiv.csv",
        "main_cmc.csv",
        "main_dense.csv",
    ]


def change(path: Path, column: str, value) -> None:
    content = pd.read_csv(path)
    content[column] = value
    content.to_csv(path, index=False)


def empty(path: Path) -> None:
    pd.read_csv(path).iloc[:0].to_csv(path, index=False)


BAD = [
    (lambda f: change(f / "meta_data.csv", "Sequence length", 50), None, "48 visual tokens, but meta_data.csv says 50"),
    (lambda f: change(f / "meta_data.csv", "Sequence length", 4.5), None, "not a positive whole number"),
    (lambda f: change(f / "meta_data.csv", "Sequence length", "many"), None, "not a positive whole number"),
    (lambda f: (f / "meta_data.csv").unlink(), None, "meta_data.csv: missing"),
    (lambda f: (f / "meta_data.csv").write_bytes(b"\xff\xfe\x00"), None, "meta_data.csv"),
    (lambda f: change(f / "meta_data.csv", "Model", "other"), None, "other: its decoder is unknown"),
    (lambda f: change(f / "meta_data.csv", "Dataset", "more"), None, "no row of small × more"),
    (lambda f: empty(f / "meta_data.csv"), None, "meta_data.csv has no row"),
    (lambda f: empty(f / "adaptiv_sparsity.csv"), None, "adaptiv_sparsity.csv: no row of small × clips"),
    (lambda f: empty(f / "cmc_sparsity.csv"), None, "cmc_sparsity.csv: no row of small × clips"),
    (lambda f: change(f / "cmc_sparsity.csv", "query_sparsity", 1.2), None, "not in 0 … 1"),
    (lambda f: change(f / "adaptiv_sparsity.csv", "Sparsity", None), None, "not in 0 … 1"),
    (lambda f: (f / "adaptiv_sparsity.csv").write_text("Model,Dataset\n"), None, "no column Sparsity"),
    (lambda f: (f / "adaptiv_sparsity.csv").unlink(), ["adaptiv"], "small × clips: no row in adaptiv_sparsity.csv"),
    (lambda f: (f / "cmc_sparsity.csv").unlink(), ["cmc"], "no row in cmc_sparsity.csv"),
    (lambda f: shutil.rmtree(f / "focus_main"), ["focus"], "small × clips: no trace"),
    (lambda f: shutil.rmtree(f / "focus_main"), ["focus_sec_only"], "neither a trace nor a schedule"),
    (lambda f: None, ["focuss"], "did you mean focus"),
    (lambda f: (f / "focus_main" / "small_clips.pth").write_bytes(b"PK"), None, "not the .pth of a trace"),
    (lambda f: torch.save({"a": 1}, f / "focus_main" / "small_clips.pth"), None, "not the .pth of a trace"),
    (lambda f: torch.save([1], f / "focus_main" / "small_clips.pth"), None, "not the .pth of a trace"),
    (lambda f: shutil.copy(f / "focus_main" / "small_clips.pth", f / "focus_main" / "x_y.pth"), None, "x_y.pth"),
]


@pytest.mark.parametrize(("spoil", "accelerators", "message"), BAD)
def test_bad_folders_are_named_in_one_line(folder, spoil, accelerators, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        table(folder, accelerators)
    assert "\n" not in str(error.value)


def spoiled_pth(path: Path, kind: str, site: str, change) -> None:
    content = torch.load(path, weights_only=True)
    content[kind][site] = change(content[kind][site])
    torch.save(content, path)


@pytest.mark.parametrize(
    ("kind", "site", "spoil", "message"),
    [
        ("mask_zero", "query", lambda mask: mask.int(), "not the .pth of a trace"),
        ("mask_zero", "query", lambda mask: mask[:, 0], "not the .pth of a trace"),
        ("mask_zero", "query", lambda mask: mask[:, :, :0], "not the .pth of a trace"),
        ("mask_similar", "o_proj", lambda mask: mask[..., :-1], "other shapes"),
        ("mask_similar", "o_proj", lambda mask: mask[:-1], "other shapes"),
        ("mask_zero", "o_proj", lambda mask: mask[:-1], "other numbers of layers"),
    ],
)
def test_bad_pth_are_named_in_one_line(folder, kind, site, spoil, message):
    spoiled_pth(folder / "focus_main" / "small_clips.pth", kind, site, spoil)
    with pytest.raises(UserError, match=message) as error:
        table(folder)
    assert "\n" not in str(error.value)


def test_a_trace_of_another_decoder(folder):
    path = folder / "focus_main" / "small_clips.pth"
    for shape, message in (
        (DecoderShape(4, 64, 104, 4, 2, 16), "3 layers; the model's decoder has 4"),
        (DecoderShape(3, 64, 300, 4, 2, 16), "vectors a token"),
        (QWEN2_7B, "3 layers"),
    ):
        with pytest.raises(UserError, match=message):
            hardware_table(path, shapes={"small": shape})
    with pytest.raises(UserError, match="name the model"):
        hardware_table(path)
    with pytest.raises(UserError, match="no such file or folder"):
        hardware_table(folder / "none.pth")
    with pytest.raises(UserError, match="not a trace"):
        hardware_table(folder / "meta_data.csv")
    with pytest.raises(UserError, match="m tile 0: it must be at least 1"):
        table(folder, m_tile=0)


def test_bad_counts_and_schedules(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "case")
    path = tmp_path / "case" / "counts.json"
    content = json.loads(path.read_text())
    content["layers"][3].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="layer 3 has no counts of down_proj"):
        hardware_table(tmp_path / "case")
    path.write_text("{")
    with pytest.raises(UserError, match="no counts of a trace"):
        hardware_table(tmp_path / "case")
    shutil.copytree(PUBLISHED, tmp_path / "published")
    change(tmp_path / "published" / "focus_settings.csv", "alpha_list", "many")
    with pytest.raises(UserError, match="write \\[2, 5\\]"):
        hardware_table(tmp_path / "published")
    with pytest.raises(UserError, match="the decoder has 3"):
        sample_cost("framefusion", {"visual_tokens": 9, "retained": [9]}, SHAPE)


def test_images_have_no_cmc():
    found = hardware_table(PUBLISHED, ["dense", "cmc"])
    assert len(found[found["accelerator"] == "cmc"]) == 9 and len(found) == 24


def test_shapes(tmp_path):
    assert shape_of("llava_vid") == QWEN2_7B
    assert shape_of("tiny_onevision") == DecoderShape(8, 128, 256, 4, 2, 32)
    config = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": 32}))
    assert shape_of("new", tmp_path) == DecoderShape(2, 64, 96, 4, 4, 32)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not the configuration of a decoder"):
        shape_of("new", tmp_path)
    with pytest.raises(UserError, match="not in the hub's cache"):
        shape_of("new", "nobody/nothing")


def test_products_add_up_to_the_row():
    (workload,) = read_source(GOLDEN)
    products, row = product_table(workload), hardware_table(GOLDEN, ["focus"]).iloc[0]
    assert len(products) == 28 * 8
    assert products["cycles"].sum() == row["total_cycles"] and products["dram"].sum() == row["total_dram_access"]
    assert products["utilisation"].max() <= 1


def test_a_question_costs_what_its_trace_does():
    """The shares that a result keeps give the counts back; dropping methods run on the dense array."""
    (workload,) = read_source(GOLDEN)
    counts = workload.with_counts().trace
    tokens, stats = counts.tokens, {"sparsity": 0.45}
    sample = {
        "visual_tokens": tokens, "num_frames": 16, "stats": stats,
        "retained": [tokens - layer["gate_proj"].empty_tokens for layer in counts.layers],
        "site_sparsity": {site: [layer[site].sparsity(tokens) for layer in counts.layers] for site in SITES},
    }  # fmt: skip
    cost, design = sample_cost("focus", sample, QWEN2_7B)
    assert design.name == "focus" and cost == focus_cost(QWEN2_7B, counts)
    adaptiv = sample_cost("adaptiv", sample, QWEN2_7B)[0]
    assert adaptiv.cycles == pd.read_csv(GOLDEN / "main_adaptiv.csv")["total_cycles"][0]
    dense = {"visual_tokens": tokens, "retained": [tokens] * 28}
    assert sample_cost("dense", dense, QWEN2_7B)[0].cycles == pd.read_csv(GOLDEN / "main_dense.csv")["total_cycles"][0]
    merged = sample | {"stats": {"share_0": 0.25}}
    cost, design = sample_cost("framefusion", merged, QWEN2_7B)
    assert design.name == "dense" and cost.products[0].operations == 2184 * 3584**2
    seconds, joules = mean_estimate("focus", [sample, sample], QWEN2_7B)
    focus = pd.read_csv(GOLDEN / "main_focus.csv").iloc[0]
    assert (seconds, joules) == pytest.approx((focus["execution_time"], focus["total_energy"]), rel=1e-9)
    record = PrefillRecord(VisualGrid(0, tokens, 16, 13, 14, 182, 14), QWEN2_7B, retained=sample["retained"])
    assert record_cost("framefusion", record)[1].name == "dense"
    record.counts = counts
    assert record_cost("focus", record)[0].seconds == focus["execution_time"]
    with pytest.raises(UserError, match="cmc: its result has no linear_sparsity"):
        sample_cost("cmc", sample, QWEN2_7B)


LARGE = """
import sys, time
from pathlib import Path
from focuslib.hardware import hardware_table
began = time.time()
hardware_table(sys.argv[1], model="llava_vid")
seconds = time.time() - began
# not ru_maxrss, which counts what the parent held before this program began
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) / 1024)
"""


def test_a_large_pth_is_quick_and_stays_out_of_memory(tmp_path):
    """A cell of the paper's length has 1 GB of masks and twice that of indices; here a third of it, sparse on disk."""
    tokens = 4000
    masks = {
        site: torch.zeros(28, 1, tokens, num_vectors(QWEN2_7B.site_channels(site), 32), dtype=torch.bool)
        for site in SITES
    }
    path = tmp_path / "llava_vid_long.pth"
    index = {site: torch.zeros(1, dtype=torch.int32).expand(mask.shape) for site, mask in masks.items()}
    torch.save({"mask_zero": masks, "mask_similar": masks, "group_idx": index}, path)
    del masks, index
    ran = subprocess.run([sys.executable, "-c", LARGE, str(path)], capture_output=True, text=True, check=True)
    seconds, mebibytes = map(float, ran.stdout.split())
    assert seconds < 5 and mebibytes < 1000
