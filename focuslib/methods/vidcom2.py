"""VidCom2: keep the tokens that differ most from their frame and the video, more of the unusual frames. EMNLP 2025."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from focuslib.kernels.outliers import frame_counts, frame_shares, mean_similarities, outliers
from focuslib.methods.base import Method
from focuslib.methods.budget import check_choice, check_share, check_target, tokens_for
from focuslib.methods.frames import frame_sizes, newlines
from focuslib.prefill.record import Prefill

STEPS = 40  # of the bisection for a target: far below one token


@dataclass(frozen=True)
class VidCom2(Method):
    """VidCom2, with the published default.

    retention: share of the visual tokens that are kept, on average over the frames (R). target_sparsity: keep what
    makes the counted sparsity this instead; None: retention holds. positions: "published" renumbers the tokens that are
    left (models whose positions have several axes keep them, as published for Qwen), "original" leaves their positions.

    Acts on the projected features, before layer 0. Newline tokens are not ranked and all stay, at their place
    (published: at the end of their frame). Costs a few passes over the features.
    Results: details importance ([S] float32: minus the similarity with the means, ∞ for newlines).
    """

    name: ClassVar[str] = "vidcom2"
    needs_all: ClassVar[str] = "first"

    retention: float = 0.25
    target_sparsity: float | None = None
    positions: str = "published"

    def __post_init__(self):
        check_choice(self.name, "positions", self.positions, "original")
        check_share(self.name, "retention", self.retention)
        check_target(self.name, self.target_sparsity)

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if layer > 0:
            return hidden, None
        x = hidden[prefill.visual]
        ranked, first = ~newlines(x, prefill.grid), 0
        importance = torch.full((len(x),), torch.inf, device=x.device)
        parts = []  # of each medium: the numbers of its ranked tokens, their two similarities, their frames
        for sizes in frame_sizes(self.name, prefill.grid):
            frame = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(x.device)
            index = torch.arange(first, first + len(frame), device=x.device)
            frame, index, first = frame[ranked[index]], index[ranked[index]], first + len(frame)
            video, own = mean_similarities(x[index], frame)
            importance[index] = -(video + own)
            parts.append((index, video, own, frame))
        total = int(ranked.sum())
        share = self.retention
        if self.target_sparsity is not None:
            wanted = tokens_for(self.name, prefill, self.target_sparsity) - (len(x) - total)
            share = matching_share(parts, max(1, wanted))
        stays = ~ranked
        for index, video, own, frame in parts:
            sizes = torch.bincount(frame).tolist()
            stays[index[outliers(video + own, sizes, frame_counts(frame_shares(video, frame, share), sizes))]] = True
        prefill.note_importance(importance, "difference from the means of frame and video")
        prefill.renumber(self.positions == "published")
        return hidden, prefill.keep(stays)


def matching_share(parts: list, wanted: int) -> float:
    """The retention that keeps about `wanted` tokens of all media together; frames keep whole tokens, at least one."""
    low, high = 0.0, 2.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        kept = 0
        for _, video, _, frame in parts:
            kept += sum(frame_counts(frame_shares(video, frame, middle), torch.bincount(frame).tolist()))
        low, high = (middle, high) if kept < wanted else (low, middle)
    return high
