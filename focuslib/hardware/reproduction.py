"""Everything that the hardware notebook shows, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from focuslib.hardware import paper, study, sweeps
from focuslib.hardware.accelerators import FOCUS, focus_design
from focuslib.hardware.energy import area_power_table, breakdown_table
from focuslib.hardware.sources import read_source
from focuslib.hardware.tables import write_csv, write_simulator_csvs
from focuslib.hardware.workload import run
from focuslib.prefill.ops import DecoderShape

SWEEPS = ("m_tile_size", "vector_size", "block_size", "num_scatter")


@dataclass
class HardwareStudy:
    """The tables of a reproduction; each row's `basis` says whether it is recomputed here, published or ours.

    videos, images: the paper's cells (Figure 9, Table V). area: Table III. int8: Table IV. defect: DRAM bytes that
    the simulator's defect hides. ours: the profile's own rows; missing: what it lacks, a line each.
    products: (model, data set) → the profile's Focus by layer and product. breakdown: Focus's parts on the first.
    sweeps: name → (published, ours).
    """

    videos: pd.DataFrame
    images: pd.DataFrame
    area: pd.DataFrame
    int8: pd.DataFrame
    defect: pd.DataFrame
    ours: pd.DataFrame = field(default_factory=pd.DataFrame)
    missing: list[str] = field(default_factory=list)
    products: dict[tuple[str, str], pd.DataFrame] = field(default_factory=dict)
    breakdown: pd.DataFrame = field(default_factory=pd.DataFrame)
    sweeps: dict[str, tuple[pd.DataFrame, pd.DataFrame]] = field(default_factory=dict)

    @property
    def headline(self) -> pd.DataFrame:
        """Geometric means over the nine video cells of each accelerator's time and energy over Focus's."""
        return paper.geometric_means(self.videos)

    def all_rows(self) -> pd.DataFrame:
        """The paper's video cells and the profile's."""
        return pd.concat([self.videos, self.ours], ignore_index=True)


def reproduce_hardware(
    results: str | Path,
    published: str | Path,
    *,
    accelerators: Sequence[str] | None = None,
    m_tile: int | None = None,
    vector_size: int | None = None,
    scatter: int | None = None,
    shapes: Mapping[str, DecoderShape] | None = None,
) -> HardwareStudy:
    """Recompute the paper's figures from the published inputs, and put a results folder beside them.

    Parameters
    ----------
    results
        The profile's results folder. Tables are written to its folder hardware/, with the simulator's names. Without
        meta_data.csv there the paper's part stands alone.
    published
        The published inputs and results (params/published/hardware).
    accelerators, m_tile, vector_size, scatter, shapes
        See `study.hardware_table`; one design point.

    Raises
    ------
    UserError
        For bad input, in one line.
    """
    results = Path(results)
    done = HardwareStudy(
        videos=paper.comparison(published),
        images=paper.comparison(published, paper.IMAGES),
        area=area_power_table(),
        int8=paper.int8_table(published),
        defect=study.defect_table(published),
        sweeps={name: (sweeps.published_sweep(published, name), _own_sweep(results, name, shapes)) for name in SWEEPS},
    )
    if not (results / "meta_data.csv").is_file():
        done.missing = [f"{results}: no meta_data.csv; run the main notebook for rows of this profile"]
        return done
    workloads = [w.with_counts() for w in read_source(results, shapes=shapes)]
    design = focus_design(m_tile, vector_size, scatter)
    done.ours = study.hardware_table(workloads, accelerators, m_tile=m_tile, vector_size=vector_size, scatter=scatter)
    done.missing = study.missing_lines(workloads)
    traced = [workload for workload in workloads if workload.has(FOCUS.name)]
    done.products = {(w.model, w.dataset): study.product_table(w, design) for w in traced}
    if traced:
        done.breakdown = breakdown_table(run(traced[0], design), design)
        done.defect = pd.concat([done.defect, study.defect_table(traced)], ignore_index=True)
    write(done, results / "hardware")
    return done


def write(done: HardwareStudy, folder: Path) -> list[Path]:
    """Write the profile's rows with the simulator's names and columns, and Table III."""
    breakdown = None if done.breakdown.empty else done.breakdown
    written = write_simulator_csvs(done.ours, folder, breakdown)
    return [*written, write_csv(done.area, folder / "accelerator_area_power_buffer.csv")]


def _own_sweep(results: Path, name: str, shapes: Mapping[str, DecoderShape] | None) -> pd.DataFrame:
    return sweeps.sweep_table(results, name, shapes) if name != "num_scatter" else pd.DataFrame()
