"""A method that is not Focus and records its sites leaves a trace as Focus does."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_models import clip, untrained_vlm
from torch import Tensor

from focuslib.errors import UserError
from focuslib.hardware.traces import read_counts
from focuslib.kernels.similarity import ITSELF, ZERO
from focuslib.methods.base import Method
from focuslib.prefill.ops import SITES
from focuslib.prefill.record import Prefill
from focuslib.prefill.trace import BlockGeometry, Trace


@dataclass(frozen=True)
class EveryOther(Method):
    """Drops every other visual token after the attention of layer 2; says of every third token left that it is zero.

    follow: of some vectors it says that they follow the token before, the first candidate of a block of 1 × 2 × 2.
    sites: the sites it records.
    """

    name: ClassVar[str] = "every_other"
    follow: bool = False
    sites: tuple[str, ...] = SITES

    def at_site(self, prefill: Prefill, layer: int, site: str, x: Tensor) -> Tensor:
        if site in self.sites:
            codes = torch.full((len(prefill.present), 2), ITSELF, dtype=torch.uint8)
            codes[::3] = ZERO
            if self.follow:
                codes[1::3, 1] = 1
            prefill.record_site(layer, site, codes, BlockGeometry(1, 2, 1) if self.follow else None)
        return x

    def on_attention(self, prefill: Prefill, layer: int, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        self.at_site(prefill, layer, "query", queries)
        return queries

    def after_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if layer != 2:
            return hidden, None
        rows = torch.arange(len(hidden))
        visual = prefill.visual
        return hidden, torch.cat([rows[: visual.start], rows[visual][::2], rows[visual.stop :]])


@pytest.fixture(scope="module")
def vlm():
    return untrained_vlm()


def expected_codes(tokens: int, follow: bool, dropped: bool) -> Tensor:
    """[S, V] of every site: all tokens, or every other one."""
    present = torch.arange(0, tokens, 2 if dropped else 1)
    codes = torch.full((tokens, 2), ZERO, dtype=torch.uint8)
    codes[present] = ITSELF
    codes[present[::3]] = ZERO
    if follow:
        codes[present[1::3], 1] = 1
    return codes


@pytest.mark.parametrize("follow", [False, True])
def test_the_trace_of_a_custom_method(vlm, tmp_path, follow):
    inputs = vlm.prepare(clip(), "What moves?")
    with EveryOther(follow=follow)(vlm, trace=True) as run:
        vlm.prefill(inputs)
    trace, tokens = run.trace, inputs.grid.length
    assert trace.num_layers == 8 and trace.grid == inputs.grid
    assert (trace.frame_block, trace.block, trace.max_doublings) == ((1, 2, 1) if follow else (1, 1, None))
    places = ((0, "q_proj", False), (2, "o_proj", False), (2, "gate_proj", True), (7, "query", True))
    for layer, site, dropped in places:
        codes = expected_codes(tokens, follow, dropped)
        assert torch.equal(trace.codes[site][layer], codes), (layer, site)
        index = torch.arange(tokens)[:, None] - (codes == 1).long()  # who follows, follows the token before
        assert torch.equal(trace.group_index(site, layer), (2 * index + torch.arange(2)).int()), (layer, site)
    trace.save(tmp_path / "a.trace")
    trace.save_pth(tmp_path / "a.pth")
    counts, frames = read_counts(tmp_path / "a.trace")
    assert counts == run.last.counts and frames == inputs.grid.num_frames
    assert read_counts(tmp_path / "a.pth")[0] == counts
    assert torch.equal(Trace.load(tmp_path / "a.trace").mask_zero("query"), trace.mask_zero("query"))


def test_a_method_that_leaves_a_site_out_is_told_which(vlm):
    with EveryOther(sites=("q_proj", "o_proj", "gate_proj", "down_proj"))(vlm, trace=True) as run:
        vlm.prefill(vlm.prepare(clip(), "What moves?"))
    with pytest.raises(UserError, match=r"query was recorded in 0 of 8 layers; a method must record .* in each"):
        _ = run.trace
