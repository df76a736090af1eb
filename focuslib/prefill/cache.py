"""A cache after a drop: it holds fewer entries than tokens were seen, and models count positions by tokens."""

from functools import cache

from transformers import Cache

from focuslib.prefill.masks import Origins


def follow(past: Cache, origins: Origins) -> None:
    """Have a cache know where its entries come from, and count the tokens of the prompt that it lacks as seen."""
    past.focuslib_origins = origins  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(past, _Counted):
        past.__class__ = _counted(type(past))  # a copy of the cache, too, is one of these


class _Counted:
    focuslib_origins: Origins

    def get_seq_length(self, layer_idx: int = 0) -> int:
        entries = super().get_seq_length(layer_idx)  # pyright: ignore[reportAttributeAccessIssue]
        if not entries or layer_idx >= len(self.focuslib_origins.kept):
            return entries
        return entries + self.focuslib_origins.length - self.focuslib_origins.entries(layer_idx)


@cache
def _counted(kind: type[Cache]) -> type[Cache]:
    return type(kind.__name__, (_Counted, kind), {})
