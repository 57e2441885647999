"""`tunesmith migrate`: bring a database up to date, and make the bucket."""

import time
from typing import TYPE_CHECKING, Annotated

from typer import Option

from cli.failure import Failed, say
from cli.options import AsJson
from cli.output import show

if TYPE_CHECKING:
    from app.core.settings import Settings

FirstKey = Annotated[bool, Option("--first-key", help="Make and print the first API key, if there is none yet.")]
Wait = Annotated[float, Option(metavar="SECONDS", help="How long to wait for database and storage.")]


def migrate(first_key: FirstKey = False, wait: Wait = 60.0, as_json: AsJson = False) -> None:
    """Bring the database up to date.

    The one at TUNESMITH_DATABASE__OWNER_URL; and make the bucket at
    TUNESMITH_STORAGE__… if it is not there. Safe to repeat, and from many machines at
    once.
    """
    from cli.doctor import configuration

    key = _patiently(configuration.require(), first_key, wait)
    if as_json or key:
        show({"first_key": key}, f"The first API key, shown this once: {key}", as_json=as_json)


def _patiently(settings: "Settings", is_first_key_wanted: bool, seconds: float) -> str | None:
    from sqlalchemy.exc import OperationalError

    from app.core.errors import Unavailable

    give_up_at, has_said = time.monotonic() + seconds, False
    while True:
        try:
            return _migrate(settings, is_first_key_wanted=is_first_key_wanted)
        except (OperationalError, Unavailable) as error:
            why = f"the database does not answer or refuses: {error.orig}" if isinstance(error, OperationalError) else str(error)
            if time.monotonic() >= give_up_at:
                raise Failed(why) from error
        if not has_said:
            say(f"{why}; waiting up to {seconds:g} s")
            has_said = True
        time.sleep(1)


def _migrate(settings: "Settings", *, is_first_key_wanted: bool) -> str | None:
    """The key, where one was wanted and made."""
    from app.accounts import bootstrap
    from app.core.storage import open_storage
    from migrations.upgrade import upgrade

    upgrade(settings.database.owner_url.get_secret_value())
    open_storage(settings.storage).ensure_bucket()
    return bootstrap.ensure_first_key(settings) if is_first_key_wanted else None
