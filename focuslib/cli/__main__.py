"""`python -m focuslib.cli`, where the `focus` script is not on the path."""

from focuslib.cli import main

main()
