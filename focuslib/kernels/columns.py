"""Columns that are all zero: half of a causal attention matrix is, and they add nothing to a distance."""

from torch import Tensor


def used_columns(*x: Tensor) -> int:
    """How many columns there are up to the last that is not all zero in all of x: [..., R, C] each. NaN is not zero."""
    columns = x[0].shape[-1]
    if columns == 0 or any(rows[..., -1].any() for rows in x):
        return columns
    used = 0
    for rows in x:
        if rows.numel():
            over = tuple(range(rows.dim() - 1))
            nonzero = ((rows.amax(over) != 0) | (rows.amin(over) != 0)).nonzero()
            used = max(used, int(nonzero[-1]) + 1 if len(nonzero) else 0)
    return used
