"""`tunesmith up`: everything on one machine."""

import argparse
import sys
from pathlib import Path

from cli.failure import failed

DESCRIPTION = """\
Run Tunesmith on this machine: Postgres, Valkey, S3, the API, the workers and an engine, supervised, in the foreground.

An engine is started for each of TUNESMITH_TRAINING__QUANTIZATIONS ('["nf4", "int8"]'; by default nf4 alone), and jobs may
have their base held in those ways.

When all is ready DATA_DIR/credentials.json holds {"base_url": ..., "api_key": ...}, both for the OpenAI client.
Ctrl-C stops everything in order, a second Ctrl-C at once. What was made stays in DATA_DIR for the next start."""


DATA_DIR, PORT, HOST = Path(".tunesmith"), 8000, "127.0.0.1"  # unless told otherwise


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "up",
        help="run the whole service on this machine",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, metavar="DIR", help="where all data lies (%(default)s)")
    parser.add_argument("--port", type=_port, default=PORT, help="the API's port (%(default)s)")
    parser.add_argument("--host", default=HOST, help="the address the API listens on (%(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cli.doctor import configuration

    try:
        from worker.embedded import StackError, stack
    except ImportError as error:
        return failed(f"{error}; `tunesmith up` needs: pip install 'tunesmith[embedded]'")
    settings = configuration.read_or_say()
    if settings is None or not all(map(configuration.is_fit, (configuration.catalog(settings), configuration.prices(settings)))):
        return 1
    try:
        stack.up(options.data_dir, settings, host=options.host, port=options.port, console=sys.stdout)
    except (StackError, OSError) as error:
        return failed(error)
    return 0


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"a port is a number from 1 to 65535, not {text!r}")
    return int(text)
