"""Time and memory of CMC's motion search over attention rows against an exhaustive search with cdist, in one run.

The rows are the softmax attention of a randomly initialised Qwen2-7B layer over a video-like sequence. Both searches
get one interval of all heads at a time; the library searches it head by head, as it sees it in a model. Only the
I-frames themselves match under the published threshold, so the line measures elimination, not matching.
"""

import itertools
import math
import multiprocessing
import os
import time
from pathlib import Path

import torch

from focuslib.kernels.motion import INFORMATIVE, frame_matches

HEADS, FRAMES, PATCHES, ROW, START = 4, 64, 182, 12_000, 14
HIDDEN, HEAD_DIM, INIT, ROPE_BASE = 3584, 128, 0.02, 1e6
INTERVAL, I_FRAME, THRESHOLD = 8, 3, 5e-5


def queries_and_keys() -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated queries and keys [HEADS, ROW, HEAD_DIM] of a random layer; frames change slowly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROW, HIDDEN, generator=generator)
    video = x[START : START + FRAMES * PATCHES].view(FRAMES, PATCHES, HIDDEN)
    for before, frame in itertools.pairwise(video):
        frame.mul_(0.3).add_(before, alpha=math.sqrt(1 - 0.3**2))
    angle = torch.arange(ROW)[:, None] * ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    parts = []
    for _ in range(2):
        weight = INIT * torch.randn(HIDDEN, HEADS * HEAD_DIM, generator=generator)
        part = (x @ weight).view(ROW, HEADS, HEAD_DIM).transpose(0, 1)
        turned = torch.cat([-part[..., HEAD_DIM // 2 :], part[..., : HEAD_DIM // 2]], -1)
        parts.append(part * cos + turned * sin)
    return parts[0], parts[1]


def attention(queries: torch.Tensor, keys: torch.Tensor, interval: int) -> torch.Tensor:
    """The causal attention rows of one interval's tokens, [HEADS, INTERVAL · PATCHES, ROW]."""
    rows = START + interval * INTERVAL * PATCHES + torch.arange(INTERVAL * PATCHES)
    scores = queries[:, rows] @ keys.transpose(1, 2) / math.sqrt(HEAD_DIM)
    return scores.masked_fill_(torch.arange(ROW) > rows[:, None], -torch.inf).softmax(-1)


def exhaustive(rows: torch.Tensor) -> torch.Tensor:
    """All distances to the I-frame, all heads in one call → matches [HEADS, tokens]."""
    first = I_FRAME * PATCHES
    distance = torch.cdist(rows, rows[:, first : first + PATCHES], p=1)
    best = distance.argmin(-1)
    nearest = distance.gather(-1, best[..., None]).squeeze(-1)
    return torch.where(nearest < THRESHOLD * ROW, best + first, INFORMATIVE)


def elimination(rows: torch.Tensor) -> torch.Tensor:
    """The library's search, head by head."""
    return torch.stack([frame_matches(head, PATCHES, THRESHOLD, interval=INTERVAL, i_frame=I_FRAME) for head in rows])


def _status(name: str) -> float:
    """A memory figure of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


def _measure_peak(search, pipe) -> None:
    rows = attention(*queries_and_keys(), interval=FRAMES // INTERVAL - 1)
    torch.cdist(torch.ones(1, 1), torch.ones(1, 1), p=1)  # loads what any search needs
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
    search(rows)
    pipe.send(_status("VmHWM") - before)


def peak_memory(search) -> float:
    """MiB a search takes beyond its input, in a process of its own (Linux): resident memory, the widest interval."""
    here, there = multiprocessing.Pipe()
    # freed memory goes back at once; else a search could hide in what making the rows has left
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    process = multiprocessing.get_context("spawn").Process(target=_measure_peak, args=(search, there))
    process.start()
    result = here.recv()
    process.join()
    return result


def main() -> None:
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other would be measured
    queries, keys = queries_and_keys()
    slow = fast = 0.0
    same, matched = True, 0
    for interval in range(FRAMES // INTERVAL):
        rows = attention(queries, keys, interval)
        start = time.perf_counter()
        expected = exhaustive(rows)
        middle = time.perf_counter()
        found = elimination(rows)
        fast += time.perf_counter() - middle
        slow += middle - start
        same &= torch.equal(found, expected)
        matched += int((expected >= 0).sum())
    most, least = peak_memory(exhaustive), peak_memory(elimination)
    share = matched / (HEADS * FRAMES * PATCHES)
    print(
        f"CMC search, {HEADS} heads × {FRAMES} × {PATCHES} attention rows of {ROW}, {share:.1%} matched, one thread: "
        f"cdist {slow:.1f} s {most:.1f} MiB, elimination {fast:.1f} s {least:.1f} MiB: "
        f"{slow / fast:.1f} × faster, {least / most:.2f} of the memory (the same matches: {same})"
    )


if __name__ == "__main__":
    main()
