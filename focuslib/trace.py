"""Sparse traces: what each vector of each GEMM site did, and the files an architecture simulator reads."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
from focuslib.ops import SITES
from focuslib.similarity import ITSELF, ZERO, resolve_pointers


@dataclass
class Trace:
    """The concentration of one prefill, one small code per vector.

    codes: site → [layers, S, V] uint8 over the S original visual tokens: ITSELF, ZERO (pruned or all-zero), or k
        for a vector that follows its k-th candidate (order of VisualGrid.block_offsets).
    grid: the visual tokens' geometry. frame_block, block: the block the candidates come from.
    max_doublings: how far pointers were followed (None: the published number, grid.num_frames).
    """

    grid: VisualGrid
    codes: dict[str, Tensor]
    frame_block: int
    block: int
    max_doublings: int | None = None

    @property
    def num_layers(self) -> int:
        return len(next(iter(self.codes.values())))

    def mask_zero(self, site: str) -> Tensor:
        """[layers, S, V] bool: pruned or all-zero vectors."""
        return self.codes[site] == ZERO

    def mask_similar(self, site: str) -> Tensor:
        """[layers, S, V] bool: vectors that follow a candidate."""
        codes = self.codes[site]
        return (codes != ZERO) & (codes != ITSELF)

    def group_index(self, site: str, layer: int) -> Tensor:
        """[S, V] int32: flat index p·V + v at which each vector's pointer ends."""
        codes = self.codes[site][layer].long()
        tokens, vectors = codes.shape
        offsets = torch.tensor([0, *self.grid.block_offsets(self.frame_block, self.block)])
        pointer = torch.arange(tokens)[:, None] - offsets[torch.where(codes == ZERO, ITSELF, codes)]
        doublings = self.grid.num_frames if self.max_doublings is None else self.max_doublings
        root = resolve_pointers(pointer, doublings)
        return (root * vectors + torch.arange(vectors)).int()

    def to_dict(self) -> dict[str, dict[str, Tensor]]:
        """The simulator's layout: {mask_zero, mask_similar, group_idx}, each site → [layers, 1, S, V]."""
        return {
            "mask_zero": {site: self.mask_zero(site)[:, None] for site in SITES},
            "mask_similar": {site: self.mask_similar(site)[:, None] for site in SITES},
            "group_idx": {
                site: torch.stack([self.group_index(site, layer) for layer in range(self.num_layers)])[:, None]
                for site in SITES
            },
        }

    def save_pth(self, path: Path) -> None:
        """Write the simulator's file atomically; it loads with torch.load(weights_only=True)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        torch.save(self.to_dict(), partial)
        partial.replace(path)

    def save(self, path: Path) -> None:
        """Write the native file (.npz, compressed, one byte a vector before compression) atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        meta = {
            "grid": self.grid.to_dict(),
            "frame_block": self.frame_block,
            "block": self.block,
            "max_doublings": self.max_doublings,
        }
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            codes = {site: tensor.numpy() for site, tensor in self.codes.items()}
            np.savez_compressed(file, meta=np.array(json.dumps(meta)), **codes)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Read a native file. Raises UserError if it is not one; never runs code from the file."""
        try:
            with np.load(path, allow_pickle=False) as data:
                meta = json.loads(str(data["meta"]))
                codes = {site: torch.from_numpy(data[site]) for site in SITES}
            grid = VisualGrid(**meta.pop("grid"))
            return cls(grid, codes, **meta)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not a readable trace file ({error})") from error
