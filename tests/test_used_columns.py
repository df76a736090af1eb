"""Columns in use, against a plain loop."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from focuslib.kernels.motion import used_columns

shapes = st.lists(st.integers(0, 3), min_size=1, max_size=2)


@given(shapes=st.lists(shapes, min_size=1, max_size=2), columns=st.integers(0, 6), data=st.data())
def test_used_columns_end_at_the_last_that_is_not_zero(shapes, columns, data):
    entries = st.sampled_from([0.0, 0.0, 0.0, -0.0, 1.0, -1.0, float("nan")])
    tensors = []
    for shape in shapes:
        x = torch.zeros(*shape, columns)
        for place in range(x.numel()):
            x.view(-1)[place] = data.draw(entries)
        tensors.append(x)
    used = [c + 1 for c in range(columns) if any((x[..., c] != 0).any() for x in tensors)]
    assert used_columns(*tensors) == max(used, default=0)
