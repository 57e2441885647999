"""SIGTERM to the API while clients are with it: who is nearly done is served to the end, who lasts is let go without a gap."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import psutil
from openai import OpenAI

from tests import make
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from tests.flow.test_outages import await_ready, process_of
from tests.flow.test_survival import begin, wait_for_checkpoint, wait_for_end
from tests.stack import Stack

GRACE_SECONDS = 15.0  # of worker.embedded.programs
EPOCHS = 12
LARGE_BYTES = 16 * 1024 * 1024  # no socket's buffers hold so much
BOUNDARY = "boundary"


class Followed:
    """What one connection was told of a job."""

    def __init__(self) -> None:
        self.ids, self.is_done = list[str](), False

    def follow(self, http: httpx.Client, job_id: str) -> None:
        """Until the server ends it, from behind the last event that is known."""
        headers = {"Last-Event-ID": self.ids[-1]} if self.ids else {}
        with http.stream("GET", f"/fine_tuning/jobs/{job_id}/events?stream=true", headers=headers) as answer:
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    self.ids.append(line.removeprefix("id: "))
                self.is_done |= line == "data: [DONE]"


def chat(http: httpx.Client, has_begun: threading.Event) -> str:
    """The stream as it came."""
    asked = {"model": make.TINY, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 300, "stream": True}
    came = ""
    with http.stream("POST", "/chat/completions", json=asked) as answer:
        for text in answer.iter_text():
            came += text
            has_begun.set()
    return came


def upload(http: httpx.Client, has_begun: threading.Event, is_told: threading.Event) -> httpx.Response:
    """A file whose second half is sent when the server has been told to go."""
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    ).encode()
    body = head + make.chat_file(200) + f"\r\n--{BOUNDARY}--\r\n".encode()

    def halves() -> Iterator[bytes]:
        yield body[: len(body) // 2]
        has_begun.set()
        assert is_told.wait(60)
        time.sleep(0.5)
        yield body[len(body) // 2 :]

    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", "Content-Length": str(len(body))}
    return http.post("/files", content=halves(), headers=headers)


@contextmanager
def deaf(stack: Stack, path: str) -> Iterator[None]:
    """A client that asks for much and never reads."""
    address = urlsplit(stack.base_url)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((address.hostname, address.port))
        client.sendall(f"GET {address.path}{path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {stack.api_key}\r\n\r\n".encode())
        client.recv(1)
        yield


def is_refused(stack: Stack) -> bool:
    address = urlsplit(stack.base_url)
    try:
        socket.create_connection((address.hostname, address.port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_the_api_lets_clients_finish_and_nobody_hold_it(stack: Stack, client: OpenAI) -> None:
    large = client.files.create(file=("large.jsonl", b"x" * LARGE_BYTES), purpose="fine-tune")
    job = begin(client, epochs=EPOCHS)
    wait_for_checkpoint(client, job)
    followed, is_told, chatting, uploading = Followed(), *(threading.Event() for _ in range(3))
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    with httpx.Client(base_url=stack.base_url, headers=headers, timeout=60) as http, ThreadPoolExecutor(3) as pool:
        with deaf(stack, f"/files/{large.id}/content"):
            following = pool.submit(followed.follow, http, job.id)
            eventually(lambda: followed.ids)
            uploaded = pool.submit(upload, http, uploading, is_told)
            chatted = pool.submit(chat, http, chatting)
            assert chatting.wait(60) and uploading.wait(60)
            api = process_of(stack, "api")
            assert api is not None
            told_at = time.monotonic()
            api.terminate()
            is_told.set()
            eventually(lambda: is_refused(stack))
            following.result(PATIENCE_SECONDS)
            assert not followed.is_done
            psutil.wait_procs([api], timeout=GRACE_SECONDS)
            assert time.monotonic() - told_at < GRACE_SECONDS
        assert chatted.result().endswith("data: [DONE]\n\n")
        assert uploaded.result().status_code == 200, uploaded.result().text

        await_ready(stack)
        followed.follow(http, job.id)
    assert followed.is_done
    assert wait_for_end(client, job).status == "succeeded"
    assert followed.ids == [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=100)][::-1]
    assert client.files.content(uploaded.result().json()["id"]).content == make.chat_file(200)
