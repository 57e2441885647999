"""Objects in S3. The embedded server speaks the same protocol as production's, so this is the only way in."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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

    def upload(self, key: str) -> "Upload":
        """An object written piece by piece. Left without `finish`, it stores nothing."""
        with _Translated(key):
            upload_id = self._client.create_multipart_upload(Bucket=self._bucket, Key=key)["UploadId"]
        return Upload(self._client, self._bucket, key, upload_id)

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
        digest, size = hashlib.sha256(), 0
        with path.open("wb") as file:
            for chunk in self.stream(key):
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


class Upload:
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
            with _Translated(self._key):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._key, UploadId=self._id)

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
            self._client.complete_multipart_upload(
                Bucket=self._bucket, Key=self._key, UploadId=self._id, MultipartUpload={"Parts": self._parts}
            )
        self._is_finished = True
        return Stored(self._size, self._digest.hexdigest())

    def _send_part(self) -> None:
        number = len(self._parts) + 1
        with _Translated(self._key):
            sent = self._client.upload_part(
                Bucket=self._bucket, Key=self._key, UploadId=self._id, PartNumber=number, Body=bytes(self._rest)
            )
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})
        self._rest.clear()


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
    else:
        why = "its keys or its bucket are not set up; tell the operator"
    return Unavailable(f"object storage refused with {said}: {why}", code="storage_unavailable")


def open_storage(settings: StorageSettings, *, for_requests: bool = False) -> Storage:
    """A client of its own for each caller: boto3 clients may be shared by threads, never by forks.

    `for_requests` gives up while a client of the API still listens; workers sit a slow server out.
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
