"""Time and peak memory of a call, on a GPU or on a Linux CPU."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch

MEBIBYTE = 1 << 20


def measure(call: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, float]:
    """Shortest time of some calls in seconds, and the memory they needed at their peak above the start, in MiB.

    The memory is nan where neither CUDA nor /proc tells it.
    """
    cuda = device.type == "cuda"
    start = _start_peak(device)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times), (_peak(device) - start) / MEBIBYTE


def _start_peak(device: torch.device) -> float:
    """Forget the peak so far; returns the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return float("nan")
    return _peak(device)


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return float("nan")
