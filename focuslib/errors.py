"""The one exception a user's mistake or bad input raises: its message is the whole story, no traceback needed."""


class UserError(ValueError):
    """Bad input, named together with the mend in one line."""
