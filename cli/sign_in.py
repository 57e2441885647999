"""`tunesmith sign-in`: a way into the dashboard, for whoever runs it and whomever they let in."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from typer import Option

from cli.failure import Failed
from cli.options import DATA_DIR, AsJson
from cli.output import show
from cli.running import Looked, settings_of_service

if TYPE_CHECKING:
    from app.core.settings import Settings


Whom = Annotated[str | None, Option("--email", metavar="EMAIL", help="Whom it signs in; the operator unless told.")]


def sign_in(email: Whom = None, data_dir: Looked = None, as_json: AsJson = False) -> None:
    """Print a link to the dashboard that signs somebody in.

    It works once, within a day; with it a forgotten password is replaced. Where settings
    name a database, it is made there, as in a deployment's relay container; otherwise, and
    with --data-dir, in the stack that `tunesmith up` runs there.
    """
    from cli.doctor import configuration

    link = link_for(settings_of_service(configuration.require(), data_dir), data_dir, email)
    show({"link": link}, link, as_json=as_json)


def link_for(settings: "Settings", data_dir: Path | None, email: str | None) -> str:
    """Raises Failed for an address that nobody has, or somebody who is disabled."""
    from app.accounts import bootstrap
    from app.core.errors import AppError

    try:
        return _origin(settings, data_dir or DATA_DIR) + bootstrap.sign_in_link(settings, email=email)
    except AppError as error:
        raise Failed(error) from error


def _origin(settings: "Settings", data_dir: Path) -> str:
    """Where browsers find the dashboard; empty where nobody has said."""
    if settings.dashboard.url:
        return settings.dashboard.url
    with suppress(OSError, ValueError, KeyError):
        url = urlsplit(json.loads((data_dir / "credentials.json").read_text())["base_url"])
        return f"{url.scheme}://{url.netloc}"
    return ""
