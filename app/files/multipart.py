"""Read a multipart upload as it arrives: the file's bytes go to storage in parts, and neither memory nor disk holds it."""

import hashlib
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
import structlog
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from app.core.errors import BadRequest, TooLarge, Unavailable
from app.core.storage import ObjectWriter, Storage, Stored

log = structlog.get_logger()

MAX_FIELDS, MAX_FIELD_BYTES = 16, 4096
CLEANING_SECONDS = 1.0


@dataclass(frozen=True)
class Received:
    """What a request held: its fields, and the file that is in storage by now."""

    fields: dict[str, str]
    filename: str
    stored: Stored

    @property
    def digest(self) -> str:
        """Of all of it: the boundary between the parts is another each time."""
        said = [self.filename, self.stored.sha256, *(f"{name}={value}" for name, value in sorted(self.fields.items()))]
        return hashlib.sha256("\0".join(said).encode()).hexdigest()


@dataclass(frozen=True)
class Wanted:
    """The part that goes to storage, how long it may be, and what to do with a longer one."""

    name: str
    most_bytes: float = math.inf
    advice: str = ""


FILE: Final = Wanted("file")


def documented(file: str, *fields: str) -> dict[str, Any]:
    """The body of a route that receives such a form, for OpenAPI, which sees only that the route reads a stream."""
    properties = {name: {"type": "string"} for name in fields} | {file: {"type": "string", "format": "binary"}}
    schema = {"type": "object", "required": [*fields, file], "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


async def receive(
    body: AsyncIterator[bytes], content_type: str, storage: Storage, key: str, *, wanted: Wanted = FILE
) -> Received:
    """Store the part that is wanted under `key` and collect the others. Raises BadRequest, TooLarge; then nothing is stored."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise BadRequest(f"send multipart/form-data with the part `{wanted.name}`", code="not_multipart")
    upload = await run_in_threadpool(storage.upload, key)
    form = _Form(options[b"boundary"], upload, wanted)
    try:
        async for chunk in body:
            await run_in_threadpool(form.feed, chunk)
        return await run_in_threadpool(form.finish)
    finally:
        # the client may be gone: what it sent goes too, and a storage that hangs must not keep the answer back
        with anyio.move_on_after(CLEANING_SECONDS, shield=True):
            await anyio.to_thread.run_sync(_throw_away, upload, abandon_on_cancel=True)


def _throw_away(upload: ObjectWriter) -> None:
    try:
        upload.close()
    except Unavailable:
        log.warning("upload_not_aborted")


@dataclass
class _Part:
    name: str
    filename: str | None
    value: bytearray = field(default_factory=bytearray)


class _Form:
    """Gets the parser's calls: headers of a part, its data, its end."""

    def __init__(self, boundary: bytes, upload: ObjectWriter, wanted: Wanted) -> None:
        self._upload, self._wanted = upload, wanted
        self._fields: dict[str, str] = {}
        self._filename: str | None = None
        self._header = (bytearray(), bytearray())
        self._headers: dict[str, bytes] = {}
        self._part: _Part | None = None
        self._is_whole = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._headers.clear,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_part,
                "on_part_data": self._take,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise BadRequest(f"the multipart body is broken: {error}", code="not_multipart") from None

    def finish(self) -> Received:
        if not self._is_whole:
            raise BadRequest("the multipart body ended early; send it again", code="not_multipart")
        if self._filename is None:
            name = self._wanted.name
            raise BadRequest(f"the part `{name}` is required", param=name, code="missing_required_parameter")
        return Received(self._fields, self._filename, self._upload.finish())

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[name.decode("latin-1").lower()] = bytes(value)
        name.clear()
        value.clear()

    def _begin_part(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", b""))
        filename = options.get(b"filename")
        name = options.get(b"name", b"").decode("utf-8", "replace")
        self._part = _Part(name, filename.decode("utf-8", "replace") if filename is not None else None)
        if name == self._wanted.name:
            if self._filename is not None:
                raise BadRequest(f"the body holds two parts `{name}`; send one a request", param=name)
            self._filename = (self._part.filename or "upload")[:255]
        elif len(self._fields) >= MAX_FIELDS:
            raise BadRequest(f"the body holds over {MAX_FIELDS} fields; send `{self._wanted.name}` and what is documented")

    def _take(self, data: bytes, start: int, end: int) -> None:
        assert self._part is not None  # the parser calls this between a part's headers and its end
        if self._part.name == self._wanted.name:
            self._upload.write(data[start:end])
            self._require_fitting()
            return
        self._part.value += data[start:end]
        if len(self._part.value) > MAX_FIELD_BYTES:
            raise BadRequest(f"the field {self._part.name!r} is over {MAX_FIELD_BYTES} bytes", param=self._part.name)

    def _require_fitting(self) -> None:
        wanted = self._wanted
        if self._upload.size_bytes > wanted.most_bytes:
            raise TooLarge(f"`{wanted.name}` is over {wanted.most_bytes} bytes: {wanted.advice}", param=wanted.name)

    def _end_part(self) -> None:
        assert self._part is not None
        if self._part.name != self._wanted.name:
            self._fields[self._part.name] = self._part.value.decode("utf-8", "replace")

    def _end(self) -> None:
        self._is_whole = True
