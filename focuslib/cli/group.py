"""What all commands share: a mistake is one line, a missing extra is named, interrupts and closed pipes end quietly."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from focuslib.errors import UserError, extra_of, needs_extra

# click's, of which typer carries a copy in its later versions: either way it is what BadParameter is made of
UsageError: Any = typer.BadParameter.__mro__[1]

# these need [lab], which includes [eval]; the first package they miss may be one of [eval]
_OF_LAB = ("check", "fetch", "plan", "report", "reproduce", "verify")


class Commands(TyperGroup):
    """The commands, whose errors become a line and an exit status."""

    def invoke(self, ctx: Any) -> int:
        """Run a command; returns its exit status."""
        try:
            return super().invoke(ctx) or 0
        except UserError as error:
            return _fail(str(error))
        except ModuleNotFoundError as error:
            command, extra = ctx.invoked_subcommand, extra_of(error)
            if extra is None:
                raise
            return _fail(str(needs_extra(command, "lab" if command in _OF_LAB else extra)))
        except KeyboardInterrupt:
            return _fail("interrupted; run the same command again to go on from here", 130)


def _fail(line: str, status: int = 1) -> int:
    print(f"focus: {line}", file=sys.stderr)
    return status


@contextmanager
def closed_pipe_is_quiet() -> Iterator[None]:
    """What is printed in the block reaches its reader, or is dropped if that has gone, as in `focus check | head`."""
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
