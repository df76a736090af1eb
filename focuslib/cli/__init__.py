"""The `focus` command: a thin layer on experiments, hardware and report."""

import sys

from typer.main import get_command

from focuslib.cli.commands import app
from focuslib.cli.group import UsageError, closed_pipe_is_quiet


def main(arguments: list[str] | None = None) -> None:
    """Parse and run; a user's mistake is one line on stderr and exit status 1, one in the options status 2."""
    try:
        with closed_pipe_is_quiet():
            status = get_command(app).main(arguments, prog_name="focus", standalone_mode=False)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "focus"
        if line := " ".join(error.format_message().split()):  # empty after the help that a bare `focus` shows
            print(f"focus: {line} ({command} --help)", file=sys.stderr)
        status = error.exit_code
    sys.exit(status)
