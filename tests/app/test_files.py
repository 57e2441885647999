from collections.abc import Iterator

import httpx
import openai
import pytest
from openai import OpenAI

from app.core.settings import Settings
from app.core.storage import Storage
from tests import make
from worker.services import Services, open_services
from worker.tasks import validate


@pytest.fixture(scope="session")
def services(settings: Settings) -> Iterator[Services]:
    opened = open_services(settings)
    yield opened
    opened.sessions.kw["bind"].dispose()


def upload(client: OpenAI, body: bytes = b"{}", **more: object) -> openai.types.FileObject:
    return client.files.create(file=("chats.jsonl", body), purpose="fine-tune", **more)  # type: ignore[arg-type]


def validate_all(services: Services) -> None:
    while validate.validate_next(services):
        pass


def test_a_file_goes_up_is_validated_and_comes_down_unchanged(client: OpenAI, services: Services) -> None:
    body = make.chat_file()
    file = upload(client, body)
    assert (file.status, file.bytes, file.filename) == ("uploaded", len(body), "chats.jsonl")

    validate_all(services)
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.content(file.id).read() == body
    assert [listed.id for listed in client.files.list()] == [file.id]


def test_a_bad_file_says_what_is_wrong_and_where(client: OpenAI, services: Services) -> None:
    file = upload(client, make.chat_file() + b"\n{nonsense")
    validate_all(services)
    checked = client.files.retrieve(file.id)

    assert checked.status == "error"
    assert checked.status_details is not None and "line 13" in checked.status_details
    report, listed = ((file.model_extra or {})["report"] for file in (checked, client.files.list().data[0]))
    assert (report["problem_count"], len(report["problems"])) == (1, 1)
    assert listed == report | {"problems": [], "warnings": []}  # a page of them would be megabytes


def test_a_file_that_storage_damaged_is_not_trained_on(client: OpenAI, services: Services, storage: Storage) -> None:
    file = upload(client, make.chat_file())
    (key,) = [key for key in storage.list_keys("orgs/") if key.endswith(file.id)]
    storage.put(key, make.chat_file(3))
    validate_all(services)

    assert "differs from what was uploaded" in (client.files.retrieve(file.id).status_details or "")


def test_a_large_file_streams_through(client: OpenAI, storage: Storage) -> None:
    """Larger than a part of an S3 multipart upload, and sent in pieces."""
    body = make.chat_file(250_000)
    assert len(body) > 20_000_000
    file = upload(client, body)

    assert client.files.content(file.id).read() == body


def test_pages_of_files(client: OpenAI) -> None:
    ids = [upload(client).id for _ in range(5)]

    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]  # the SDK walks the pages
    first = client.files.list(limit=2, order="asc")
    assert [file.id for file in first.data] == ids[:2]
    assert first.has_more
    assert client.files.list(after="file-unknown", limit=0).data == []


def test_delete_removes_row_and_bytes_stay_gone(client: OpenAI) -> None:
    file = upload(client)

    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_stranger_sees_nothing(client: OpenAI, stranger: OpenAI) -> None:
    file = upload(client)

    for call in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)
    assert list(stranger.files.list()) == []
    assert client.files.retrieve(file.id).id == file.id


def test_expiry_is_kept_and_checked(client: OpenAI) -> None:
    file = upload(client, expires_after={"anchor": "created_at", "seconds": 3600})

    assert file.expires_at == pytest.approx(file.created_at + 3600, abs=2)
    with pytest.raises(openai.BadRequestError, match="3600 to 2592000"):
        upload(client, expires_after={"anchor": "created_at", "seconds": 1})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"files": {"file": b"{}"}}, "purpose"),
        ({"data": {"purpose": "vision"}, "files": {"file": b"{}"}}, "purpose"),
        ({"data": {"purpose": "fine-tune"}, "files": {"other": b"{}"}}, "file"),
        ({"data": {f"field{number}": "" for number in range(17)}, "files": {"file": b"{}"}}, None),
    ],
)
def test_a_form_that_lacks_something_or_holds_too_much_says_what(
    http: httpx.Client, storage: Storage, fields: dict[str, object], param: str | None
) -> None:
    before = set(storage.list_keys("orgs/"))
    answer = http.post("/v1/files", **fields)  # type: ignore[arg-type]

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert set(storage.list_keys("orgs/")) == before


def test_a_body_that_is_no_form_is_refused(http: httpx.Client) -> None:
    for content, kind in ((b"{}", "application/json"), (b"--x\r\nbroken", "multipart/form-data; boundary=x")):
        answer = http.post("/v1/files", content=content, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_multipart")
