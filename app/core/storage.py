"""Objects in S3. The embedded server speaks the same protocol as production's, so this is the only way in."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from app.core.errors import NotFound, Unavailable
from app.core.settings import StorageSettings

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import CompletedPartTypeDef

CHUNK_BYTES = 1024 * 1024
PART_BYTES = 8 * 1024 * 1024  # S3 refuses parts under 5 MiB but for the last
_FULL = frozenset({"XMinioStorageFull", "QuotaExceeded", "InsufficientStorage"})
_REQUEST_PATIENCE, _WORK_PATIENCE = (2, 5, 2), (5, 30, 4)  # seconds to connect, seconds to answer, attempts


@dataclass(frozen=True)
class Stored:
    """What lies under a key, as computed while it was sent."""

    size_bytes: int
    sha256: str


class Storage:
    """One bucket. Raises `Unavailable` when the server does not answer, `NotFound` when a key is not there."""

    def __init__(self, client: "S3Client", bucket: str) -> None:
        self._client, self._bucket = client, bucket

    def put(self, key: str, body: bytes, *, content_type: str = "application/octet-stream") -> Stored:
        with _Translated(key):
            self._client.put_object(Bucket=self._bucket, Key=key, Body=body, ContentType=content_type)
        return Stored(len(body), hashlib.sha256(body).hexdigest())

    def put_stream(self, key: str, chunks: Iterable[bytes]) -> Stored:
        """Upload what `chunks` yields in parts; memory does not grow with it. If `chunks` raises, nothing is stored."""
        with self.upload(key) as upload:
            for chunk in chunks:
                upload.write(chunk)
            return upload.finish()

    def upload(self, key: str) -> "ObjectWriter":
        """An object written piece by piece. Left without `finish`, it stores nothing."""
        with _Translated(key):
            upload_id = self._client.create_multipart_upload(Bucket=self._bucket, Key=key)["UploadId"]
        return ObjectWriter(self._client, self._bucket, key, upload_id)

    def put_file(self, key: str, path: Path) -> Stored:
        if path.stat().st_size <= PART_BYTES:
            return self.put(key, path.read_bytes())
        with path.open("rb") as file:
            return self.put_stream(key, iter(lambda: file.read(CHUNK_BYTES), b""))

    def get(self, key: str) -> bytes:
        return b"".join(self.stream(key))

    def stream(self, key: str) -> Iterator[bytes]:
        """The object in chunks. It is opened before this returns, so a missing key raises here and not midway."""
        with _Translated(key):
            body = self._client.get_object(Bucket=self._bucket, Key=key)["Body"]
        return self._chunks(key, body)

    def get_beginning(self, key: str, size_bytes: int) -> bytes:
        """The first bytes of an object that has at least so many: some servers refuse a range beyond the end."""
        with _Translated(key):
            body = self._client.get_object(Bucket=self._bucket, Key=key, Range=f"bytes=0-{size_bytes - 1}")["Body"]
        return b"".join(self._chunks(key, body))

    def get_file(self, key: str, path: Path) -> Stored:
        """Download to `path`, whose folder exists. Returns what really arrived: compare it with what was promised."""
        digest, size, chunks = hashlib.sha256(), 0, self.stream(key)  # a missing key leaves no file
        with path.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        return Stored(size, digest.hexdigest())

    def sha256_of(self, key: str) -> str:
        """Of what really lies there: some servers keep a body that does not match its checksum."""
        digest = hashlib.sha256()
        for chunk in self.stream(key):
            digest.update(chunk)
        return digest.hexdigest()

    def exists(self, key: str) -> bool:
        try:
            with _Translated(key):
                self._client.head_object(Bucket=self._bucket, Key=key)
        except NotFound:
            return False
        return True

    def delete(self, key: str) -> None:
        with _Translated(key):
            self._client.delete_object(Bucket=self._bucket, Key=key)

    def list_keys(self, prefix: str) -> Iterator[str]:
        with _Translated(prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
                yield from (entry["Key"] for entry in page.get("Contents", ()))

    def abort_abandoned(self, prefix: str, *, before: datetime) -> int:
        """Free what unfinished multipart uploads hold whose makers have died. Returns how many there were."""
        with _Translated(prefix):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=prefix)
            begun = [upload for page in pages for upload in page.get("Uploads", ()) if upload["Initiated"] < before]
        ours = [upload for upload in begun if upload["Key"].startswith(prefix)]  # some servers list all, whatever the prefix
        for upload in ours:
            _abort(self._client, self._bucket, upload["Key"], upload["UploadId"])
        return len(ours)

    def check(self) -> None:
        """Raise `Unavailable` unless the bucket answers."""
        try:
            with _Translated(self._bucket):
                self._client.head_bucket(Bucket=self._bucket)
        except NotFound:
            raise Unavailable(f"the bucket {self._bucket} does not exist; `tunesmith migrate` makes it") from None

    def ensure_bucket(self) -> None:
        """Make the bucket if it is not there. Raises Unavailable."""
        try:
            self.check()
        except Unavailable:
            with _Translated(self._bucket):
                self._client.create_bucket(Bucket=self._bucket)

    @staticmethod
    def _chunks(key: str, body: "StreamingBody") -> Iterator[bytes]:
        with _Translated(key), body:
            yield from body.iter_chunks(CHUNK_BYTES)


class ObjectWriter:
    """One multipart upload: `write` sends a part whenever enough has gathered."""

    def __init__(self, client: "S3Client", bucket: str, key: str, upload_id: str) -> None:
        self._client, self._bucket, self._key, self._id = client, bucket, key, upload_id
        self._digest, self._size, self._rest = hashlib.sha256(), 0, bytearray()
        self._parts: list[CompletedPartTypeDef] = []
        self._is_finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Throw away what was sent, unless it was finished."""
        if not self._is_finished:
            _abort(self._client, self._bucket, self._key, self._id)

    @property
    def size_bytes(self) -> int:
        return self._size

    def write(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self._size += len(chunk)
        self._rest += chunk
        if len(self._rest) >= PART_BYTES:
            self._send_part()

    def finish(self) -> Stored:
        if self._rest or not self._parts:
            self._send_part()
        with _Translated(self._key):
            self._complete()
        self._is_finished = True
        return Stored(self._size, self._digest.hexdigest())

    def _complete(self) -> None:
        """If an answer takes too long the request is repeated, and finds nothing to complete any more."""
        try:
            self._client.complete_multipart_upload(
                Bucket=self._bucket, Key=self._key, UploadId=self._id, MultipartUpload={"Parts": self._parts}
            )
        except self._client.exceptions.NoSuchUpload:
            if self._client.head_object(Bucket=self._bucket, Key=self._key)["ContentLength"] != self._size:
                raise

    def _send_part(self) -> None:
        number = len(self._parts) + 1
        with _Translated(self._key):
            sent = self._client.upload_part(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._id,
                PartNumber=number,
                Body=self._rest,  # type: ignore[arg-type]  # botocore takes a bytearray too: no copy of it
            )
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})
        self._rest.clear()


def _abort(client: "S3Client", bucket: str, key: str, upload_id: str) -> None:
    """A second time is the same as once."""
    with _Translated(key), suppress(client.exceptions.NoSuchUpload):
        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)


class _Translated:
    """Turn the client library's failures into ours."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ClientError) and error.response["Error"]["Code"] in ("404", "NoSuchKey"):
            raise NotFound(f"nothing is stored under {self._key}", code="object_missing") from error
        if isinstance(error, ClientError):
            raise _refusal(error) from error
        if isinstance(error, BotoCoreError):
            raise Unavailable("object storage does not answer; try again shortly", code="storage_unavailable") from error


def _refusal(error: ClientError) -> Unavailable:
    """For a server that answers, and says no: some have a word for a full disk, others fail with 500."""
    said, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
    if said in _FULL or status == HTTPStatus.INSUFFICIENT_STORAGE:
        return Unavailable("object storage is full; tell the operator, and try again later", code="insufficient_storage")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        why = "its disk may be full, or it is starting; try again shortly"
    elif said == "RequestTimeTooSkewed":
        why = "its clock and this machine's differ; tell the operator"
    else:
        why = "its keys or its bucket are not set up; tell the operator"
    return Unavailable(f"object storage refused with {said}: {why}", code="storage_unavailable")


def open_storage(settings: StorageSettings, *, for_requests: bool = False) -> Storage:
    """A client of its own for each caller: boto3 clients may be shared by threads, never by forks.

    `for_requests` gives up while a client of the API still listens; workers sit a slow server out, but for the relay.
    """
    connect_seconds, read_seconds, attempts = _REQUEST_PATIENCE if for_requests else _WORK_PATIENCE
    client: S3Client = boto3.client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region,
        aws_access_key_id=settings.access_key or None,
        aws_secret_access_key=settings.secret_key.get_secret_value() or None,
        config=Config(
            connect_timeout=connect_seconds,
            read_timeout=read_seconds,
            retries={"total_max_attempts": attempts, "mode": "standard"},
            max_pool_connections=32,
            request_checksum_calculation="when_required",  # S3-compatible servers do not all know the newer trailers
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if settings.endpoint_url else "auto"},
        ),
    )
    return Storage(client, settings.bucket)
