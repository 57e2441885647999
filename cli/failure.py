"""How the command says that something went wrong."""

import sys


class Failed(Exception):
    """What was asked for cannot be done: what, where, and what to do about it. `main` says it, and exits with 1."""


def say(why: object) -> None:
    """One line on stderr, whatever the reason's own shape."""
    print("tunesmith:", " ".join(str(why).split()), file=sys.stderr)
