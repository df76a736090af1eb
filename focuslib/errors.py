"""The one exception a user's mistake or bad input raises: its message is the whole story, no traceback needed."""

import difflib


class UserError(ValueError):
    """Bad input, named together with the mend in one line."""


class InputError(UserError):
    """Input that a method cannot take: the fault of one sample, not of the settings."""


def pick(table, name: str, kind: str):
    """table[name], or a UserError that names the known ones."""
    if name in table:
        return table[name]
    close = difflib.get_close_matches(str(name), list(table), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"unknown {kind} {name!r}; {hint}one of {', '.join(sorted(table))}")
