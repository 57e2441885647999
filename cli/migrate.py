"""`tunesmith migrate`: bring a database up to date, and make the bucket."""

import argparse

from cli.failure import failed


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = (
        "Bring the database at TUNESMITH_DATABASE__OWNER_URL up to date, and make the bucket at TUNESMITH_STORAGE__… if it is "
        "not there. Safe to repeat, and from many machines at once."
    )
    parser = subparsers.add_parser("migrate", help="bring the database up to date", description=text)
    parser.add_argument("--first-key", action="store_true", help="make and print the first API key, if there is none yet")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from sqlalchemy.exc import OperationalError

    from app.accounts import bootstrap
    from app.core.errors import Unavailable
    from app.core.settings import Settings
    from app.core.storage import open_storage
    from migrations.upgrade import upgrade

    settings = Settings()
    try:
        upgrade(settings.database.owner_url.get_secret_value())
        open_storage(settings.storage).ensure_bucket()
        if options.first_key and (key := bootstrap.ensure_first_key(settings)):
            print(f"The first API key, shown this once: {key}")
    except OperationalError as error:
        return failed(f"the database does not answer or refuses: {error.orig}")
    except Unavailable as error:
        return failed(error)
    return 0
