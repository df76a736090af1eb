"""Tensor code compiled where that pays: as it is written for small tensors, and where there is no working compiler."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# From this size on, compiling pays: below it the small operations cost less than the seconds a compiled one takes to
# load. Half a million entries is a tenth of a short video in a model of 7 billion parameters.
LEAST_ENTRIES = 1 << 19

# One graph for each number of candidates, vector size, dtype, inference mode and number of threads that a process
# meets, each of them for any number of tokens and channels. Beyond this many, new ones run as they are written.
_MOST_GRAPHS = 64

_announced = False
_broken = False


def _entries(*arguments: Tensor) -> int:
    """Entries of the first argument."""
    return arguments[0].numel()


class Compiled:
    """A function of tensors, compiled by torch.compile when its arguments are large.

    Sizes may change from call to call without compiling anew, but for those in `static`: what is specialised on.
    What the compiler makes is kept on disk (torch's own cache), for the next process.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        static: dict[int, tuple[int, ...]] | None = None,
        size: Callable[..., int] = _entries,
    ):
        """static: argument number → its dimensions of fixed size. size: how many entries some arguments are worth."""
        self.function = function
        self.static = static or {}
        self.size = size

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        """The function as torch.compile makes it; made on first use, for the compiler alone takes a second to load."""
        return torch.compile(self.function, dynamic=True)

    def wanted(self, *arguments: Tensor) -> bool:
        """Whether a call with these arguments is run compiled."""
        return wants_compiling(self.size(*arguments))

    def __call__(self, *arguments: Tensor) -> Any:
        if not self.wanted(*arguments):
            return self.function(*arguments)
        _announce()
        compiled = self.compiled
        from torch._dynamo.exc import TorchDynamoException  # also what the C++ or Triton compiler reports

        for number, dimensions in self.static.items():
            for dimension in dimensions:
                torch._dynamo.mark_static(arguments[number], dimension)
        try:
            with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS, accumulated_recompile_limit=_MOST_GRAPHS):
                return compiled(*arguments)
        except TorchDynamoException as error:
            _give_up(error)
            return self.function(*arguments)


def wants_compiling(entries: int) -> bool:
    """Whether a function of so many entries is run compiled."""
    return entries >= LEAST_ENTRIES and not _broken


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run everything as it is written, for comparison."""
    global _broken
    before, _broken = _broken, True
    try:
        yield
    finally:
        _broken = before


def _announce() -> None:
    """Say, once a process, why the first large call takes longer."""
    global _announced
    if not _announced:
        _announced = True
        print("focuslib: compiling a kernel (seconds on first use, then kept on disk)", file=sys.stderr)


def _give_up(error: Exception) -> None:
    """Run without a compiler from now on, and say so once."""
    global _broken
    _broken = True
    reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    warnings.warn(
        f"torch.compile does not work here ({reason}); large inputs run uncompiled, several times slower and with more "
        "memory. On a CPU it needs a C++ compiler (g++, clang++ or MSVC), on a GPU Triton.",
        stacklevel=4,
    )
