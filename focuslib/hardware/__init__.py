"""From counts to cycles, bytes, energy and area: the published accelerator models as arithmetic (paper, Section VI).

from focuslib.hardware import hardware_table

hardware_table("results/laptop")            # every accelerator that the folder has numbers for
hardware_table("trace.pth", ["focus"], m_tile=[512, 1024], model="llava_vid")
"""

from focuslib.hardware.accelerators import ACCELERATORS, ADAPTIV, CMC, DENSE, FOCUS, SEC_ONLY, focus_design
from focuslib.hardware.samples import sample_cost
from focuslib.hardware.shapes import QWEN2_7B
from focuslib.hardware.study import hardware_table, run_hardware
from focuslib.hardware.workload import Workload

__all__ = [
    "ACCELERATORS",
    "ADAPTIV",
    "CMC",
    "DENSE",
    "FOCUS",
    "QWEN2_7B",
    "SEC_ONLY",
    "Workload",
    "focus_design",
    "hardware_table",
    "run_hardware",
    "sample_cost",
]
