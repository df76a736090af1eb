"""A view of made-up similarities in any shape, such as a 7B model's."""

import numpy as np
import torch

from focuslib.explore.recorder import (
    NEVER,
    Recording,
    SiteView,
    candidates,
    reduce_site,
    shown_vectors,
    threshold_steps,
)
from focuslib.explore.view import ViewData
from focuslib.grid import VisualGrid
from focuslib.kernels.similarity import ITSELF, ZERO
from focuslib.models.layout import rows_layout
from focuslib.prefill.ops import SITES


def synthetic_view(
    frames: int, rows: int, columns: int, layers: int, vectors: dict[str, int], side: int = 0
) -> ViewData:
    """Random similarities and neighbours; a tenth of the tokens goes in each layer of the second half.

    The last column is a newline. side: pixels of the (random, smooth) pictures; 0 for none.
    """
    rng = torch.Generator().manual_seed(0)
    grid = VisualGrid(5, frames * rows * columns, frames, rows, columns, rows * columns, columns)
    steps, tokens = threshold_steps(0.9), grid.length
    shown = shown_vectors(tokens, layers, vectors)
    dropped = torch.full((tokens,), NEVER, dtype=torch.int16)
    order = torch.randperm(tokens, generator=rng)
    for number, layer in enumerate(range(layers // 2, layers)):
        dropped[order[number * tokens // layers :][: tokens // layers]] = 2 * layer + 1
    offsets = len(grid.block_offsets(2, 2))
    sites = {}
    for site in SITES:
        reduced = []
        for layer in range(layers):
            best = torch.rand((tokens, vectors[site]), generator=rng) ** 0.2
            codes = torch.randint(1, offsets + 1, best.shape, generator=rng, dtype=torch.uint8)
            codes[(best <= 0.9) | (torch.arange(tokens) < grid.frame_stride + columns + 1)[:, None]] = ITSELF
            gone = (dropped != NEVER) & (dropped <= 2 * layer + (site in ("gate_proj", "down_proj")))
            codes[gone], best[gone] = ZERO, 0
            reduced.append(reduce_site(codes, shown[site], best, steps))
        sites[site] = SiteView.stack(reduced, shown[site], vectors[site])
    pictures = None
    if side:
        coarse = np.random.default_rng(0).integers(0, 255, (frames, 8, 8, 3)).astype(np.uint8)
        pictures = coarse.repeat(side // 8, 1).repeat(side // 8, 2)
    importance = torch.rand((layers, tokens), generator=rng).numpy() ** 8
    retained = [int(((dropped == NEVER) | (dropped > 2 * layer + 1)).sum()) for layer in range(layers)]
    recording = Recording(grid, sites, dropped.numpy(), candidates(grid, 2, 2), frames, steps, 0.9, True, importance)
    return ViewData(
        recording, rows_layout(grid, newline=True), pictures, "synthetic", retained, question="What happens?"
    )
