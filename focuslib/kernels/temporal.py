"""Tokens that repeat the same place of an earlier frame: FrameFusion, efficient video sampling, DyCoke's two halves."""

import torch
import torch.nn.functional as F
from torch import Tensor

from focuslib.kernels.semantic import most_important


def frame_before(place: Tensor) -> Tensor:
    """Each token's predecessor: the same place's token in the nearest earlier frame, itself where there is none.

    place: [S] int64, equal for the tokens of one place (see Grid.places). Returns [S] int64.
    """
    order = place.argsort(stable=True)
    previous, current = order[:-1], order[1:]
    linked = place[previous] == place[current]
    before = torch.arange(len(place), device=place.device)
    before[current[linked]] = previous[linked]
    return before


def temporal_similarity(x: Tensor, before: Tensor) -> Tensor:
    """Cosine similarity of each token with its predecessor, −∞ where there is none.

    x: [S, D]. before: [S] int64 of `frame_before`. Returns [S] float32.
    """
    similarity = F.cosine_similarity(x.float(), x[before].float(), dim=1)
    return similarity.masked_fill(before == torch.arange(len(x), device=x.device), -torch.inf)


def paired_frames(frames: int) -> list[tuple[int, int]]:
    """(frame, frame it is compared with) of DyCoke's two passes: odd frames, then every fourth from 2."""
    return [(i + 1, i) for i in range(0, frames - 1, 2)] + [(i + 2, i) for i in range(0, frames - 4, 4)]


def paired_similarity(frames: Tensor) -> Tensor:
    """Cosine of each token with the same place's of the frame that its own is compared with; −∞ in the whole frames.

    frames: [F, T, D]. Returns [F, T] float32.
    """
    similarity = frames.new_full(frames.shape[:2], -torch.inf, dtype=torch.float32)
    for frame, reference in paired_frames(len(frames)):
        similarity[frame] = F.cosine_similarity(frames[frame].float(), frames[reference].float(), dim=1)
    return similarity


def temporal_merge(
    frames: Tensor, keep: int, *, drop_odd_last: bool = True, similarity: Tensor | None = None
) -> list[Tensor]:
    """DyCoke's prefill half: of the compared frames the `keep` tokens that are least like the same place's (CVPR 2025).

    frames: [F, T, D]. drop_odd_last: as published, a last frame without a partner vanishes. similarity: of
    `paired_similarity`, where it is known.
    Returns for each frame the places that stay, [k] int64, in the published order: the least similar first.
    """
    count, tokens, _ = frames.shape
    kept = [torch.arange(tokens, device=frames.device) for _ in range(count)]
    similarity = paired_similarity(frames) if similarity is None else similarity
    for frame, _ in paired_frames(count):
        kept[frame] = similarity[frame].sort(stable=True).indices[:keep]
    if count % 2 and count > 1 and drop_odd_last:
        kept[-1] = kept[-1][:0]
    return kept


def decoding_choice(attention: Tensor, last: Tensor | None, keep: int, similarity: float = 0.9) -> Tensor | None:
    """DyCoke's decoding half: the visual entries that this step's later layers see; None: all of them.

    attention: [N] of the new token to the N visual entries, mean over heads; last: of the step before, None in the
    first. New entries are chosen where the two are less alike than `similarity`. Returns [keep] int64, ascending.
    """
    if last is not None and float(F.cosine_similarity(attention, last, dim=0)) >= similarity:
        return None
    return most_important(attention, keep)
