"""The hardware models against the authors' simulator: published rows, tables and headline, and a golden full case."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from focuslib.hardware import ACCELERATORS, FOCUS, SEC_ONLY, hardware_table, run_hardware
from focuslib.hardware.accelerators import ADAPTIV, CMC, DENSE, MACROS, focus_design
from focuslib.hardware.energy import area_power_table
from focuslib.hardware.focus import focus_cost
from focuslib.hardware.paper import comparison, geometric_means
from focuslib.hardware.sources import read_source
from focuslib.hardware.study import defect_table
from focuslib.hardware.workload import run

PUBLISHED = Path(__file__).parents[1] / "params" / "published" / "hardware"
SIMULATOR = PUBLISHED / "simulator"
GOLDEN = Path(__file__).parent / "golden" / "hardware" / "llava_vid_videomme"
EXACT = ("total_cycles", "total_compute_cycles", "total_stall_cycles")
CLOSE = ("execution_time", "total_dram_access", "dram_bandwidth", "dense_ops", "num_ops", "dram_energy", "core_energy")
BUFFERS = ("sram_energy", "total_energy")


def assert_rows(ours: pd.DataFrame, theirs: pd.DataFrame, columns: tuple[str, ...], exact: tuple[str, ...]) -> None:
    merged = ours.merge(theirs, on=["model", "dataset"], suffixes=("", "_theirs"), validate="one_to_one")
    assert len(merged) == len(theirs)
    for column in exact:
        assert list(merged[column]) == list(merged[f"{column}_theirs"]), column
    for column in columns:
        np.testing.assert_allclose(merged[column], merged[f"{column}_theirs"], rtol=1e-9, err_msg=column)


@pytest.mark.parametrize(
    ("name", "file", "rows", "columns", "exact"),
    [
        ("dense", "main_dense", 15, (*CLOSE, *BUFFERS), (*EXACT, "total_activation")),
        ("adaptiv", "main_adaptiv", 15, (*CLOSE, *BUFFERS), (*EXACT, "total_activation")),
        ("cmc", "main_cmc", 9, (*CLOSE, *BUFFERS), (*EXACT, "total_activation")),
        ("focus_sec_only", "main_focus_SEC_only", 9, CLOSE, EXACT),
    ],
)
def test_published_rows(name, file, rows, columns, exact):
    theirs = pd.read_csv(SIMULATOR / f"{file}.csv")
    assert len(theirs) == rows
    assert_rows(hardware_table(PUBLISHED, [name]), theirs, columns, exact)


@pytest.mark.parametrize("name", ["dense", "adaptiv", "cmc", "focus"])
def test_golden_case(name):
    theirs = pd.read_csv(GOLDEN / f"main_{name}.csv")
    assert_rows(hardware_table(GOLDEN, [name]), theirs, (*CLOSE, *BUFFERS), (*EXACT, "total_activation"))


def test_files_are_the_simulators(tmp_path):
    run_hardware(GOLDEN, tmp_path)
    for name in ("main_dense", "main_adaptiv", "main_cmc", "main_focus", "detailed_power_area_breakdown"):
        ours, theirs = pd.read_csv(tmp_path / f"{name}.csv"), pd.read_csv(GOLDEN / f"{name}.csv")
        assert list(ours) == list(theirs)
        for column in theirs:
            if theirs[column].dtype.kind in "if":
                np.testing.assert_allclose(ours[column], theirs[column], rtol=1e-9, err_msg=f"{name} {column}")
            else:
                assert list(ours[column]) == list(theirs[column]), column
    assert list(pd.read_csv(tmp_path / "main_focus_SEC_only.csv")["accelerator"]) == ["focus"]


def test_table_three():
    theirs = pd.read_csv(SIMULATOR / "accelerator_area_power_buffer.csv").set_index("Accelerator")
    ours = area_power_table().set_index("Accelerator")
    assert list(ours) == list(theirs) and list(ours.index) == list(theirs.index)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    assert f"{FOCUS.area_mm2:.2f}" == "3.21"


@pytest.mark.parametrize(
    ("design", "file"), [(FOCUS, "focus_rtl"), (DENSE, "focus_rtl"), (ADAPTIV, "adaptiv_rtl"), (CMC, "cmc_rtl")]
)
def test_components_are_the_published_ones(design, file):
    theirs = pd.read_csv(SIMULATOR / f"{file}.csv").set_index("Module")
    if design is not DENSE:
        assert [part.name for part in design.components] == list(theirs.index)
    for part in design.components:
        assert (part.area_mm2, part.power_mw) == tuple(theirs.loc[part.name])


def test_macros_are_the_published_ones():
    theirs = pd.read_csv(SIMULATOR / "buffer_model_spec.csv").set_index("Model")
    assert list(MACROS) == list(theirs.index)
    for name, macro in MACROS.items():
        assert tuple(vars(macro).values()) == tuple(theirs.loc[name])


def test_headline_to_the_printed_digits():
    means = geometric_means(comparison(PUBLISHED)).set_index("Over")
    assert set(means["Cells"]) == {9}
    printed = means[["Speed-up", "Energy saving"]].map("{:.3f}".format)
    assert printed.loc["dense"].tolist() == ["4.466", "4.669"]
    assert printed.loc["adaptiv"].tolist() == ["2.602", "2.977"]
    assert printed.loc["cmc"].tolist() == ["2.350", "3.292"]
    assert (printed.loc["GPU", "Speed-up"], printed.loc["GPU+FF", "Speed-up"]) == ("7.896", "2.370")
    assert means.loc["dense", "Basis"] == "recomputed here / published"


def test_the_defect_has_the_published_size():
    videos = defect_table(PUBLISHED)
    more = videos[videos["dataset"].isin(["videomme", "mlvu", "mvbench"])]["more (%)"]
    assert (f"{more.min():.1f}", f"{more.max():.1f}") == ("0.4", "18.8")
    golden = defect_table(GOLDEN).set_index("accelerator")["more (%)"]
    assert f"{golden['focus']:.1f}" == "3.9"
    (workload,) = read_source(GOLDEN)
    workload = workload.with_counts()
    for name in ("focus", "focus_sec_only"):
        published, corrected = (run(workload, ACCELERATORS[name], corrected=value) for value in (False, True))
        assert published.cycles == corrected.cycles


def test_compression_ratio_is_the_published_one():
    (workload,) = read_source(GOLDEN)
    theirs = pd.read_csv(GOLDEN / "main_focus.csv")["total_compression_ratio"][0]
    assert f"tensor({run(workload, FOCUS).compression:.4f})" == theirs
    assert run(workload, SEC_ONLY).compression == 1


def test_scatter_sweep_has_the_published_core_power():
    theirs = pd.read_csv(SIMULATOR / "dse_d_num_scatter_accumulator.csv")
    for row in theirs.itertuples():
        design = focus_design(scatters=row.num_scatter)
        assert design.core_mw * row.execution_time == pytest.approx(row.core_energy, rel=1e-9)
        assert np.isnan(design.buffer_mw) == (row.num_scatter != 2)


def test_vector_sweep_has_the_published_compute_cycles():
    """Layer 9's o_proj over 3,494 tokens; its rows computed follow from its operations, which that table doubles."""
    settings = json.loads((GOLDEN / "counts.json").read_text())
    assert settings["S"] == 2912  # of which only the form is used: one product of a layer
    (workload,) = read_source(GOLDEN)
    counts = workload.with_counts().trace
    for row in pd.read_csv(SIMULATOR / "dse_b_vector_size.csv").itertuples():
        vectors = -(-3584 // row.vector_size)
        computed = row.layer_array_ops // (2 * 3584**2)
        counts.tokens = 11648
        for site in counts.layers[9].values():
            site.vectors, site.empty_tokens = vectors, 11648 - 3494
            site.zero = site.empty_tokens * vectors
            site.similar = (3494 - computed) * vectors
        cost = focus_cost(workload.shape, counts, focus_design(vector_size=row.vector_size))
        product = next(part for part in cost.products if part.layer == 9 and part.name == "o_proj")
        assert product.compute == row.compute_cycles
        gather_tile = 24 * 1024  # not part of that table
        assert product.stall - gather_tile == row.stall_cycles
