"""Files that come in parts: sent as the SDK sends them, in any order, again, too late, twice, and by nobody any more."""

import asyncio
import hashlib
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from openai.types import Upload
from sqlalchemy import func, insert, orm, select, update

from app import db
from app.accounts.caller import Caller
from app.core import ids
from app.core.errors import NotFound
from app.core.settings import MIB, Settings
from app.core.storage import Storage, Stored
from app.files import assembly, uploads
from app.files import service as files
from app.files.assembly import MOST_ASKED, Assembler
from app.files.upload_schemas import MAX_PARTS
from app.files.uploads import MAX_PENDING, Plan
from app.main import create_app
from app.models import File, OutboxMessage
from app.models import Upload as UploadRow
from app.models import UploadPart as PartRow
from app.outbox import Topic
from tests import make
from tests.conftest import sdk
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from worker.embedded import Servers
from worker.embedded.programs import as_program, service
from worker.embedded.state import Ports
from worker.relay import Relay
from worker.services import Services, open_services
from worker.tasks import validate

Sessions = orm.sessionmaker[orm.Session]
CHATS = make.chat_file(200)
PIECES = [CHATS[begin : begin + 7_000] for begin in range(0, len(CHATS), 7_000)]


@pytest.fixture(scope="module")
def services(settings: Settings) -> Iterator[Services]:
    opened = open_services(settings)
    yield opened
    opened.sessions.kw["bind"].dispose()


@pytest.fixture(scope="module")
def relay(services: Services) -> Relay:
    return Relay(services)


def begin(client: OpenAI, size_bytes: int = len(CHATS), **more: object) -> Upload:
    return client.uploads.create(
        bytes=size_bytes,
        filename="chats.jsonl",
        mime_type="text/jsonl",
        purpose="fine-tune",
        **more,  # type: ignore[arg-type]
    )


def send(client: OpenAI, upload: Upload, data: bytes) -> str:
    return client.uploads.parts.create(upload.id, data=data).id


def send_all(client: OpenAI, upload: Upload) -> list[str]:
    return [send(client, upload, data) for data in PIECES]


def content(client: OpenAI, upload: Upload) -> bytes:
    assert upload.file is not None
    return client.files.content(upload.file.id).read()


def stored(storage: Storage, caller: Caller) -> list[str]:
    return sorted(storage.list_keys(f"orgs/{caller.organization_id}/"))


def clean(relay: Relay, sessions: Sessions, caller: Caller) -> None:
    """What the relay does in its own time, done now: sweep, then act on what this organization left in the outbox."""
    relay._remove_old()
    prefix = f"orgs/{caller.organization_id}/"
    with sessions.begin() as session:
        purges = session.scalars(select(OutboxMessage).where(OutboxMessage.topic == Topic.PURGE)).all()
        for purge in purges:
            if purge.payload["prefix"].startswith(prefix):
                relay.outbox._delete(purge)
                session.delete(purge)


def unfinished(storage: Storage, caller: Caller) -> list[str]:
    """Keys of S3's own multipart uploads."""
    begun = storage._client.list_multipart_uploads(Bucket=storage._bucket).get("Uploads", ())
    return [upload["Key"] for upload in begun if caller.organization_id in upload["Key"]]


@contextmanager
def doomed_api(settings: Settings, ports: Ports) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A process of its own, that can be killed, and its address."""
    port = make.free_port()
    program = as_program(service(settings, "127.0.0.1", port)[0], settings, ports)
    with subprocess.Popen(program.command, env=program.environment, cwd=program.cwd) as api:
        try:
            eventually(lambda: socket.create_connection(("127.0.0.1", port)).close() is None)
            yield api, f"http://127.0.0.1:{port}"
        finally:
            api.kill()


def age(sessions: Sessions, upload: Upload, by: timedelta) -> None:
    with sessions.begin() as session:
        older = {"expires_at": UploadRow.expires_at - by, "sweep_at": UploadRow.sweep_at - by}
        session.execute(update(UploadRow).where(UploadRow.id == upload.id).values(older))


def plan(sessions: Sessions, caller: Caller, upload: Upload, part_ids: list[str]) -> Plan:
    """How a process begins to complete an upload."""
    with db.organization_session(sessions, caller.organization_id) as session:
        planned = uploads.plan(session, caller, upload.id, part_ids=part_ids)
    assert planned is not None
    return planned


def refusal(error: openai.APIStatusError) -> tuple[int, str | None, str | None]:
    make.require_envelope(error.status_code, error.response.json())
    return error.status_code, error.code, error.param


def test_a_file_goes_up_in_the_sdks_own_way(client: OpenAI, services: Services, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(CHATS)
    md5 = hashlib.md5(CHATS).hexdigest()
    uploaded = [
        client.uploads.upload_file_chunked(file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=5_000, md5=md5),
        client.uploads.upload_file_chunked(
            file=CHATS, filename=path.name, bytes=len(CHATS), mime_type="text/jsonl", purpose="evals"
        ),
    ]
    for upload in uploaded:
        assert (upload.object, upload.status, upload.bytes, upload.filename) == ("upload", "completed", len(CHATS), path.name)
        assert upload.expires_at == pytest.approx(upload.created_at + 3600, abs=1)
        assert content(client, upload) == CHATS
        assert upload.file is not None
        assert (upload.file.purpose, upload.file.status, upload.file.bytes) == (upload.purpose, "uploaded", len(CHATS))
    while validate.validate_next(services):
        pass
    trainable, _ = (client.files.retrieve(upload.file.id) for upload in uploaded if upload.file)
    assert trainable.status == "processed"


def test_parts_come_at_once_and_in_any_order(client: OpenAI) -> None:
    upload = begin(client)
    with ThreadPoolExecutor(4) as threads:
        part_ids = list(threads.map(lambda data: send(client, upload, data), reversed(PIECES)))[::-1]

    completed = client.uploads.complete(upload.id, part_ids=part_ids)
    assert content(client, completed) == CHATS


def test_large_parts_pass_the_limit_of_other_bodies_and_larger_ones_do_not(
    client: OpenAI, http: httpx.Client, settings: Settings
) -> None:
    body = bytes(settings.limits.body_bytes) + b"and some more"
    upload = begin(client, len(body))
    part_id = send(client, upload, body)
    assert content(client, client.uploads.complete(upload.id, part_ids=[part_id])) == body

    path = f"/v1/uploads/{begin(client).id}/parts"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {http.headers['authorization']}\r\n"
    with socket.create_connection((http.base_url.host, http.base_url.port or 80)) as raw:
        raw.sendall(f"{head}Content-Length: {settings.limits.part_bytes + 100_000}\r\n\r\n".encode())
        assert raw.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_client_that_crashed_goes_on_where_it_was(client: OpenAI, http: httpx.Client) -> None:
    upload = begin(client)
    for data in PIECES[1:3]:
        send(client, upload, data)

    known = http.get(f"/v1/uploads/{upload.id}").json()
    assert (known["status"], known["file"], [part["bytes"] for part in known["parts"]]) == ("pending", None, [7_000, 7_000])
    there = {part["sha256"]: part["id"] for part in known["parts"]}
    part_ids = [there.get(hashlib.sha256(data).hexdigest()) or send(client, upload, data) for data in PIECES]
    assert set(there.values()) <= set(part_ids)
    assert content(client, client.uploads.complete(upload.id, part_ids=part_ids)) == CHATS


def test_a_part_that_is_sent_again_takes_no_room(
    client: OpenAI, relay: Relay, system_sessions: Sessions, storage: Storage, organization: Caller
) -> None:
    """The client that got no answer cannot know that its part arrived."""
    upload = begin(client)
    part_ids = send_all(client, upload)
    before = stored(storage, organization)
    again = send_all(client, upload)
    clean(relay, system_sessions, organization)

    assert stored(storage, organization) == before
    mixed = [*part_ids[:1], *again[1:]]
    assert content(client, client.uploads.complete(upload.id, part_ids=mixed)) == CHATS


def test_a_file_that_repeats_itself_is_whole(client: OpenAI) -> None:
    upload = begin(client, 3 * len(CHATS))
    part_ids = [send(client, upload, CHATS) for _ in range(3)]

    assert content(client, client.uploads.complete(upload.id, part_ids=part_ids)) == 3 * CHATS


@pytest.mark.parametrize(
    ("rest", "told"),
    [(b"12345", (400, "upload_size_exceeded", "data")), (b"123456789012", (413, "request_too_large", "data"))],
    ids=["with the others", "alone"],
)
def test_more_than_was_said_is_refused_at_the_part(
    client: OpenAI, storage: Storage, organization: Caller, rest: bytes, told: tuple[int, str, str]
) -> None:
    upload = begin(client, 10)
    send(client, upload, b"abcdef")
    before = stored(storage, organization)
    with pytest.raises(openai.APIStatusError) as refused:
        send(client, upload, rest)

    assert refusal(refused.value) == told
    assert stored(storage, organization) == before


def test_parts_are_not_without_number(client: OpenAI, system_sessions: Sessions, organization: Caller) -> None:
    upload = begin(client)
    owner = {"organization_id": organization.organization_id, "project_id": organization.project_id, "upload_id": upload.id}
    part = {**owner, "size_bytes": 1, "sha256": "", "storage_key": ""}
    with system_sessions.begin() as session:
        session.execute(insert(PartRow), [{**part, "id": ids.new("part_")} for _ in range(MAX_PARTS)])

    with pytest.raises(openai.BadRequestError) as refused:
        send(client, upload, b"a")
    assert refusal(refused.value) == (400, "too_many_parts", "data")


def test_completing_wants_all_parts_once_and_no_others(client: OpenAI) -> None:
    upload, other = begin(client), begin(client)
    part_ids, foreign = send_all(client, upload), send(client, other, PIECES[0])
    wrong = {
        "upload_size_mismatch": part_ids[1:],
        "part_repeated": [*part_ids, part_ids[0]],
        "unknown_part": [foreign, *part_ids[1:]],
    }
    for code, named in wrong.items():
        with pytest.raises(openai.BadRequestError) as refused:
            client.uploads.complete(upload.id, part_ids=named)
        assert refusal(refused.value) == (400, code, "part_ids")
    assert client.uploads.complete(upload.id, part_ids=part_ids).status == "completed"


def test_a_wrong_md5_is_refused_and_the_upload_goes_on(client: OpenAI, storage: Storage, organization: Caller) -> None:
    upload = begin(client)
    part_ids, md5 = send_all(client, upload), hashlib.md5(CHATS).hexdigest()
    before = stored(storage, organization)
    for wrong in (part_ids[::-1], [*part_ids[1:], part_ids[0]]):
        with pytest.raises(openai.BadRequestError, match="in the file's order") as refused:
            client.uploads.complete(upload.id, part_ids=wrong, md5=md5)
        assert refusal(refused.value) == (400, "md5_mismatch", "md5")
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=part_ids, md5="none")
    assert stored(storage, organization) == before

    assert content(client, client.uploads.complete(upload.id, part_ids=part_ids, md5=md5.upper())) == CHATS


def test_completing_twice_answers_the_same_file(client: OpenAI) -> None:
    upload = begin(client)
    part_ids = send_all(client, upload)
    first, second = (client.uploads.complete(upload.id, part_ids=part_ids) for _ in range(2))

    assert first.file is not None and first.file == second.file
    assert [file.id for file in client.files.list()] == [first.file.id]
    with pytest.raises(openai.BadRequestError) as refused:
        client.uploads.complete(upload.id, part_ids=part_ids[::-1])
    assert refusal(refused.value) == (400, "upload_completed", "upload_id")
    with pytest.raises(openai.BadRequestError, match=first.file.id):
        client.uploads.cancel(upload.id)


def test_completing_many_times_at_once_makes_one_file(client: OpenAI, system_sessions: Sessions) -> None:
    upload = begin(client)
    part_ids = send_all(client, upload)
    with ThreadPoolExecutor(6) as threads:
        completed = list(threads.map(lambda _: client.uploads.complete(upload.id, part_ids=part_ids), range(6)))

    (file,) = client.files.list().data
    assert {upload.file and upload.file.id for upload in completed} == {file.id}
    assert client.files.content(file.id).read() == CHATS
    with system_sessions() as session:
        row = session.get(UploadRow, upload.id)
        assert row is not None and len(row.tried_file_ids) == 1  # one did the work, the others waited


@pytest.mark.parametrize("is_purged", [False, True], ids=["at once", "after the parts are gone"])
def test_of_two_processes_that_complete_one_makes_the_file(
    client: OpenAI,
    relay: Relay,
    api_sessions: Sessions,
    system_sessions: Sessions,
    storage: Storage,
    organization: Caller,
    is_purged: bool,
) -> None:
    upload = begin(client)
    part_ids = send_all(client, upload)
    plans = [plan(api_sessions, organization, upload, part_ids) for _ in range(2)]
    sooner = Assembler(api_sessions, storage)._carry_out(organization, plans[0], None)
    if is_purged:
        clean(relay, system_sessions, organization)
    later = Assembler(api_sessions, storage)._carry_out(organization, plans[1], None)

    assert later == sooner and later.file is not None
    clean(relay, system_sessions, organization)
    assert stored(storage, organization) == [files.key_for(organization, later.file.id)]
    assert client.files.content(later.file.id).read() == CHATS


@pytest.mark.parametrize("wait_seconds", [0.0, 0.02, 0.05, 0.1])
def test_of_completing_and_cancelling_one_wins(
    client: OpenAI, relay: Relay, system_sessions: Sessions, storage: Storage, organization: Caller, wait_seconds: float
) -> None:
    upload = begin(client)
    part_ids = send_all(client, upload)
    said = dict[str, str | None]()

    def cancel() -> None:
        time.sleep(wait_seconds)
        try:
            said["cancel"] = client.uploads.cancel(upload.id).status
        except openai.BadRequestError as error:
            said["cancel"] = error.code

    canceller = threading.Thread(target=cancel)
    canceller.start()
    try:
        said["complete"] = client.uploads.complete(upload.id, part_ids=part_ids).status
    except openai.BadRequestError as error:
        said["complete"] = error.code
    canceller.join()

    won = {"complete": "completed", "cancel": "upload_completed"}, {"complete": "upload_cancelled", "cancel": "cancelled"}
    assert said in won
    clean(relay, system_sessions, organization)
    assert len(stored(storage, organization)) == len(client.files.list().data) == (said == won[0])


def test_a_cancelled_upload_is_gone_for_good(
    client: OpenAI, relay: Relay, system_sessions: Sessions, storage: Storage, organization: Caller
) -> None:
    upload = begin(client)
    part_ids = send_all(client, upload)

    assert [client.uploads.cancel(upload.id).status for _ in range(2)] == ["cancelled", "cancelled"]
    for use in (lambda: send(client, upload, b"a"), lambda: client.uploads.complete(upload.id, part_ids=part_ids)):
        with pytest.raises(openai.BadRequestError) as refused:
            use()
        assert refusal(refused.value) == (400, "upload_cancelled", "upload_id")
    clean(relay, system_sessions, organization)
    assert stored(storage, organization) == []


def test_what_nobody_completes_in_an_hour_expires_and_leaves_nothing(
    client: OpenAI, http: httpx.Client, relay: Relay, system_sessions: Sessions, storage: Storage, organization: Caller
) -> None:
    upload = begin(client)
    part_ids = send_all(client, upload)
    clean(relay, system_sessions, organization)
    assert len(stored(storage, organization)) == len(part_ids)

    age(system_sessions, upload, timedelta(minutes=61))
    for use in (lambda: send(client, upload, b"a"), lambda: client.uploads.complete(upload.id, part_ids=part_ids)):
        with pytest.raises(openai.BadRequestError, match="create another") as refused:
            use()
        assert refusal(refused.value) == (400, "upload_expired", "upload_id")
    assert http.get(f"/v1/uploads/{upload.id}").json()["status"] == "expired"
    clean(relay, system_sessions, organization)
    assert stored(storage, organization) == []

    late = f"orgs/{organization.organization_id}/uploads/{upload.id}/parts/late"
    storage.put(late, b"from a process that died before it could say so")
    age(system_sessions, upload, timedelta(hours=25))
    clean(relay, system_sessions, organization)
    assert stored(storage, organization) == []
    with system_sessions() as session:
        mine = UploadRow.organization_id == organization.organization_id
        assert session.scalar(select(func.count()).select_from(UploadRow).where(mine)) == 0
        assert session.scalar(select(func.count()).select_from(PartRow).where(PartRow.upload_id == upload.id)) == 0


def test_a_project_has_a_limited_number_of_uploads_pending(client: OpenAI, system_sessions: Sessions, relay: Relay) -> None:
    first = begin(client)
    with system_sessions.begin() as session:
        mine = session.get_one(UploadRow, first.id)
        columns = {column.name: getattr(mine, column.name) for column in UploadRow.__table__.columns}
        copies = [columns | {"id": ids.new("upload_")} for _ in range(MAX_PENDING - 1)]
        session.execute(insert(UploadRow), copies)
    with pytest.raises(openai.BadRequestError) as refused:
        begin(client)
    assert refused.value.code == "too_many_uploads"

    client.uploads.cancel(first.id)
    begin(client)
    with system_sessions.begin() as session:
        session.execute(update(UploadRow).values(sweep_at=func.clock_timestamp()))
    relay._remove_old()  # all of them, however many
    with system_sessions() as session:
        pending = select(func.count()).select_from(UploadRow).where(UploadRow.status == "pending")
        assert session.scalars(pending).one() == 0


def test_the_relay_ends_an_upload_that_nobody_asks_about(client: OpenAI, relay: Relay, system_sessions: Sessions) -> None:
    upload = begin(client)
    age(system_sessions, upload, timedelta(minutes=61))
    relay._remove_old()

    with system_sessions() as session:
        assert session.scalar(select(UploadRow.status).where(UploadRow.id == upload.id)) == "expired"


def test_a_crash_before_the_commit_loses_nothing_and_leaves_nothing(
    client: OpenAI,
    relay: Relay,
    api_sessions: Sessions,
    system_sessions: Sessions,
    storage: Storage,
    organization: Caller,
) -> None:
    """The whole lies in storage, and whoever put it there is dead."""
    upload = begin(client)
    part_ids = send_all(client, upload)
    storage.put(plan(api_sessions, organization, upload, part_ids).key, CHATS)

    completed = client.uploads.complete(upload.id, part_ids=part_ids)
    assert content(client, completed) == CHATS
    clean(relay, system_sessions, organization)
    assert completed.file is not None
    assert stored(storage, organization) == [files.key_for(organization, completed.file.id)]


def test_an_api_killed_while_it_completes_leaves_the_upload_as_it_was(
    client: OpenAI,
    relay: Relay,
    settings: Settings,
    servers: Servers,
    system_sessions: Sessions,
    storage: Storage,
    organization: Caller,
) -> None:
    assert servers.state.ports is not None
    body = bytes(16 * MIB)
    upload = begin(client, 4 * len(body))
    part_ids = [send(client, upload, body) for _ in range(4)]
    with (
        doomed_api(settings, servers.state.ports) as (api, base_url),
        sdk(base_url, client.api_key) as victim,
        ThreadPoolExecutor(1) as thread,
    ):
        asked = thread.submit(victim.uploads.complete, upload.id, part_ids=part_ids)
        eventually(lambda: unfinished(storage, organization))
        api.kill()
        with pytest.raises(openai.APIConnectionError):
            asked.result()
    assert unfinished(storage, organization)
    assert storage.abort_abandoned(f"orgs/{organization.organization_id}/", before=datetime.now(UTC) + timedelta(minutes=1)) == 1

    completed = client.uploads.complete(upload.id, part_ids=part_ids)
    assert content(client, completed) == 4 * body
    clean(relay, system_sessions, organization)
    assert completed.file is not None
    assert stored(storage, organization) == [files.key_for(organization, completed.file.id)]
    assert not unfinished(storage, organization)
    client.files.delete(completed.file.id)  # else whichever test validates next would read it


def test_a_crash_that_nobody_comes_back_from_leaves_nothing(
    client: OpenAI, relay: Relay, api_sessions: Sessions, system_sessions: Sessions, storage: Storage, organization: Caller
) -> None:
    upload = begin(client)
    part_ids = send_all(client, upload)
    storage.put(plan(api_sessions, organization, upload, part_ids).key, CHATS)
    age(system_sessions, upload, timedelta(hours=3))
    clean(relay, system_sessions, organization)

    assert stored(storage, organization) == []


def test_who_completes_in_the_last_minute_is_not_swept_meanwhile(
    client: OpenAI, relay: Relay, api_sessions: Sessions, system_sessions: Sessions, storage: Storage, organization: Caller
) -> None:
    upload = begin(client)
    part_ids = send_all(client, upload)
    age(system_sessions, upload, timedelta(minutes=59))
    planned = plan(api_sessions, organization, upload, part_ids)
    with system_sessions.begin() as session:
        session.execute(
            update(UploadRow).where(UploadRow.id == upload.id).values(expires_at=func.clock_timestamp() - timedelta(minutes=1))
        )
    clean(relay, system_sessions, organization)

    made = Assembler(api_sessions, storage)._carry_out(organization, planned, None)
    assert (made.status, made.file and made.file.bytes) == ("completed", len(CHATS))


def test_who_began_to_complete_in_time_may_ask_again_for_an_hour(
    client: OpenAI, api_sessions: Sessions, system_sessions: Sessions, organization: Caller
) -> None:
    """Of any process: the one that is still at it may be behind a proxy that lost patience."""
    upload = begin(client)
    part_ids = send_all(client, upload)
    plan(api_sessions, organization, upload, part_ids)
    age(system_sessions, upload, timedelta(minutes=61))
    with pytest.raises(openai.BadRequestError) as refused:
        send(client, upload, b"a")
    assert refusal(refused.value) == (400, "upload_expired", "upload_id")
    for _ in range(3):
        plan(api_sessions, organization, upload, part_ids)
    assert content(client, client.uploads.complete(upload.id, part_ids=part_ids)) == CHATS

    upload = begin(client)
    part_ids = send_all(client, upload)
    plan(api_sessions, organization, upload, part_ids)
    age(system_sessions, upload, timedelta(minutes=119))
    plan(api_sessions, organization, upload, part_ids)
    age(system_sessions, upload, timedelta(minutes=2))
    with pytest.raises(openai.BadRequestError) as refused:
        client.uploads.complete(upload.id, part_ids=part_ids)
    assert refusal(refused.value) == (400, "upload_expired", "upload_id")


def test_whoever_completes_much_keeps_nobody_waiting_but_itself(
    client: OpenAI, stranger: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = bytes(8 * MIB)
    large, small = begin(client, len(body)), begin(stranger)
    named, theirs = [send(client, large, body)], send_all(stranger, small)

    def complete_wrongly(number: int) -> tuple[str | None, str | None]:
        with pytest.raises(openai.APIStatusError) as refused:
            client.uploads.complete(large.id, part_ids=named, md5=f"{number:032x}")
        return refused.value.code, refused.value.response.headers.get("retry-after")

    may_go_on, assemble = threading.Event(), assembly.assemble

    def assemble_late(storage: Storage, plan: Plan, *, md5: str | None) -> Stored:
        if plan.upload_id == large.id:
            assert may_go_on.wait(PATIENCE_SECONDS)
        return assemble(storage, plan, md5=md5)

    monkeypatch.setattr(assembly, "assemble", assemble_late)
    with ThreadPoolExecutor(MOST_ASKED + 4) as pool:
        asked = [pool.submit(complete_wrongly, number) for number in range(MOST_ASKED + 4)]
        eventually(lambda: sum(one.done() for one in asked) == 4)
        assert stranger.uploads.complete(small.id, part_ids=theirs).status == "completed"
        assert sum(one.done() for one in asked) == 4
        may_go_on.set()
        told = Counter(one.result() for one in asked)
    assert told == {("md5_mismatch", None): MOST_ASKED, ("too_many_completions", "10"): 4}


def test_while_storage_is_away_nothing_is_lost(client: OpenAI, settings: Settings) -> None:
    upload = begin(client)
    part_ids = send_all(client, upload)
    nowhere = settings.storage.model_copy(update={"endpoint_url": f"http://127.0.0.1:{make.free_port()}"})
    with TestClient(create_app(settings.model_copy(update={"storage": nowhere}))) as api:
        headers = {"Authorization": f"Bearer {client.api_key}"}
        for path, body in (("complete", {"json": {"part_ids": part_ids}}), ("parts", {"files": {"data": b"a"}})):
            answer = api.post(f"/v1/uploads/{upload.id}/{path}", headers=headers, **body)  # type: ignore[arg-type]
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
            assert int(answer.headers["retry-after"]) > 0

    assert content(client, client.uploads.complete(upload.id, part_ids=part_ids)) == CHATS


@pytest.mark.parametrize("damage", ["gone", "other bytes"])
def test_a_part_that_storage_lost_can_be_sent_again(client: OpenAI, storage: Storage, organization: Caller, damage: str) -> None:
    upload = begin(client)
    part_ids = send_all(client, upload)
    (key,) = [key for key in stored(storage, organization) if part_ids[1] in key]
    storage.delete(key) if damage == "gone" else storage.put(key, b"x" * 7_000)
    with pytest.raises(openai.BadRequestError, match=part_ids[1]) as refused:
        client.uploads.complete(upload.id, part_ids=part_ids)
    assert refusal(refused.value) == (400, "part_damaged", "part_ids")

    part_ids[1] = send(client, upload, PIECES[1])
    assert content(client, client.uploads.complete(upload.id, part_ids=part_ids)) == CHATS


def test_the_file_expires_as_the_upload_said(
    client: OpenAI, relay: Relay, system_sessions: Sessions, storage: Storage, organization: Caller
) -> None:
    upload = begin(client, expires_after={"anchor": "created_at", "seconds": 7200})
    completed = client.uploads.complete(upload.id, part_ids=send_all(client, upload))
    assert completed.file is not None
    assert completed.file.expires_at == pytest.approx(completed.file.created_at + 7200, abs=1)

    with system_sessions.begin() as session:
        session.execute(update(File).where(File.id == completed.file.id).values(expires_at=func.clock_timestamp()))
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(completed.file.id)
    clean(relay, system_sessions, organization)
    with system_sessions() as session:
        assert session.get(File, completed.file.id) is None
    assert stored(storage, organization) == []


def test_what_dead_processes_began_to_send_is_freed_a_day_later(relay: Relay, storage: Storage, organization: Caller) -> None:
    prefix = f"orgs/{organization.organization_id}/"
    abandoned = storage.upload(prefix + "a")
    abandoned.write(b"a")

    asyncio.run(relay._free_abandoned())
    assert unfinished(storage, organization) == [prefix + "a"]  # its process may live
    assert storage.abort_abandoned(prefix, before=datetime.now(UTC) + timedelta(minutes=1)) == 1
    assert storage.abort_abandoned(prefix, before=datetime.now(UTC) + timedelta(minutes=1)) == 0
    abandoned.close()  # a second time is no error


def test_an_object_that_is_finished_twice_is_finished(storage: Storage, organization: Caller) -> None:
    """A server that answers too late has done it, and the client library asks again."""
    upload, aborted = (storage.upload(f"orgs/{organization.organization_id}/{name}") for name in "ab")
    for one in (upload, aborted):
        one.write(b"a")
        one._send_part()
    parts = {"Parts": upload._parts}
    storage._client.complete_multipart_upload(
        Bucket=storage._bucket,
        Key=upload._key,
        UploadId=upload._id,
        MultipartUpload=parts,  # type: ignore[typeddict-item]
    )

    assert upload.finish() == Stored(1, hashlib.sha256(b"a").hexdigest())
    aborted.close()
    with pytest.raises(NotFound):
        aborted.finish()


def test_a_stranger_finds_no_upload(client: OpenAI, stranger: OpenAI, api_url: str) -> None:
    upload = begin(client)
    part_ids = send_all(client, upload)
    for use in (
        lambda: send(stranger, upload, b"a"),
        lambda: stranger.uploads.complete(upload.id, part_ids=part_ids),
        lambda: stranger.uploads.cancel(upload.id),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            use()
        assert refusal(refused.value) == (404, "upload_not_found", None)
    assert client.uploads.complete(upload.id, part_ids=part_ids).status == "completed"


@pytest.mark.parametrize(
    ("change", "param", "status"),
    [
        ({"purpose": "vision"}, "purpose", 400),
        ({"bytes": 0}, "bytes", 400),
        ({"bytes": 8 * 2**30 + 1}, "bytes", 413),
        ({"filename": ""}, "filename", 400),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after.seconds", 400),
        ({"parts": 3}, "parts", 400),
    ],
)
def test_an_upload_that_cannot_be_says_why(http: httpx.Client, change: dict[str, object], param: str, status: int) -> None:
    body = {"purpose": "fine-tune", "filename": "a.jsonl", "bytes": 10, "mime_type": "text/jsonl"}
    answer = http.post("/v1/uploads", json=body | change)

    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_part_without_data_says_so(client: OpenAI, http: httpx.Client) -> None:
    path = f"/v1/uploads/{begin(client).id}/parts"
    for sent in ({"files": {"file": b"a"}}, {"files": {"data": b""}}):
        answer = http.post(path, **sent)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "data")
    assert http.post(path, json={}).json()["error"]["code"] == "not_multipart"
