"""Which visual tokens a method left, as a record keeps it: a bit a token, in base64."""

import base64

import numpy as np
from torch import Tensor


def pack_left(left: Tensor, tokens: int) -> str:
    """The positions (0 … tokens − 1) of the visual tokens that are left, [k] int64, in a text of tokens / 6 letters."""
    bits = np.zeros(tokens, dtype=bool)
    bits[left.numpy()] = True
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def unpack_left(text: str, tokens: int) -> np.ndarray:
    """The positions that `pack_left` was given, [k] int64, ascending."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=tokens)
    return np.flatnonzero(bits)
