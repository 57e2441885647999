"""Which running service an operator's command is about."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from cli.failure import Failed
from cli.options import DATA_DIR

if TYPE_CHECKING:
    from app.core.settings import Settings

Looked = Annotated[Path | None, Option("--data-dir", metavar="DIR", help=f"What `tunesmith up` runs there ({DATA_DIR}).")]


def settings_of_service(settings: "Settings", data_dir: Path | None) -> "Settings":
    """Those of the service that is asked about. Raises Failed."""
    from cli.doctor import services

    if data_dir is None and services.are_named(settings):
        return settings
    try:
        from worker.embedded.errors import StackError
        from worker.embedded.servers import settings_of
    except ImportError as error:
        raise Failed(f"{error}: no stack of `tunesmith up` can be here, and the settings name no service") from error
    try:
        return settings_of(data_dir or DATA_DIR, settings)
    except StackError as error:
        raise Failed(error) from error
