"""Time and memory of the SIC kernel against a dense formulation that materialises every candidate, in one run."""

import multiprocessing

import torch

from focuslib.evaluation.measure import measure
from focuslib.grid import VisualGrid
from focuslib.kernels.similarity import concentrate

FRAMES, HEIGHT, WIDTH, CHANNELS, VECTOR, M_TILE, THRESHOLD = 64, 13, 14, 3584, 32, 1024, 0.9
GRID = VisualGrid(0, FRAMES * HEIGHT * WIDTH, FRAMES, HEIGHT, WIDTH, HEIGHT * WIDTH, WIDTH)


def video_like(share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A site's input [T, D] with temporal redundancy and the positions of its tokens, a share of the run."""
    generator = torch.Generator().manual_seed(0)
    still = torch.randn(1, HEIGHT * WIDTH, CHANNELS, generator=generator)
    noise = torch.randn(FRAMES, HEIGHT * WIDTH, 1, generator=generator).abs() * 0.4
    x = still + noise * torch.randn(FRAMES, HEIGHT * WIDTH, CHANNELS, generator=generator)
    positions = torch.randperm(GRID.length, generator=generator)[: int(share * GRID.length)].sort().values
    return x.flatten(0, 1)[positions], positions


def dense_formulation(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
    means = (sums / counts.clamp(min=1)[:, None])[flat].view(GRID.length, CHANNELS)
    return means[positions], (best > THRESHOLD)[positions]


def streaming(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's kernel."""
    merged = concentrate(x, positions, GRID, threshold=THRESHOLD, vector_size=VECTOR, m_tile=M_TILE)
    return merged.values, (merged.codes > 0) & (merged.codes < 255)


def in_child(kernel, share: float, pipe) -> None:
    """In a process of its own: best of three times, and peak memory above what the input takes."""
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other would be measured
    x, positions = video_like(share)
    values, similar = kernel(x, positions)
    checks = float(similar.float().mean()), float(values.double().sum())
    del values, similar
    pipe.send((*measure(lambda: kernel(x, positions), 3, x.device), *checks))


def in_process(kernel, share: float) -> tuple[float, float, float, float]:
    """Seconds, MiB, share of similar vectors and a checksum of one kernel."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=in_child, args=(kernel, share, there))
    process.start()
    result = here.recv()
    process.join()
    return result


def main() -> None:
    print(f"SIC on [{GRID.length}, {CHANNELS}] float32, vector {VECTOR}, block 2×2×2, m_tile {M_TILE}, one thread")
    for share in (1.0, 0.3):
        slow, fast = in_process(dense_formulation, share), in_process(streaming, share)
        print(
            f"  {share:4.0%} of the tokens: dense {slow[0]:.2f} s {slow[1]:.0f} MiB, streaming {fast[0]:.2f} s "
            f"{fast[1]:.0f} MiB: {slow[0] / fast[0]:.1f} × faster, {fast[1] / slow[1]:.2f} of the memory "
            f"(similar {slow[2]:.4f} / {fast[2]:.4f}, sums {slow[3]:.1f} / {fast[3]:.1f})"
        )


if __name__ == "__main__":
    main()
