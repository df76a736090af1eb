"""The visual grid travels with the inputs: handed over for the length of a run, never kept on the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from focuslib.errors import UserError
from focuslib.grid import Grid

_running: ContextVar[tuple[tuple[nn.Module, Grid | None], ...]] = ContextVar("running", default=())


@contextmanager
def handed_over(model: nn.Module, grid: Grid | None) -> Iterator[None]:
    """For the length of the block, every prompt that `model` runs has this grid (None: no visual tokens)."""
    token = _running.set((*_running.get(), (model, grid)))
    try:
        yield
    finally:
        _running.reset(token)


def grid_of(vlm) -> Grid | None:
    """The grid of the prompt that `vlm.model` runs now; of an object with a `grid` of its own, that of all its prompts.

    Raises
    ------
    UserError
        If nobody handed one over: the patch would have to guess which tokens are visual.
    """
    for model, grid in reversed(_running.get()):
        if model is vlm.model:
            return grid
    if hasattr(vlm, "grid"):
        return vlm.grid
    raise UserError(
        "the visual grid of this forward is unknown; run the inputs by vlm.prefill(inputs) or generate_ids(inputs), or "
        "a call of your own inside `with vlm.running(inputs):`"
    )
