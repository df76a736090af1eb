"""A cache after a drop: it holds fewer entries than tokens were seen, and models count positions by tokens."""

from functools import cache

from transformers import Cache

from focuslib.prefill.decoding import Decoding


def follow(past: Cache, decoding: Decoding) -> None:
    """Have a cache know what its prefill left, and count the tokens of the prompt that it lacks as seen."""
    past.focuslib_decoding = decoding  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(past, _Counted):
        past.__class__ = _counted(type(past))  # a copy of the cache, too, is one of these


class _Counted:
    focuslib_decoding: Decoding

    def get_seq_length(self, layer_idx: int = 0) -> int:
        entries = super().get_seq_length(layer_idx)  # pyright: ignore[reportAttributeAccessIssue]
        origins = self.focuslib_decoding.origins
        if not entries or layer_idx >= len(origins.kept):
            return entries
        return entries + origins.length - origins.entries(layer_idx)


@cache
def _counted(kind: type[Cache]) -> type[Cache]:
    return type(kind.__name__, (_Counted, kind), {})
