import json
from typing import Any

import pytest

from app.core import chat

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def row(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": list(messages), **more}).encode()


GOOD = row(USER, ASSISTANT)

BAD = {
    "row_not_object": b"[1]",
    "not_json": b'{"messages": [',
    "not_utf8": b'{"messages": "\xff"}',
    "too_deep": b"[" * 40 + b"]" * 40,
    "duplicate_key": b'{"messages": [], "messages": []}',
    "messages_missing": b'{"messages": []}',
    "unknown_key": row(USER, ASSISTANT, extra=1),
    "tools_unsupported": row(USER, ASSISTANT, tools=[{"type": "function"}]),
    "message_not_object": row("hello", ASSISTANT),
    "role_unknown": row({"role": "robot", "content": "a"}, ASSISTANT),
    "weight_invalid": row(USER, ASSISTANT | {"weight": 0.5}),
    "weight_misplaced": row(USER | {"weight": 1}, ASSISTANT),
    "content_not_text": row(USER, {"role": "assistant", "content": None}),
    "content_empty": row(USER, {"role": "assistant", "content": ""}),
    "nul_character": row({"role": "user", "content": "a\x00"}, ASSISTANT),
    "lone_surrogate": row({"role": "user", "content": "é\ud800"}, ASSISTANT),
    "part_unsupported": row({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT),
    "nothing_to_train": row(USER, ASSISTANT | {"weight": 0}),
    "line_too_long": row({"role": "user", "content": "x" * chat.MAX_LINE_BYTES}, ASSISTANT),
}


@pytest.mark.parametrize("code", BAD)
def test_a_bad_row_is_named_by_line_and_code(code: str) -> None:
    report = chat.validate([GOOD, BAD[code], GOOD])

    assert not report.is_valid
    assert [(problem.line, problem.code) for problem in report.problems] == [(2, code)]
    assert report.rows == 3


@pytest.mark.parametrize("constant", [b"NaN", b"Infinity", b"9" * 5000])
def test_numbers_that_are_not_json_are_refused(constant: bytes) -> None:
    report = chat.validate([b'{"messages": ' + constant + b"}"])

    assert [problem.code for problem in report.problems] == ["not_json"]


def test_an_empty_file_is_a_problem_of_line_one() -> None:
    assert chat.validate([b"", b"  "]).problems[0].code == "file_empty"


def test_all_problems_are_counted_and_a_hundred_are_listed() -> None:
    report = chat.validate([b"{"] * 250)

    assert report.problem_count == 250
    assert len(report.problems) == chat.MAX_LISTED
    assert "249 more" in report.summary()


def test_a_problem_says_where_in_the_row_it_is() -> None:
    problem = chat.validate([row(USER, ASSISTANT | {"weight": 7})]).problems[0]

    assert problem.path == "$.messages[1].weight"


def test_developer_is_system_and_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]
    (read,) = chat.read([row({"role": "developer", "content": parts}, USER, ASSISTANT)])

    assert read.messages[0] == chat.Message("system", "be brief")


def test_brackets_inside_strings_are_not_depth() -> None:
    assert chat.validate([row({"role": "user", "content": "[{" * 100}, ASSISTANT)]).is_valid


def test_lines_end_at_newlines_only() -> None:
    content = "one\u2028two\x85three\rfour"
    text = json.dumps({"messages": [{"role": "user", "content": content}, ASSISTANT]}, ensure_ascii=False).encode()
    chunks = [text[i : i + 3] for i in range(0, len(text), 3)]

    (read,) = chat.read(chat.split_lines([*chunks, b"\n"]))
    assert read.messages[0].content == content


def test_a_line_without_end_is_cut_and_reported_once() -> None:
    endless = (b"x" * 300_000 for _ in range(20))
    lines = list(chat.split_lines([GOOD, b"\n", *endless, b"\n", GOOD]))

    assert [problem.code for problem in chat.validate(lines).problems] == ["line_too_long"]
    assert len(lines) == 3
    assert max(map(len, lines)) <= chat.MAX_LINE_BYTES + 1


def test_a_byte_order_mark_is_no_problem() -> None:
    assert chat.validate([b"\xef\xbb\xbf" + GOOD]).is_valid


def test_what_a_report_tells_can_be_stored_and_read() -> None:
    rows = [json.dumps({key: 1}).encode() for key in ("a\x00b", "a\ud800b", "x" * 100_000)]
    problems = chat.validate(rows).problems

    assert len(problems) == 3
    for problem in problems:
        told = problem.model_dump_json()
        assert len(told) < 1000
        assert "\\u0000" not in told
        told.encode()
