"""Semantic concentration (SEC): keep the visual tokens the prompt attends to. Paper: Focus (HPCA 2026)."""

import torch
from torch import Tensor

from focuslib.errors import UserError


def attention_rows(queries: Tensor, keys: Tensor, rows: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of some query rows, without forming the full matrix.

    queries: [H, R, d], the rows asked for. keys: [H_kv, T, d]; H is a multiple of H_kv (grouped-query attention).
    rows: [R] int64, the place of each query in the sequence.
    mask: [1 or H, T, T], bool (True: seen) or float (added to the scores); None: row r sees keys 0 … rows[r].
    Returns [H, R, T] float32.
    """
    heads, count, _ = queries.shape
    kv_heads, tokens, _ = keys.shape
    grouped = queries.reshape(kv_heads, heads // kv_heads * count, -1)
    scores = (grouped @ keys.transpose(1, 2)).float().view(heads, count, tokens).mul_(scaling)
    seen = seen_keys(rows, tokens) if mask is None else mask if count == tokens else mask[:, rows]
    if seen.dtype == torch.bool:
        # not −inf: a row of padding sees nothing, and its NaN would spread
        scores.masked_fill_(~seen, torch.finfo(scores.dtype).min)
    else:
        scores.add_(seen)
    # in place where autograd allows: fresh memory costs as much again
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
