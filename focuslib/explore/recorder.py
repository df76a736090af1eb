"""Watch a method at work: what it did and how similar its inputs were, in the reduced form that the explorer draws."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from focuslib.errors import UserError
from focuslib.grid import Grid, VisualGrid
from focuslib.kernels.semantic import prompt_importance
from focuslib.kernels.similarity import ITSELF, ZERO, concentrate, num_vectors
from focuslib.methods import Method
from focuslib.methods.focus import Focus
from focuslib.prefill.decoding import Decoding
from focuslib.prefill.ops import SITES
from focuslib.prefill.record import Events, Prefill, Ranking
from focuslib.prefill.trace import Trace

AFTER_ATTENTION = ("gate_proj", "down_proj")  # sites behind the drop between attention and MLP
NEVER = -1  # stage of a token that no layer drops
Candidates = list[tuple[int | None, tuple[int, int, int]]]
BYTES = 40_000_000  # of a view's arrays, before compression; beyond it fewer vectors a token are kept


class Cancelled(Exception):
    """The user stopped a run."""


def threshold_steps(threshold: float) -> np.ndarray:
    """The thresholds that can be chosen in a view: thousandths from 0 to 1, and the run's own. Float64, ascending."""
    return np.union1d(np.arange(1001) / 1000, [threshold])


def stage_of(layer: int, site: str) -> int:
    """Stages count the places where tokens can be dropped: before each layer's attention, and before its MLP."""
    return 2 * layer + (site in AFTER_ATTENTION)


def shown_vectors(tokens: int, layers: int, vectors: dict[str, int]) -> dict[str, np.ndarray]:
    """Which vectors of a token are kept one by one at each site: all, or as many evenly spread ones as BYTES allow."""
    fits = [k for k in range(1, max(vectors.values()) + 1) if tokens * layers * _bytes(vectors, k) <= BYTES]
    most = max(fits, default=1)
    return {site: np.linspace(0, count - 1, min(count, most)).round().astype(int) for site, count in vectors.items()}


def _bytes(vectors: dict[str, int], most: int) -> int:
    """Bytes a token and layer: 3 a shown vector, 6 for each site's summary."""
    return sum(3 * min(count, most) + 6 for count in vectors.values())


@dataclass
class SiteView:
    """One GEMM site over L layers and S original visual tokens of V vectors, K of which are shown one by one.

    mean [L, S] uint8: mean best cosine similarity of the token's vectors that are not zero, in 255ths. similar, zero
    [L, S] uint16: how many of its V vectors are. follows [L, S] uint8: the candidate that most of its similar vectors
    follow, ITSELF without one, ZERO if all are zero.
    codes [L, S, K] uint8: as in trace.Trace. steps [L, S, K] uint16: how many thresholds of `threshold_steps` lie below
    the vector's best similarity. above [L, N] int32: how many of all S·V vectors are above each of the N thresholds.
    mean, steps and above are None for a trace, which holds no similarities.
    """

    vectors: int
    shown: np.ndarray
    codes: np.ndarray
    similar: np.ndarray
    zero: np.ndarray
    follows: np.ndarray
    mean: np.ndarray | None = None
    steps: np.ndarray | None = None
    above: np.ndarray | None = None

    @classmethod
    def stack(cls, layers: list[dict[str, Tensor]], shown: np.ndarray, vectors: int) -> "SiteView":
        """From `reduce_site` of every layer."""
        arrays = {name: torch.stack([layer[name] for layer in layers]).numpy() for name in layers[0]}
        for name in ("similar", "zero", "steps"):
            if name in arrays:
                arrays[name] = arrays[name].astype(np.uint16)
        return cls(vectors, shown, **arrays)


def reduce_site(
    codes: Tensor, shown: np.ndarray, best: Tensor | None = None, steps: np.ndarray | None = None
) -> dict[str, Tensor]:
    """One layer of a SiteView: codes [S, V] uint8; best similarities [S, V] float32, 0 where absent, or None."""
    zero, columns = codes == ZERO, torch.from_numpy(shown).to(codes.device)
    similar = ~zero & (codes != ITSELF)
    candidates = int(codes.masked_fill(zero, ITSELF).max()) + 1
    votes = torch.stack([(codes == candidate).sum(1) for candidate in range(1, max(2, candidates))])
    most, follows = votes.max(0)
    follows = torch.where(most > 0, follows + 1, ITSELF).masked_fill(zero.all(1), ZERO)
    reduced = {
        "codes": codes[:, columns],
        "similar": similar.sum(1, dtype=torch.int32),
        "zero": zero.sum(1, dtype=torch.int32),
        "follows": follows.to(torch.uint8),
    }
    if best is not None and steps is not None:
        rank = torch.bucketize(best, torch.from_numpy(steps).float().to(best.device), out_int32=True)
        reduced["mean"] = (255 * best.sum(1) / (~zero).sum(1).clamp(min=1)).round().clamp(0, 255).to(torch.uint8)
        reduced["steps"] = rank[:, columns]
        below = torch.bincount(rank.view(-1), minlength=len(steps) + 1).cumsum(0)[: len(steps)]
        reduced["above"] = (rank.numel() - below).int()
    return {name: tensor.cpu() for name, tensor in reduced.items()}


@dataclass
class Recording:
    """What a view shows of one prefill, beside its PrefillRecord.

    sites: site → SiteView. dropped [S] int16: the first stage (`stage_of`) that lacks the token, or NEVER.
    importance [L, S] float32: how strongly the prompt attends to each token (semantic.prompt_importance), 0 where it is
    dropped; None if unknown. applied: whether the similarities were used by the method, or only measured beside it.
    candidates: distance in tokens and (frames, rows, columns) of each candidate; the distance is None where it is not
    the same for every token. neighbours [C, S] int32: the number of each token's candidates then, < 0 if none.
    rankings: what the method ranked the tokens by.
    """

    grid: Grid
    sites: dict[str, SiteView]
    dropped: np.ndarray
    candidates: Candidates
    doublings: int
    thresholds: np.ndarray
    threshold: float | None
    applied: bool
    importance: np.ndarray | None = None
    neighbours: np.ndarray | None = None
    rankings: list[Ranking] = field(default_factory=list)


def candidates(grid: Grid, frame_block: int, block: int) -> Candidates:
    """Distance and (frames, rows, columns) of each candidate, in the order of Grid.block_places."""
    places = grid.block_places(frame_block, block)
    if isinstance(grid, VisualGrid):
        return list(zip(grid.block_offsets(frame_block, block), places, strict=True))
    return [(None, place) for place in places]


def neighbours(grid: Grid, frame_block: int, block: int) -> np.ndarray | None:
    """The number of each token's candidates, [C, S] int32, where no distances say it."""
    if isinstance(grid, VisualGrid):
        return None
    return grid.candidates(torch.arange(grid.length), frame_block, block).int().numpy()


class Recorder(Events):
    """A method under observation: installed in its place, it passes every event on and notes what a view shows.

    Implements prefill.record.Events.

    probe: whose settings the similarities are measured with at every site; the method itself if that is Focus.
    on_layer: called with the layer's number at the start of each layer of a prefill; what it raises stops the run.
    """

    def __init__(self, method: Method, probe: Focus, on_layer: Callable[[int], None]):
        self.method = method
        self.probe = probe
        self.on_layer = on_layer
        self.thresholds = threshold_steps(probe.similarity_threshold)

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def watched_layer(self) -> int | None:
        return self.method.watched_layer

    def begin(self, prefill: Prefill, embeds: Tensor) -> None:
        self.grid, self.record = prefill.grid, prefill.record
        widths = {site: prefill.shape.site_channels(site) for site in SITES}
        self.vectors = {site: num_vectors(width, min(width, self.probe.vector_size)) for site, width in widths.items()}
        self.shown = shown_vectors(prefill.grid.length, prefill.shape.layers, self.vectors)
        self.layers: dict[str, list[dict[str, Tensor]]] = {site: [] for site in SITES}
        self.importance: list[Tensor] = []
        self.dropped = torch.full((prefill.grid.length,), NEVER, dtype=torch.int16)
        self.method.begin(prefill, embeds)

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.method.before_attention(prefill, layer, hidden)

    def at_site(self, prefill: Prefill, layer: int, site: str, x: Tensor) -> Tensor:
        if site == "q_proj":
            self.on_layer(layer)
        self._observe(prefill, layer, site, x[prefill.visual])
        return self.method.at_site(prefill, layer, site, x)

    def on_attention(self, prefill: Prefill, layer: int, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        self._observe(prefill, layer, "query", queries[:, prefill.visual].transpose(0, 1).flatten(1))
        queries = self.method.on_attention(prefill, layer, queries, keys, scaling)
        if prefill.question < queries.shape[1]:
            row = torch.zeros(prefill.grid.length)
            importance = prompt_importance(queries, keys, 0, prefill.question, scaling, prefill.mask)
            row[prefill.present.cpu()] = importance[prefill.visual].cpu()
            self.importance.append(row)
        return queries

    def wants_probabilities(self, prefill: Prefill, layer: int) -> bool:
        return self.method.wants_probabilities(prefill, layer)

    def on_probabilities(self, prefill: Prefill, layer: int, head: int, probabilities: Tensor) -> Tensor:
        return self.method.on_probabilities(prefill, layer, head, probabilities)

    def after_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.method.after_attention(prefill, layer, hidden)

    def end(self, prefill: Prefill) -> None:
        self.method.end(prefill)

    def on_decoding(self, decoding: Decoding, layer: int) -> Tensor | None:
        return self.method.on_decoding(decoding, layer)

    def _observe(self, prefill: Prefill, layer: int, site: str, x: Tensor) -> None:
        probe, present = self.probe, prefill.present
        found = concentrate(
            x,
            present,
            prefill.grid,
            threshold=probe.similarity_threshold,
            vector_size=probe.vector_size,
            frame_block=probe.frame_block,
            block=probe.block,
            m_tile=probe.m_tile,
            max_doublings=0,
        )
        shape = (prefill.grid.length, found.codes.shape[1])
        codes = found.codes.new_full(shape, ZERO).index_copy_(0, present, found.codes)
        best = found.similarity.new_zeros(shape).index_copy_(0, present, found.similarity)
        self.layers[site].append(reduce_site(codes, self.shown[site], best, self.thresholds))
        gone = self.dropped == NEVER
        gone[present.cpu()] = False
        self.dropped[gone] = stage_of(layer, site)

    def recording(self) -> Recording:
        """What the latest prefill showed."""
        probe, grid = self.probe, self.grid
        doublings = probe.geometry(grid).max_doublings
        return Recording(
            grid=grid,
            sites={site: SiteView.stack(self.layers[site], self.shown[site], self.vectors[site]) for site in SITES},
            dropped=self.dropped.numpy(),
            candidates=candidates(grid, probe.frame_block, probe.block),
            doublings=grid.num_frames if doublings is None else doublings,
            thresholds=self.thresholds,
            threshold=probe.similarity_threshold,
            applied=self.method is probe and not probe.sec_only,
            importance=torch.stack(self.importance).numpy() if self.importance else None,
            neighbours=neighbours(grid, probe.frame_block, probe.block),
            rankings=self.record.rankings,
        )


def trace_recording(trace: Trace) -> Recording:
    """The same from a trace, which holds no similarities and no importance. Raises UserError for a damaged one."""
    tokens, layers = trace.grid.length, trace.num_layers
    vectors = {site: trace.codes[site][0].shape[1] for site in SITES}
    shown = shown_vectors(tokens, layers, vectors)
    grid, block = trace.grid, (trace.frame_block, trace.block)
    targets = torch.cat([torch.arange(tokens)[None], grid.candidates(torch.arange(tokens), *block)])
    sites = {}
    for site in SITES:
        reduced = [reduce_site(_possible(codes, targets), shown[site]) for codes in trace.codes[site]]
        sites[site] = SiteView.stack(reduced, shown[site], vectors[site])
    dropped = np.full(tokens, NEVER, np.int16)
    after = 2 * layers
    for stage in reversed(range(after)):  # a token is dropped at the first stage from which on it is always missing
        site = "gate_proj" if stage % 2 else "q_proj"
        missing = sites[site].zero[stage // 2] == vectors[site]
        dropped[missing & ((dropped == stage + 1) | (stage == after - 1))] = stage
    doublings = trace.grid.num_frames if trace.max_doublings is None else trace.max_doublings
    near = neighbours(grid, *block)
    return Recording(
        grid, sites, dropped, candidates(grid, *block), doublings, threshold_steps(0.0), None, True, neighbours=near
    )


def _possible(codes: Tensor, targets: Tensor) -> Tensor:
    """The codes [S, V], if every one leads to a token. targets: [1 + C, S], the token itself, then its candidates."""
    candidate = codes.masked_fill(codes == ZERO, ITSELF)
    if int(candidate.max()) >= len(targets) or int(targets.T.gather(1, candidate.long()).min()) < 0:
        raise UserError("the trace names neighbours that its grid does not have; record it again")
    return codes
