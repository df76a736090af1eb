"""Semantic concentration (SEC): keep the visual tokens the prompt attends to. Paper: Focus (HPCA 2026)."""

import itertools

import torch
from torch import Tensor

from focuslib.errors import UserError

# Score of a key that is not seen; not −inf: a row of padding sees nothing, and its NaN would spread.
_HIDDEN = torch.finfo(torch.float32).min
_ROWS = 128  # of attention at a time, at least: products of few rows cost more, and round in another way


def attention_rows(queries: Tensor, keys: Tensor, rows: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of some query rows, without forming the full matrix.

    queries: [H, R, d], the rows asked for. keys: [H_kv, T, d]; H is a multiple of H_kv (grouped-query attention).
    rows: [R] int64, the place of each query in the sequence.
    mask: [1 or H, T, T], bool (True: seen) or float (added to the scores); None: row r sees keys 0 … rows[r].
    Returns [H, R, T] float32.
    """
    tokens = keys.shape[1]
    scores = _scores(queries, keys, scaling)
    seen = seen_keys(rows, tokens) if mask is None else mask if len(rows) == tokens else mask[:, rows]
    if seen.dtype == torch.bool:
        scores.masked_fill_(~seen, _HIDDEN)
    else:
        scores.add_(seen)
    return _softmax(scores)


def causal_attention(queries: Tensor, keys: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """Softmax attention of all query rows, each seeing the keys up to itself: the full matrix, [H, T, T] float32.

    queries: [H, T, d], keys: [H_kv, T, d]. out: memory of the result's shape to write to. Some rows at a time, so that
    little more is computed than is seen.
    """
    heads, tokens, _ = queries.shape
    matrix = queries.new_empty((heads, tokens, tokens), dtype=torch.float32) if out is None else out
    step = max(_ROWS, tokens // 8)
    ends = [*range(0, max(1, tokens - step + 1), step), tokens]
    longest = ends[-1] - ends[-2]
    seen = seen_keys(torch.arange(longest, device=queries.device), longest)
    most = torch.where(seen, torch.inf, _HIDDEN)  # a score at most that: a tenth of the time that filling takes
    for first, last in itertools.pairwise(ends):
        scores = _scores(queries[:, first:last], keys[:, :last], scaling)
        scores[:, :, first:].clamp_(max=most[: last - first, : last - first])
        matrix[:, first:last, :last] = _softmax(scores)
        matrix[:, first:last, last:] = 0
    return matrix


def _scores(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Scaled products [H, R, T] float32 of queries [H, R, d] and keys [H_kv, T, d]."""
    heads, count, _ = queries.shape
    kv_heads, tokens, _ = keys.shape
    grouped = queries.reshape(kv_heads, heads // kv_heads * count, -1)
    return (grouped @ keys.transpose(1, 2)).float().view(heads, count, tokens).mul_(scaling)


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; in place where autograd allows: fresh memory costs as much again."""
    return torch.softmax(scores, -1, out=None if scores.requires_grad else scores)


def seen_keys(rows: Tensor, tokens: int) -> Tensor:
    """Which of `tokens` keys the queries at `rows` see, being no later: [R] → [R, T] bool."""
    return torch.arange(tokens, device=rows.device)[None] <= rows[:, None]


def prompt_importance(
    queries: Tensor, keys: Tensor, start: int, count: int, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """How strongly the prompt attends to each visual token: the maximum over heads and over the text tokens after them.

    queries: [H, T, d], keys: [H_kv, T, d], both after rotary embedding.
    start, count: the visual tokens occupy [start, start + count) of the sequence; text follows them.
    mask: see `attention_rows`; a text token that does not see itself is padding and asks nothing.
    Returns [count] float32. Raises UserError if no text follows.
    """
    tokens = queries.shape[1]
    text = torch.arange(start + count, tokens, device=queries.device)
    if mask is not None:
        itself = mask[0, text, text]
        text = text[itself if itself.dtype == torch.bool else itself >= 0]
    if len(text) == 0:
        raise UserError("no text follows the visual tokens; prompt-guided pruning needs the question after them")
    probabilities = attention_rows(queries[:, text], keys, text, scaling, mask)
    return probabilities[..., start : start + count].amax((0, 1))


def most_important(importance: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` largest entries, ascending; of equal ones the first wins. importance: [N]."""
    return importance.sort(descending=True, stable=True).indices[:keep].sort().values


def tokens_to_keep(total: int, retention: float, left: int) -> int:
    """k = clamp(int(total · retention), 1, left): the tokens a pruning layer keeps of those still present."""
    return max(1, min(int(total * retention), left))
