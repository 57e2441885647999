"""Other tools' configurations as the body of a job: tables of their keys, and what cannot be said by a table."""

from app.core.importing.convert import TOOLS, Ignored, Imported, Mapped, NotRecognised, Refused, convert

__all__ = ["TOOLS", "Ignored", "Imported", "Mapped", "NotRecognised", "Refused", "convert"]
