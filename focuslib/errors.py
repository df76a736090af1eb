"""The one exception a user's mistake or bad input raises: its message is the whole story, no traceback needed."""

import difflib
from collections.abc import Collection
from typing import Any


class UserError(ValueError):
    """Bad input, named together with the fix in one line."""


class InputError(UserError):
    """Input that a method cannot take: the fault of one sample, not of the settings."""


def pick(table, name: str, kind: str):
    """table[name], or a UserError that names the known ones."""
    if name in table:
        return table[name]
    raise UserError(unknown(name, table, kind))


def unknown(name: Any, known: Collection[str], kind: str) -> str:
    """One line on a name that is not among the known ones, with the one that was perhaps meant."""
    close = difflib.get_close_matches(str(name)[:80], known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    choice = f"one of {', '.join(sorted(known))}" if known else "there is none"
    return f"unknown {kind} {brief(name)}; {hint}{choice}"


def brief(value: Any) -> str:
    """A value as Python writes it, in one line of at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        text = f"a huge {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}…"


# extra of pyproject.toml → the packages of it that are imported here; [lab] includes [eval]
EXTRAS = {
    "eval": ("datasets", "lmms_eval", "loguru", "pandas", "scipy"),
    "lab": (
        "IPython", "anywidget", "ipywidgets", "matplotlib", "nbclient", "nbconvert", "nbformat", "papermill", "seaborn",
        "traitlets",
    ),
    "int8": ("bitsandbytes",),
    "cluster": ("ray",),
}  # fmt: skip


def extra_of(error: ModuleNotFoundError) -> str | None:
    """The extra that a missing package belongs to; None if it is of none, and so a fault rather than a choice."""
    package = str(error.name).partition(".")[0].replace("-", "_")
    return next((extra for extra, packages in EXTRAS.items() if package in packages), None)


def needs_extra(what: str, extra: str) -> UserError:
    """The one line for something whose extra is not installed."""
    return UserError(f"{what} needs the extra [{extra}]: pip install 'focuslib[{extra}]'")
