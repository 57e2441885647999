"""How the command says that something went wrong."""

import sys


def failed(why: object) -> int:
    """One line on stderr, whatever the reason's own shape. Returns the exit status."""
    print("tunesmith:", " ".join(str(why).split()), file=sys.stderr)
    return 1
