"""The `tunesmith` command. Each subcommand is a module here with `add` and `run`; `run` imports what is heavy."""

import argparse
import os
import sys
from collections.abc import Sequence

from cli import config, data, demo, doctor, import_config, migrate, models, plan, up, version

COMMANDS = (up, demo, data, import_config, doctor, models, plan, config, migrate, version)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status. An expected failure is one line on stderr and status 1."""
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here it is heard that the reader has left, and not when the interpreter ends
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # of `tunesmith models list | head -2`: who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return 141


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    status: int = options.run(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tunesmith",
        description="Fine-tuning as a service that anyone can run: QLoRA jobs behind the OpenAI fine-tuning API.",
        epilog="Begin with `tunesmith up`: it runs all there is on this machine and writes an API key for you.",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
