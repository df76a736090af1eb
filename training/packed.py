"""Many questions after one clip in one forward pass, with the same result as a prompt for each.

The visual prefix is computed once; every question sees the prefix and itself, at the positions it would have alone.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

ATTENTION = "packed_questions"


@dataclass
class Watch:
    """Collects how much of some rows' attention, in some layers, falls on some columns of the prefix.

    Attributes:
        layers: the layers to watch.
        rows: int64 [B, N], a token of each slot.
        columns: bool [B, N, P].
        shares: filled by the forward pass: [B, N] a layer, the mean over heads of the share of the prefix's attention.
    """

    layers: tuple[int, ...]
    rows: torch.Tensor
    columns: torch.Tensor
    shares: list[torch.Tensor] = field(default_factory=list)

    def look(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """query [B, H, N, T, D] of the slots, key [B, KV, P, D] of the prefix."""
        B, H, N, _, D = query.shape
        rows = query.gather(3, self.rows[:, None, :, None, None].expand(B, H, N, 1, D)).reshape(B, key.shape[1], -1, D)
        attention = (rows @ key.transpose(2, 3) * scaling).softmax(-1).reshape(B, H, N, -1)
        self.shares.append((attention * self.columns[:, None]).sum(-1).mean(1))


def _attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling,
    *,
    prefix: int,
    slot: int,
    watch: Watch | None = None,
    barred=None,
    **_,
):
    """Attention of [prefix][slot][slot]…: query [B, H, L, D], key and value [B, KV, L, D] → [B, L, H, D]."""
    B, H, L, D = query.shape
    KV, N = key.shape[1], (L - prefix) // slot

    def repeat(x):
        return x.repeat_interleave(H // KV, 1)

    head = F.scaled_dot_product_attention(
        query[:, :, :prefix], repeat(key[:, :, :prefix]), repeat(value[:, :, :prefix]), is_causal=True, scale=scaling
    )
    if watch is not None and module.layer_idx in watch.layers:
        watch.look(query[:, :, prefix:].unflatten(2, (N, slot)), key[:, :, :prefix], scaling)
    # The heads of one KV group become more rows of one query matrix, so keys need not be repeated.
    q = query[:, :, prefix:].reshape(B, KV, H // KV, N, slot, D).permute(0, 3, 1, 2, 4, 5).reshape(B * N, KV, -1, D)

    def after_prefix(x):
        own = x[:, :, prefix:].reshape(B, KV, N, slot, D).transpose(1, 2)
        shared = x[:, None, :, :prefix].expand(B, N, KV, prefix, D)
        return torch.cat((shared, own), 3).reshape(B * N, KV, prefix + slot, D)

    mask = query.new_ones(slot, prefix + slot, dtype=torch.bool).tril(prefix).repeat(H // KV, 1)
    if barred is not None:  # a mask for each slot
        mask = mask & ~barred[module.layer_idx].flatten(0, 1).repeat(1, H // KV, 1)[:, None]
    tail = F.scaled_dot_product_attention(q, after_prefix(key), after_prefix(value), attn_mask=mask, scale=scaling)
    tail = tail.reshape(B, N, KV, H // KV, slot, D).permute(0, 2, 3, 1, 4, 5).reshape(B, H, L - prefix, D)
    return torch.cat((head, tail), 2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)


def packed_forward(
    decoder,
    prefix: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    watch: Watch | None = None,
    barred: list[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Run a Qwen2 decoder, whose attention implementation is ATTENTION, on packed questions.

    Args:
        prefix: embeddings [B, P, D] of the shared part; positions: int64 [B, P], their positions (not consecutive where
            tokens were dropped); the questions go on from the last of them.
        slots: embeddings [B, N, T, D] of the questions; watch: see Watch; barred: for each layer, bool
            [B, N, T, P + T], the keys that a question's rows may not see although they come earlier.

    Returns:
        The hidden states after each layer, the last one normalised: ``[B, P + N·T, D]`` each.
    """
    B, N, T, D = slots.shape
    after = positions[:, -1:, None] + 1 + torch.arange(T, device=slots.device)
    positions = torch.cat((positions, after.expand(B, N, T).reshape(B, N * T)), 1)
    hidden = torch.cat((prefix, slots.reshape(B, N * T, D)), 1)
    rotary = decoder.rotary_emb(hidden, positions)
    states = []
    for layer in decoder.layers:
        hidden = layer(
            hidden,
            attention_mask=None,
            position_embeddings=rotary,
            prefix=prefix.shape[1],
            slot=T,
            watch=watch,
            barred=barred,
        )
        states.append(hidden)
    states[-1] = decoder.norm(hidden)
    return states
