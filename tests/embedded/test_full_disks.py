"""Disks of the servers that fill up: each is told as what it is, and all that was stored before and after is there."""

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from app.core.errors import Unavailable
from app.core.settings import StorageSettings
from app.core.storage import open_storage
from migrations.upgrade import upgrade
from tests import make, small_disk
from tests.conftest import serving_api
from tests.embedded.patience import PATIENCE_SECONDS
from worker.embedded import servers, stack

MOST_JOBS = 200  # of a page each: no table has as much room in it


def test_postgres_without_room_takes_nothing_new_and_loses_nothing(tmp_path: Path) -> None:
    with small_disk.mounted(tmp_path / "disk", mib=320) as disk, servers(disk / "data", durable=False) as running:
        upgrade(running.settings.database.owner_url.get_secret_value())
        stack.ensure_key(running)
        with serving_api(running.settings) as url, _client(url, running.state.api_key) as http:
            upload = {"files": {"file": ("a.jsonl", make.chat_file())}, "data": {"purpose": "fine-tune"}}
            file_id = http.post("/files", **upload).json()["id"]  # type: ignore[arg-type]
            small_disk.fill(disk)
            answers = [_create_job(http, file_id)]
            while answers[-1].status_code == httpx.codes.OK and len(answers) < MOST_JOBS:
                answers.append(_create_job(http, file_id))
            *taken, refused = answers
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "insufficient_storage"), refused.text
            assert refused.headers["retry-after"]

            small_disk.clear(disk)
            assert _create_job(http, file_id).status_code == httpx.codes.OK
            kept = [job["id"] for job in http.get("/fine_tuning/jobs?limit=100").json()["data"]]
            assert kept[:0:-1] == [answer.json()["id"] for answer in taken]


def _create_job(http: httpx.Client, file_id: str) -> httpx.Response:
    metadata = {f"key{number}": secrets.token_hex(256) for number in range(16)}  # which cannot be made smaller
    return http.post("/fine_tuning/jobs", json={"model": make.TINY, "training_file": file_id, "metadata": metadata})


@contextmanager
def _client(url: str, key: str | None) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{url}/v1", headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_SECONDS) as http:
        yield http


@pytest.mark.parametrize(("status", "code"), [(507, "XMinioStorageFull"), (403, "QuotaExceeded"), (507, "InsufficientStorage")])
def test_storage_that_has_a_word_for_it_is_understood(status: int, code: str) -> None:
    class Full(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            said = f"<Error><Code>{code}</Code><Message>full</Message></Error>".encode()
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Full) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        storage = open_storage(StorageSettings(endpoint_url=url, access_key="a", secret_key="b"), for_requests=True)  # type: ignore[arg-type]
        with pytest.raises(Unavailable, match="object storage is full") as refused:
            storage.put("key", b"x")
        server.shutdown()
    assert refused.value.code == "insufficient_storage"
