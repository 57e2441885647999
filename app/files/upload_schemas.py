from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from app.core.clock import unix
from app.files.schemas import MAX_EXPIRY, MIN_EXPIRY, FileOut
from app.models import File, Upload, UploadPart
from app.schemas import Request, without_nul

MAX_PARTS = 10_000

Named = Annotated[str, StringConstraints(min_length=1, max_length=255), AfterValidator(without_nul)]


class ExpiresAfter(Request):
    """How long the file lives once it is whole."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_EXPIRY, le=MAX_EXPIRY)


class UploadCreate(Request):
    """`mime_type` is the protocol's: what a file holds is told by its rows."""

    purpose: Literal["fine-tune", "evals"]
    filename: Named
    bytes: int = Field(ge=1)
    mime_type: Named
    expires_after: ExpiresAfter | None = None


class UploadComplete(Request):
    """The parts in the order of the file, and the md5 that the whole must have."""

    part_ids: list[Named] = Field(min_length=1, max_length=MAX_PARTS)
    md5: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


class PartOut(BaseModel):
    """A part as the SDK knows it; `bytes` and `sha256` are ours: a client that goes on can tell which of its own it is."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, part: UploadPart) -> "PartOut":
        return cls(
            id=part.id, created_at=unix(part.created_at), upload_id=part.upload_id, bytes=part.size_bytes, sha256=part.sha256
        )


class UploadOut(BaseModel):
    """An upload as the SDK knows it. `file` is there once it is completed, until it is deleted."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: str
    file: FileOut | None

    @classmethod
    def of(cls, upload: Upload, file: File | None = None) -> "UploadOut":
        return cls(
            id=upload.id,
            bytes=upload.size_bytes,
            created_at=unix(upload.created_at),
            expires_at=unix(upload.expires_at),
            filename=upload.filename,
            purpose=upload.purpose,
            status=upload.status,
            file=FileOut.of(file) if file else None,
        )


class UploadWithParts(UploadOut):
    """And what has come of it, oldest first; nothing any more once it has ended."""

    parts: list[PartOut]
