"""`tunesmith files check`: the same words as the service has, without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.core import data
from tests import make
from tests.cli.test_models import Said
from tests.embedded.patience import PATIENCE_SECONDS

CORPUS = Path(__file__).parents[1] / "data" / "corpus"


def check(*arguments: str | Path) -> Said:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")}
    environment["TUNESMITH_CACHE_DIR"] = os.environ["TUNESMITH_CACHE_DIR"]
    command = [sys.executable, "-m", "cli.main", "files", "check", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    return Said(done.returncode, done.stdout, done.stderr)


def test_a_bad_file_is_told_by_line_place_code_and_cure() -> None:
    path = CORPUS / "several-problems-in-a-row.jsonl"
    said = check(path)
    header, first, *_ = said.out.partition("problems\n")[2].splitlines()

    assert said.status == 1
    assert said.out.startswith(f"{path}: INVALID; format chat, 1 rows, 4 problems, 0 warnings\n")
    assert header.split() == ["LINE", "CODE", "PATH", "WHAT;", "CURE"]
    assert first.split(maxsplit=3) == [
        "1:43",
        "content_not_text",
        "$.messages[0].content",
        "content must be a string or a list of text parts; write it as a string",
    ]


def test_a_file_with_warnings_is_valid_and_json_is_the_services_report() -> None:
    path = CORPUS / "duplicate-rows.jsonl"
    plain, said = check(path), check(path, "--json")

    assert (plain.status, said.status) == (0, 0)
    assert "3     duplicate_row  $     the same row as line 1; keep one" in plain.out
    with path.open("rb") as file:
        assert json.loads(said.out) == data.examine(data.split_lines(file)).model_dump(mode="json")


def test_a_base_counts_tokens_and_names_the_rows_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([make.chat_line("a", "b"), make.chat_line("x" * 99, "y"), make.chat_line("<|im_end|>", "z")]))
    said = check(path, "--model", make.TINY, "--max-seq-length", "64", "--json")
    found = json.loads(said.out)["model"]

    assert said.status == 0
    assert (found["examples"], found["trained_tokens"], found["left_out_count"]) == (1, 2, 2)
    assert [(problem["line"], problem["code"]) for problem in found["left_out"]] == [(2, "row_too_long"), (3, "row_not_rendered")]
    assert "2 rows left out" in check(path, "--model", make.TINY, "--max-seq-length", "64").out


def test_a_file_of_which_a_base_leaves_all_out_fails(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(make.chat_line("x" * 99, "y"))

    assert (check(path).status, check(path, "--model", make.TINY, "--max-seq-length", "64").status) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.jsonl",), "nowhere.jsonl"),
        ((CORPUS / "chat-plain.jsonl", "--model", "gpt-9"), "not in the catalog"),
        (
            (CORPUS / "chat-plain.jsonl", "--max-seq-length", "7"),
            "or equal to 8; see `tunesmith files check --help`",
        ),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(arguments: tuple[str | Path, ...], words: str) -> None:
    said = check(*arguments)

    assert said.status != 0
    assert words in said.err
    assert "Traceback" not in said.err
