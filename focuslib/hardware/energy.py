"""Energy, power and area of an accelerator (paper, Figure 9 and Table III).

Energy is DRAM bytes at a constant cost, and the power of core and buffers (at their peak) over the execution time.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from focuslib.hardware.accelerators import ADAPTIV, CMC, DENSE, DRAM_MJ_PER_BYTE, FOCUS, Accelerator
from focuslib.hardware.cost import Cost


@dataclass(frozen=True)
class Energy:
    """Energy of a prefill in mJ. buffer is nan for buffers whose size is not published, and so is the total."""

    dram: float
    buffer: float
    core: float

    @property
    def total(self) -> float:
        return self.dram + self.buffer + self.core


def energy(cost: Cost, design: Accelerator) -> Energy:
    """What a prefill takes on an accelerator, in mJ."""
    seconds = cost.seconds
    return Energy(
        dram=cost.total("dram") * DRAM_MJ_PER_BYTE,
        buffer=design.buffer_mw * seconds,
        core=design.core_mw * seconds,
    )


def area_power_table() -> pd.DataFrame:
    """accelerator_area_power_buffer.csv: area in mm², on-chip power in mW, buffer capacity in KiB (Table III)."""
    names = {DENSE: "systolic array", ADAPTIV: "adaptiv", CMC: "cmc", FOCUS: "focus"}
    return pd.DataFrame(
        {
            "Accelerator": name,
            "Area": design.area_mm2,
            "On-chip Power": design.core_mw + design.buffer_mw,
            "Buffer Size": design.buffer_kib,
        }
        for design, name in names.items()
    )


def breakdown_table(cost: Cost, design: Accelerator = FOCUS) -> pd.DataFrame:
    """detailed_power_area_breakdown.csv: area (mm²), power (mW) and energy (mJ) of each component, buffer and DRAM."""
    parts = [(part.name, part.area_mm2 * part.count, part.power_mw * part.count) for part in design.components]
    if design.buffers_known:
        parts += [(buffer.name, buffer.area_mm2, buffer.power_mw) for buffer in design.buffers]
    rows = [
        {"component": name, "area": area, "power": power, "energy": power * cost.seconds} for name, area, power in parts
    ]
    dram = cost.total("dram") * DRAM_MJ_PER_BYTE
    rows.append({"component": "dram", "area": 0.0, "power": dram / cost.seconds, "energy": dram})
    return pd.DataFrame(rows)
