from typing import Any, Literal

from pydantic import BaseModel

from app.core import data
from app.core.clock import unix
from app.core.data_report import brief
from app.core.errors import BadRequest
from app.models import File

PURPOSES = (data.TO_TRAIN, data.TO_EVALUATE)
MIN_EXPIRY, MAX_EXPIRY = 3600, 2_592_000


class FileOut(BaseModel):
    """A file as the SDK knows it; `report` is ours: what validation found, line by line. Pages of files leave the lines out."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str
    status_details: str | None
    report: dict[str, Any] | None

    @classmethod
    def of(cls, file: File, *, is_listed: bool = False) -> "FileOut":
        return cls(
            id=file.id,
            bytes=file.size_bytes,
            created_at=unix(file.created_at),
            expires_at=unix(file.expires_at),
            filename=file.filename,
            purpose=file.purpose,
            status=file.status,
            status_details=file.status_details,
            report=brief(file.report) if file.report and is_listed else file.report,
        )


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class UploadFields(BaseModel):
    """The form fields beside the file."""

    purpose: str
    expires_after_seconds: int | None = None

    @classmethod
    def parse(cls, fields: dict[str, str]) -> "UploadFields":
        """Raises BadRequest."""
        purpose = fields.get("purpose")
        if purpose is None:
            raise BadRequest(
                "the field `purpose` is required: 'fine-tune' or 'evals'", param="purpose", code="missing_required_parameter"
            )
        if purpose not in PURPOSES:
            raise BadRequest(f"purpose must be one of {', '.join(PURPOSES)}, not {purpose[:64]!r}", param="purpose")
        return cls(purpose=purpose, expires_after_seconds=_expiry(fields))


def _expiry(fields: dict[str, str]) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise BadRequest("expires_after[anchor] must be 'created_at'", param="expires_after[anchor]")
    if seconds is None or not seconds.isdecimal() or not MIN_EXPIRY <= int(seconds) <= MAX_EXPIRY:
        message = f"expires_after[seconds] must be a number from {MIN_EXPIRY} to {MAX_EXPIRY}"
        raise BadRequest(message, param="expires_after[seconds]")
    return int(seconds)
