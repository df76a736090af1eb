"""Time and memory of the SIC kernel, all as ratios within one run: the median, and the quartiles, of pairs in turn.

Against a dense formulation that materialises every candidate; against the kernel before it was compiled, as the method
calls both at a site; and of wide inputs against narrow ones.
"""

import multiprocessing
import statistics
import time

import torch

from benchmarks import reference_sic
from focuslib.evaluation.measure import measure
from focuslib.grid import VisualGrid
from focuslib.kernels.similarity import candidate_rows, concentrate

FRAMES, HEIGHT, WIDTH, CHANNELS, VECTOR, M_TILE, THRESHOLD = 64, 13, 14, 3584, 32, 1024, 0.9
WIDE = 18944  # channels before down_proj
GRID = VisualGrid(0, FRAMES * HEIGHT * WIDTH, FRAMES, HEIGHT, WIDTH, HEIGHT * WIDTH, WIDTH)
OPTIONS = {"threshold": THRESHOLD, "vector_size": VECTOR, "m_tile": M_TILE}
TURNS = 31  # fewer leave the median of their ratios uncertain by a tenth


def video_like(share: float, channels: int = CHANNELS) -> tuple[torch.Tensor, torch.Tensor]:
    """A site's input [T, D] with temporal redundancy and the positions of its tokens, a share of the run."""
    generator = torch.Generator().manual_seed(0)
    still = torch.randn(1, HEIGHT * WIDTH, channels, generator=generator)
    noise = torch.randn(FRAMES, HEIGHT * WIDTH, 1, generator=generator).abs() * 0.4
    x = still + noise * torch.randn(FRAMES, HEIGHT * WIDTH, channels, generator=generator)
    positions = torch.randperm(GRID.length, generator=generator)[: int(share * GRID.length)].sort().values
    return x.flatten(0, 1)[positions], positions


def dense_formulation(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """SIC as one writes it first: the zero-filled full sequence, all candidates gathered, cosine, pointers, means."""
    vectors = CHANNELS // VECTOR
    full = x.new_zeros(GRID.length, CHANNELS)
    full[positions] = x
    present = full.any(1)
    tile = (present.long().cumsum(0) - 1) // M_TILE
    own = torch.arange(GRID.length)
    sources = torch.stack([own - offset for offset in GRID.block_offsets(2, 2)], 1)
    valid = (sources >= 0) & (tile[sources.clamp(min=0)] == tile[:, None])
    candidates = full[sources.clamp(min=0)] * valid[..., None]  # [S, candidates, D]
    candidates = candidates.view(GRID.length, -1, vectors, VECTOR)
    similarity = torch.cosine_similarity(full.view(GRID.length, 1, vectors, VECTOR), candidates, dim=-1)
    best, choice = similarity.max(1)
    pointer = torch.where(best > THRESHOLD, sources.gather(1, choice), own[:, None])
    for _ in range(FRAMES):
        pointer = pointer.gather(0, pointer)
    flat = (pointer * vectors + torch.arange(vectors)).flatten()
    sums = x.new_zeros(GRID.length * vectors, VECTOR).index_add_(0, flat, full.view(-1, VECTOR))
    counts = torch.bincount(flat, minlength=GRID.length * vectors)
    return (sums / counts.clamp(min=1)[:, None])[flat].view(GRID.length, CHANNELS)[positions]


def before(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A site as the method wrote it before the kernel was compiled: values, a copy of x, values into the copy."""
    return reference_sic.at_site(x, positions, GRID, **OPTIONS)


_rows: dict[int, torch.Tensor] = {}  # of the tokens present, as the method keeps them


def now(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A site as the method calls it: in x itself, the candidates' rows at hand."""
    rows = _rows.setdefault(len(positions), candidate_rows(positions, GRID, 2, 2, M_TILE))
    return concentrate(x, positions, GRID, **OPTIONS, rows=rows, overwrite=True).values


def _compare(kernels, share: float, widths: tuple[int, ...], threads: int, turns: int, pipe) -> None:
    """In a process of its own: each kernel's times in turns, its peak memory in MiB, and whether all agree."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    inputs = [video_like(share, width) for width in widths]
    work = [x.clone() for x, _ in inputs]
    cases = list(zip(kernels, inputs, work, strict=True))
    values = [kernel(y, positions).clone() for kernel, (_, positions), y in cases]  # warms up
    times = [[] for _ in cases]
    for _ in range(turns):
        for (kernel, (x, positions), y), taken in zip(cases, times, strict=True):
            y.copy_(x)
            start = time.perf_counter()
            kernel(y, positions)
            taken.append(time.perf_counter() - start)
    close = widths[0] == widths[1] and torch.allclose(*values, rtol=0, atol=1e-4)
    equal = widths[0] == widths[1] and torch.equal(*values)
    del values
    memory = []
    for kernel, (x, positions), y in cases:
        y.copy_(x)
        memory.append(measure(lambda kernel=kernel, y=y, p=positions: kernel(y, p), 1, y.device)[1])
    pipe.send((times, memory, "equal" if equal else "close" if close else "no"))


def compare(kernels, share: float, widths=(CHANNELS, CHANNELS), threads: int = 2, turns: int = TURNS):
    here, there = multiprocessing.Pipe()
    arguments = (kernels, share, widths, threads, turns, there)
    process = multiprocessing.get_context("spawn").Process(target=_compare, args=arguments)
    process.start()
    result = here.recv()
    process.join()
    return result


def _medians(times) -> list[float]:
    return [statistics.median(taken) for taken in times]


def _ratio(above: list[float], below: list[float]) -> str:
    """Of times taken in turns: the median of their ratios, and the quartiles."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    first, median, third = statistics.quantiles(ratios, n=4)
    return f"{median:.1f} × ({first:.1f} to {third:.1f})"


def main() -> None:
    print(f"SIC on [{GRID.length}, {CHANNELS}] float32, vector {VECTOR}, block 2×2×2, m_tile {M_TILE}")
    for name, kernel, threads, turns in (
        ("dense formulation", dense_formulation, 1, 7),
        ("kernel before it was compiled", before, 2, TURNS),
    ):
        for share in (1.0, 0.3):
            times, (most, least), agree = compare((kernel, now), share, threads=threads, turns=turns)
            slow, fast = _medians(times)
            print(
                f"  {share:4.0%} of the tokens, {threads} threads: {name} {slow:.3f} s {most:.0f} MiB, "
                f"now {fast:.3f} s {least:.0f} MiB: {_ratio(*times)} faster, {least / most:.2f} of the memory "
                f"(values: {agree})"
            )
    (narrow, wide), _, _ = compare((now, now), 1.0, widths=(CHANNELS, WIDE))
    print(f"  {WIDE} channels take {_ratio(wide, narrow)} the time of {CHANNELS} ({WIDE / CHANNELS:.1f} × the work)")


if __name__ == "__main__":
    main()
