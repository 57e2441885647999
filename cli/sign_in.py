"""`tunesmith sign-in`: the way into the dashboard for whoever runs it."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cli.options import DATA_DIR, AsJson
from cli.output import show
from cli.running import Looked, settings_of_service

if TYPE_CHECKING:
    from app.core.settings import Settings


def sign_in(data_dir: Looked = None, as_json: AsJson = False) -> None:
    """Print a link to the dashboard that signs the operator in.

    It works once, within a day. Where settings name a database, it is made there, as in
    a deployment's relay container; otherwise, and with --data-dir, in the stack that
    `tunesmith up` runs there.
    """
    from app.accounts import bootstrap
    from cli.doctor import configuration

    settings = settings_of_service(configuration.require(), data_dir)
    link = _origin(settings, data_dir or DATA_DIR) + bootstrap.sign_in_link(settings)
    show({"link": link}, link, as_json=as_json)


def _origin(settings: "Settings", data_dir: Path) -> str:
    """Where browsers find the dashboard; empty where nobody has said."""
    if settings.dashboard.url:
        return settings.dashboard.url
    with suppress(OSError, ValueError, KeyError):
        url = urlsplit(json.loads((data_dir / "credentials.json").read_text())["base_url"])
        return f"{url.scheme}://{url.netloc}"
    return ""
