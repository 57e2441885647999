"""Instants as the API tells them."""

from datetime import datetime
from typing import overload


@overload
def unix(instant: datetime) -> int: ...
@overload
def unix(instant: None) -> None: ...
def unix(instant: datetime | None) -> int | None:
    """Whole seconds since 1970, as the SDK expects every time."""
    return int(instant.timestamp()) if instant else None
