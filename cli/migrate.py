"""`tunesmith migrate`: bring a database up to date, and make the bucket."""

import argparse
import time
from typing import TYPE_CHECKING

from cli.failure import failed

if TYPE_CHECKING:
    from app.core.settings import Settings


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = (
        "Bring the database at TUNESMITH_DATABASE__OWNER_URL up to date, and make the bucket at TUNESMITH_STORAGE__… if it is "
        "not there. Safe to repeat, and from many machines at once."
    )
    parser = subparsers.add_parser("migrate", help="bring the database up to date", description=text)
    parser.add_argument("--first-key", action="store_true", help="make and print the first API key, if there is none yet")
    parser.add_argument(
        "--wait", type=float, default=60.0, metavar="SECONDS", help="how long to wait for database and storage (%(default)g)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from sqlalchemy.exc import OperationalError

    from app.core.errors import Unavailable
    from cli.doctor import configuration

    settings = configuration.read_or_say()
    if settings is None:
        return 1
    give_up_at, has_said = time.monotonic() + options.wait, False
    while True:
        try:
            return _migrate(settings, is_first_key_wanted=options.first_key)
        except (OperationalError, Unavailable) as error:
            why = f"the database does not answer or refuses: {error.orig}" if isinstance(error, OperationalError) else str(error)
        if time.monotonic() >= give_up_at:
            return failed(why)
        if not has_said:
            failed(f"{why}; waiting up to {options.wait:g} s")
            has_said = True
        time.sleep(1)


def _migrate(settings: "Settings", *, is_first_key_wanted: bool) -> int:
    from app.accounts import bootstrap
    from app.core.storage import open_storage
    from migrations.upgrade import upgrade

    upgrade(settings.database.owner_url.get_secret_value())
    open_storage(settings.storage).ensure_bucket()
    if is_first_key_wanted and (key := bootstrap.ensure_first_key(settings)):
        print(f"The first API key, shown this once: {key}")
    return 0
