"""`tunesmith version`."""

from importlib import metadata

from cli.options import AsJson
from cli.output import show


def version(as_json: AsJson = False) -> None:
    """Print the version."""
    released = metadata.version("tunesmith")
    show({"version": released}, released, as_json=as_json)
