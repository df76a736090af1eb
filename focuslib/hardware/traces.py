"""From a trace to counts: native files, the simulator's .pth, and counts written down as JSON.

A .pth of the paper's size is 1.4 GB; only its two masks are read, mapped from the file and let go site by site.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import torch

from focuslib.errors import UserError
from focuslib.kernels.similarity import ITSELF, ZERO
from focuslib.prefill.ops import SITES, Counts, SiteCounts
from focuslib.prefill.trace import Trace


def read_counts(path: str | Path) -> tuple[Counts, int | None]:
    """Counts of a trace file (.trace, .pth or .json), and its number of frames where the file tells it.

    Raises
    ------
    UserError
        If the file is missing, not whole, or no trace.
    """
    path = Path(path)
    readers = {".trace": _native, ".pth": _pth, ".json": _json}
    if path.suffix not in readers:
        raise UserError(f"{path}: not a trace; give a .trace, .pth or counts .json file")
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the experiment that writes it")
    return readers[path.suffix](path)


def _native(path: Path) -> tuple[Counts, int]:
    trace = Trace.load(path)
    counts = Counts(trace.grid.length)
    for layer in range(trace.num_layers):
        sites = {}
        for site in SITES:
            codes = trace.codes[site][layer].numpy()  # [S, V]
            zero = codes == ZERO
            zeros = int(np.count_nonzero(zero))
            sites[site] = SiteCounts(
                vectors=codes.shape[1],
                zero=zeros,
                similar=codes.size - zeros - int(np.count_nonzero(codes == ITSELF)),
                empty_tokens=_full_rows(zero),
            )
        counts.layers.append(sites)
    return counts, trace.grid.num_frames


def _pth(path: Path) -> tuple[Counts, None]:
    zero = {site: _each_layer(path, "mask_zero", site, empty=True) for site in SITES}
    similar = {site: _each_layer(path, "mask_similar", site, empty=False) for site in SITES}
    shapes = {site: (len(zero[site]), zero[site][0][:2]) for site in SITES}
    if len({(layers, shape[0]) for layers, shape in shapes.values()}) != 1:
        raise UserError(f"{path}: its sites have other numbers of layers or tokens; write it again")
    for site in SITES:
        if [entry[:2] for entry in zero[site]] != [entry[:2] for entry in similar[site]]:
            raise UserError(f"{path}: mask_zero and mask_similar of {site} have other shapes; write it again")
    counts = Counts(zero[SITES[0]][0][0])
    for layer in range(len(zero[SITES[0]])):
        sites = {}
        for site in SITES:
            _, vectors, zeros, empty = zero[site][layer]
            sites[site] = SiteCounts(vectors, zero=zeros, similar=similar[site][layer][2], empty_tokens=empty)
        counts.layers.append(sites)
    return counts, None


def _each_layer(path: Path, kind: str, site: str, empty: bool) -> list[tuple[int, int, int, int]]:
    """(S, V, values set, rows all set if `empty`) of each layer of one mask.

    The file is mapped anew for each mask: when the tensor goes, so do its pages.
    """
    try:
        tensors = torch.load(path, mmap=True, weights_only=True)
        mask = tensors[kind][site]
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or 0 in mask.shape:
            raise ValueError(f"{kind} of {site} is {mask.dtype} {list(mask.shape)}, not bool [layers, 1, S, V]")
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not the .pth of a trace ({reason}); write it again") from error
    layers = mask[:, 0].numpy()  # [layers, S, V], a view of the file
    return [
        (*layer.shape, int(np.count_nonzero(layer)), _full_rows(layer) if empty else 0)
        for layer in layers
    ]  # fmt: skip


def _full_rows(mask: np.ndarray) -> int:
    """How many rows of a bool [S, V] are all true; eight values at a time where rows allow it."""
    if mask.shape[1] % 8 == 0 and mask.flags.c_contiguous:
        return int((mask.view(np.uint64) == 0x0101010101010101).all(1).sum())
    return int(mask.all(1).sum())


def _json(path: Path) -> tuple[Counts, int | None]:
    """Counts written as {"S", "frames", "layers": [[{"site", "vectors", "zero", "similar", "empty_tokens"}, …], …]}."""
    try:
        content = json.loads(path.read_text())
        layers = [
            {entry["site"]: SiteCounts(**{k: int(v) for k, v in entry.items() if k != "site"}) for entry in layer}
            for layer in content["layers"]
        ]
        return Counts(int(content["S"]), layers), content.get("frames")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no counts of a trace ({error}); see tests/golden/hardware for one") from error
