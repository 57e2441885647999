"""`tunesmith migrate`: bring a database up to date."""

import argparse

from cli.failure import failed


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "Bring the database at TUNESMITH_DATABASE__OWNER_URL up to date. Safe to repeat and to run twice at once."
    parser = subparsers.add_parser("migrate", help="bring the database up to date", description=text)
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    from sqlalchemy.exc import OperationalError

    from app.core.settings import Settings
    from migrations.upgrade import upgrade

    try:
        upgrade(Settings().database.owner_url.get_secret_value())
    except OperationalError as error:
        return failed(f"the database does not answer or refuses: {error.orig}")
    return 0
