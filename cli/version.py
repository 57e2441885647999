"""`tunesmith version`."""

import argparse
from importlib.metadata import version


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    subparsers.add_parser("version", help="print the version").set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    print(version("tunesmith"))
    return 0
