"""The command line: one file per command, nothing heavy imported until a command runs.

A command is a function from its arguments to an `Answer`; `main` prints the answer, or the error, in the one way that all commands share.
"""

from dite.cli.app import main

__all__ = ["main"]
