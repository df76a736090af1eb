"""Focus: prompt-guided token pruning (SEC) and similarity concentration before every GEMM (SIC). HPCA 2026."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from focuslib.errors import UserError
from focuslib.grid import Grid
from focuslib.kernels.semantic import most_important, prompt_importance, tokens_to_keep
from focuslib.kernels.similarity import ITSELF, MAX_CANDIDATES, candidate_rows, concentrate, num_vectors
from focuslib.methods.base import Method
from focuslib.methods.depth import checked_layers, layer_numbers
from focuslib.prefill.ops import concentrated_operations, dense_operations
from focuslib.prefill.record import Prefill, PrefillRecord
from focuslib.prefill.trace import BlockGeometry


@dataclass(frozen=True)
class Focus(Method):
    """Focus, with the published defaults of a 28-layer model.

    selected_layers: layers after whose attention visual tokens are pruned (SEC): their numbers, or shares of the depth
        (see depth.layer_numbers). retention: share of the original visual tokens each of them keeps (α).
    similarity_threshold: cosine similarity above which vectors merge (τ).
    vector_size: channels a vector. frame_block, block: candidates lie up to frame_block − 1 frames and block − 1 rows
        and columns away. m_tile: tokens a GEMM tile, −1 for one tile. full_resolution: follow pointers to the root
        always (published: at most num_frames doublings, which stops early for single images).
    sec_only: the ablation without similarity concentration.
    """

    name: ClassVar[str] = "focus"

    selected_layers: tuple[int | float, ...] = (2, 5, 8, 16, 25)
    retention: tuple[float, ...] = (0.4, 0.3, 0.2, 0.15, 0.1)
    similarity_threshold: float = 0.9
    vector_size: int = 32
    frame_block: int = 2
    block: int = 2
    m_tile: int = 1024
    full_resolution: bool = False
    sec_only: bool = False

    def __post_init__(self):
        layers = checked_layers("method focus: selected_layers", self.selected_layers)
        object.__setattr__(self, "selected_layers", layers)
        object.__setattr__(self, "retention", tuple(self.retention))
        if len(self.selected_layers) != len(self.retention):
            raise UserError(
                f"method focus: selected_layers has {len(self.selected_layers)} entries and retention "
                f"{len(self.retention)}; give one retention a layer"
            )
        if list(layers) != sorted(set(layers)):
            raise UserError(f"method focus: selected_layers {layers} must be ascending layer numbers from 0")
        if any(not 0 < alpha <= 1 for alpha in self.retention):
            raise UserError(f"method focus: retention {self.retention} must lie in (0, 1]")
        if not self.similarity_threshold >= 0:
            raise UserError(f"method focus: similarity_threshold {self.similarity_threshold} must be a number from 0")
        for name in ("vector_size", "frame_block", "block"):
            if getattr(self, name) < 1:
                raise UserError(f"method focus: {name} is {getattr(self, name)}; it must be at least 1")
        if self.m_tile != -1 and self.m_tile < 1:
            raise UserError(f"method focus: m_tile is {self.m_tile}; it must be at least 1, or -1 for one tile")

    @property
    def emulates(self) -> bool:
        return not self.sec_only

    def begin(self, prefill: Prefill, embeds: Tensor) -> None:
        layers = prefill.shape.layers
        selected = layer_numbers(self.selected_layers, layers)
        if selected and selected[-1] >= layers:
            raise UserError(
                f"method focus: selected layer {selected[-1]} does not exist; the model has {layers}: give other "
                "numbers, or shares of its depth such as selected_layers=0.1,0.3,0.6"
            )
        prefill.state["retention"] = dict(zip(selected, self.retention, strict=True))
        candidates = math.prod(prefill.grid.block_sides(self.frame_block, self.block)) - 1
        if candidates > MAX_CANDIDATES:
            size = f"{self.frame_block}x{self.block}x{self.block}"
            raise UserError(
                f"method focus: a block of {size} has {candidates} candidates here; at most {MAX_CANDIDATES}"
            )

    def at_site(self, prefill: Prefill, layer: int, site: str, x: Tensor) -> Tensor:
        geometry = self.geometry(prefill.grid)
        if self.sec_only:
            vectors = num_vectors(x.shape[1], self.vector_size)
            codes = x.new_full((len(prefill.present), vectors), ITSELF, dtype=torch.uint8)
            prefill.record_site(layer, site, codes, geometry)
            return x
        visual = x[prefill.visual]
        merged = concentrate(
            visual,
            prefill.present,
            prefill.grid,
            threshold=self.similarity_threshold,
            vector_size=self.vector_size,
            frame_block=self.frame_block,
            block=self.block,
            m_tile=self.m_tile,
            max_doublings=geometry.max_doublings,
            rows=self._rows(prefill),
            overwrite=True,
        )
        prefill.write(x, visual)
        prefill.record_site(layer, site, merged.codes, geometry, (merged.zero, merged.similar))
        return x

    def _rows(self, prefill: Prefill) -> Tensor:
        """The candidates' rows of the tokens that are present, looked up once until the next drop."""
        present, rows = prefill.state.get("rows", (None, None))
        if present is not prefill.present:
            rows = candidate_rows(prefill.present, prefill.grid, self.frame_block, self.block, self.m_tile)
            prefill.state["rows"] = prefill.present, rows
        return rows

    def geometry(self, grid: Grid) -> BlockGeometry:
        """The block of candidates, and the pointer-doubling steps: the published bound, or enough to reach any root."""
        doublings = grid.length.bit_length() if self.full_resolution else grid.num_frames
        return BlockGeometry(self.frame_block, self.block, doublings)

    def on_attention(self, prefill: Prefill, layer: int, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        heads, tokens, width = queries.shape
        rows = self.at_site(prefill, layer, "query", queries.transpose(0, 1).reshape(tokens, heads * width))
        queries = rows.view(tokens, heads, width).transpose(0, 1)
        if layer in prefill.state["retention"]:
            before = prompt_importance(queries, keys, 0, prefill.question, scaling, prefill.mask)
            by = "highest attention of a text token"
            prefill.state["importance"] = prefill.note_importance(before[prefill.visual], by)
        return queries

    def after_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        alpha = prefill.state["retention"].get(layer)
        if alpha is None:
            return hidden, None
        importance = prefill.state.pop("importance")
        keep = tokens_to_keep(prefill.grid.length, alpha, len(prefill.present))
        return hidden, prefill.keep(most_important(importance, keep))

    def table_two_sparsity(self, record: PrefillRecord) -> float:
        left = concentrated_operations(record.shape, record.counts, sec_only=self.sec_only)
        return 1 - left / dense_operations(record.shape, record.grid.length)
