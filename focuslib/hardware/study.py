"""Every accelerator on every workload of a source: the table and files of `focus hardware`, and where time goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from focuslib.errors import UserError, pick
from focuslib.hardware.accelerators import ACCELERATORS, FOCUS, SEC_ONLY, Accelerator, focus_design
from focuslib.hardware.energy import breakdown_table
from focuslib.hardware.sources import is_image, read_source
from focuslib.hardware.tables import simulator_row, write_simulator_csvs
from focuslib.hardware.workload import LACKS, Workload, run
from focuslib.prefill.ops import DecoderShape

Sizes = int | Sequence[int] | None


def hardware_table(
    source: str | Path | Iterable[Workload],
    accelerators: Sequence[str] | None = None,
    *,
    m_tile: Sizes = None,
    vector_size: Sizes = None,
    scatter: Sizes = None,
    corrected: bool = False,
    model: str | None = None,
    shapes: Mapping[str, DecoderShape] | None = None,
) -> pd.DataFrame:
    """Cycles, bytes and energy of a source on the accelerators: the simulator's columns, one row each.

    Parameters
    ----------
    source
        What `sources.read_source` takes, or workloads.
    accelerators
        Names in ACCELERATORS; None: all that the source has the numbers of. Named ones must have them.
    m_tile, vector_size, scatter
        Design points of Focus, one or several (all combinations); None: as published. Counts stay those of the trace;
        buffers at other sizes are not modelled, so their energy is left out (nan).
    corrected
        Without the published defect of attention's DRAM bytes (see focus). Those bytes are always in the column
        corrected_dram_access too.
    model, shapes
        See `sources.read_source`.

    Raises
    ------
    UserError
        For bad input, in one line that names it and the fix.

    Examples
    --------
    >>> hardware_table("params/published/hardware", ["dense", "cmc"])  # doctest: +SKIP
    """
    workloads = read_source(source, model=model, shapes=shapes) if isinstance(source, (str, Path)) else list(source)
    names = list(ACCELERATORS) if accelerators is None else list(accelerators)
    for name in names:
        pick(ACCELERATORS, name, "accelerator")
    designs = {name: _designs(name, m_tile, vector_size, scatter) for name in names}
    rows = []
    for workload in workloads:
        here = [name for name in names if workload.has(name)]
        if accelerators is not None:
            here = [name for name in names if workload.has(name) or not _image_only(name, workload)]
        if {FOCUS.name, SEC_ONLY.name} & set(here):
            workload = workload.with_counts()
        for name in here:
            rows += [_row(workload, design, corrected) for design in designs[name]]
    if not rows:
        raise UserError(f"{source}: nothing to compute for {', '.join(names)}; give a folder with meta_data.csv")
    return pd.DataFrame(rows)


def _row(workload: Workload, design: Accelerator, corrected: bool) -> dict[str, Any]:
    row = simulator_row(workload, design, run(workload, design, corrected=corrected))
    if design.name in (FOCUS.name, SEC_ONLY.name):
        row["corrected_dram_access"] = run(workload, design, corrected=True).total("dram")
    return row


def _image_only(name: str, workload: Workload) -> bool:
    """Whether an accelerator rightly has no numbers: CMC, of a single image."""
    return name == "cmc" and is_image(workload.dataset)


def _designs(name: str, m_tile: Sizes, vector_size: Sizes, scatter: Sizes) -> list[Accelerator]:
    if name not in (FOCUS.name, SEC_ONLY.name):
        return [ACCELERATORS[name]]
    points = product(_sizes(m_tile, "m tile", -1), _sizes(vector_size, "vector size"), _sizes(scatter, "scatter"))
    return [focus_design(*point, sec_only=name == SEC_ONLY.name) for point in points]


def _sizes(sizes: Sizes, what: str, special: int | None = None) -> list[int | None]:
    if sizes is None:
        return [None]
    wanted: list[int | None] = [sizes] if isinstance(sizes, int) else list(sizes)
    for size in wanted:
        if size is not None and size != special and size < 1:
            raise UserError(f"{what} {size}: it must be at least 1{f', or {special} for one tile' if special else ''}")
    return wanted


def run_hardware(source: str | Path, out: str | Path | None = None, **options) -> pd.DataFrame:
    """What `focus hardware` does: the table of `hardware_table`, written to `out` with the simulator's names.

    The breakdown of area, power and energy written beside is of Focus on the first workload, as published.
    """
    table = hardware_table(source, **options)
    if out is not None:
        workloads = read_source(source, model=options.get("model"), shapes=options.get("shapes"))
        first = next((w for w in workloads if w.has(FOCUS.name)), None)
        asked = options.get("accelerators")
        breakdown = None
        if first is not None and (asked is None or FOCUS.name in asked):
            breakdown = breakdown_table(run(first, FOCUS, corrected=options.get("corrected", False)))
        write_simulator_csvs(table, out, breakdown)
    return table


def missing_lines(source: str | Path | Iterable[Workload], **options) -> list[str]:
    """What a table of all accelerators leaves out and why, a line an accelerator."""
    workloads = read_source(source, **options) if isinstance(source, (str, Path)) else list(source)
    lines = []
    for name in ACCELERATORS:
        without = [str(w) for w in workloads if not w.has(name) and not _image_only(name, w)]
        if without:
            lines.append(f"{name} left out for {', '.join(without)}: {LACKS[name]}")
    return lines


def product_table(workload: Workload, design: Accelerator = FOCUS, *, corrected: bool = False) -> pd.DataFrame:
    """Where the time goes: one row a layer and product.

    Columns: layer, product, compute, stall and cycles, operations, dram and activation (bytes), tile_rows, tiles,
    utilisation (multiplications a multiplier and compute cycle), intensity (multiplications a DRAM byte),
    throughput (multiplications a cycle).
    """
    cost = run(workload, design, corrected=corrected)
    table = pd.DataFrame([vars(part) | {"cycles": part.cycles} for part in cost.products])
    table = table.rename(columns={"name": "product"})
    multipliers = design.array.rows * design.array.columns
    table["utilisation"] = table["operations"] / (multipliers * table["compute"].where(table["compute"] > 0))
    table["intensity"] = table["operations"] / table["dram"].where(table["dram"] > 0)
    table["throughput"] = table["operations"] / table["cycles"].where(table["cycles"] > 0)
    return table


def defect_table(source: str | Path | Iterable[Workload], **options) -> pd.DataFrame:
    """How much the published defect hides: DRAM bytes of Focus and SEC alone as published and corrected, in percent."""
    workloads = read_source(source, **options) if isinstance(source, (str, Path)) else list(source)
    names = [name for name in (FOCUS.name, SEC_ONLY.name) if any(w.has(name) for w in workloads)]
    rows = []
    for name in names:
        for workload in (w.with_counts() for w in workloads if w.has(name)):
            published, right = (
                run(workload, ACCELERATORS[name], corrected=corrected).total("dram") for corrected in (False, True)
            )
            rows.append({
                "model": workload.model, "dataset": workload.dataset, "accelerator": name,
                "as published (GB)": published / 1e9, "corrected (GB)": right / 1e9,
                "more (%)": 100 * (right / published - 1), "basis": workload.basis,
            })  # fmt: skip
    return pd.DataFrame(rows)
