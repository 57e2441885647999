"""Files go up, whole or in parts; what is wrong with them is told; what has arrived is not sent again."""

import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from openai import OpenAI

from bench.chaos.proxy import Proxy, serving
from tests import make
from tests.cli.conftest import Home, Tunesmith

MIB = 1024 * 1024
PARTS = 12


class Breaking(Proxy):
    """Goes away for good once so many bytes have passed."""

    def __init__(self, port: int, after_bytes: int) -> None:
        super().__init__(lambda: port if self.left_bytes > 0 else make.free_port())
        self.left_bytes = after_bytes

    async def _held_up(self, size: int) -> None:
        self.left_bytes -= size
        if self.left_bytes <= 0:
            self._reset()


@pytest.mark.usefixtures("validating")
def test_a_file_is_sent_and_found_valid(tunesmith: Tunesmith, client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(make.chat_file())
    said = tunesmith("files", "push", path)
    file_id = said.out.partition(":")[0]

    assert said.status == 0, said.err
    assert said.out.splitlines()[1] == f"{path}: valid; format chat, 12 rows, 0 problems, 0 warnings"
    assert client.files.content(file_id).read() == make.chat_file()
    (listed,) = json.loads(tunesmith("files", "list", "--json").out)
    assert (listed["id"], listed["filename"], listed["status"]) == (file_id, "train.jsonl", "processed")
    assert f"{file_id}  processed  fine-tune" in tunesmith("files", "list").out


@pytest.mark.usefixtures("validating")
def test_what_is_wrong_is_shown_with_its_line(tunesmith: Tunesmith, tmp_path: Path) -> None:
    path, bad = tmp_path / "train.jsonl", '{"messages": [{"role": "user", "content": 5}]}'
    path.write_text("\n".join([make.chat_line("a", "b"), bad, make.chat_line("c", "d")]))
    said = tunesmith("files", "push", path)

    assert (said.status, said.err) == (1, "")
    assert "2:43  content_not_text" in said.out and f"     2 | {bad}\n" in said.out
    assert json.loads(tunesmith("files", "push", path, "--json").out)["report"]["problem_count"] == 2


@pytest.mark.parametrize(("content", "why"), [(None, "No such file"), (b"", "is empty; nothing was sent")])
def test_what_is_no_file_is_told_in_a_line(tunesmith: Tunesmith, tmp_path: Path, content: bytes | None, why: str) -> None:
    if content is not None:
        (tmp_path / "train.jsonl").write_bytes(content)
    said = tunesmith("files", "push", "train.jsonl")

    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    assert why in said.err


@pytest.mark.usefixtures("validating")
def test_parts_that_have_arrived_are_not_sent_again(
    tunesmith: Tunesmith, home: Home, client: OpenAI, api_url: str, tmp_path: Path
) -> None:
    """The connection breaks off; the same command goes on, and completes a file that is the same byte for byte."""
    path = tmp_path / "train.jsonl"
    line = make.chat_line("x", "y" * 1000).encode() + b"\n"
    path.write_bytes(b"".join(line.replace(b"x", str(n).encode()) for n in range((PARTS * MIB - MIB // 2) // len(line))))
    push = ("files", "push", path, "--part-size", "1", "--json")
    proxy = Breaking(urlsplit(api_url).port or 0, after_bytes=8 * MIB)
    with serving(proxy):
        home.log_in(f"http://127.0.0.1:{proxy.port}/v1", client.api_key)
        broken = tunesmith(*push)
        (note,) = (home.folder / "state" / "tunesmith" / "uploads").iterdir()
        upload_id = json.loads(note.read_text())["upload"]
        arrived = {part["id"] for part in shown(client, upload_id)["parts"]}
        proxy.left_bytes = 100 * MIB
        pushed = tunesmith(*push)

    assert (broken.status, broken.err.count("\n")) == (1, 1)
    assert 0 < len(arrived) < PARTS
    assert pushed.status == 0, pushed.err
    assert client.files.content(json.loads(pushed.out)["id"]).read() == path.read_bytes()
    assert 100 * MIB - proxy.left_bytes < (PARTS - len(arrived) + 1) * MIB
    assert not note.exists()


def shown(client: OpenAI, upload_id: str) -> dict[str, list[dict[str, str]]]:
    return client.get(f"/uploads/{upload_id}", cast_to=dict)  # type: ignore[type-arg]
