"""Reading training files. What single rows may hold is told by tests/data: see test_corpus.py."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core import data
from app.core.chat import Chat, Message, ToolCall
from app.core.data import parse
from app.core.data.codes import CODES
from app.core.data.place import Place, column_of, path_of

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def row(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": list(messages), **more}).encode()


def only(line: dict[str, Any]) -> Chat:
    (read,) = data.read([json.dumps(line).encode()])
    return read


GOOD, OTHER = row(USER, ASSISTANT), row(USER, ASSISTANT, USER, ASSISTANT)


def test_all_problems_are_counted_and_a_hundred_are_listed() -> None:
    report = data.examine([b"{"] * 250)

    assert (report.problem_count, len(report.problems)) == (250, data.MAX_LISTED)
    assert report.counts == {"not_json": 250, "duplicate_row": 249}
    assert "249 more" in report.summary()


def test_a_code_that_is_everywhere_hides_no_other() -> None:
    report = data.examine([b"{%d" % n for n in range(300)] + [row(USER, ASSISTANT | {"weight": 7})])

    assert len(report.problems) == data.MAX_LISTED
    assert (report.problems[-1].line, report.problems[-1].code) == (301, "weight_invalid")


def test_all_problems_of_a_row_are_told() -> None:
    report = data.examine([row({"role": "robot"}, {"role": "user", "content": 5}, ASSISTANT | {"weight": 2})])

    assert [problem.path for problem in report.problems] == [
        "$.messages[0].role",
        "$.messages[1].content",
        "$.messages[2].weight",
    ]


def test_warnings_leave_a_file_valid() -> None:
    report = data.examine([GOOD, GOOD, row({"role": "system", "content": ""}, USER, ASSISTANT)])

    assert report.is_valid
    assert (report.warning_count, report.counts) == (2, {"duplicate_row": 1, "system_empty": 1})


def test_a_duplicate_names_the_row_it_repeats_and_all_are_counted() -> None:
    report = data.examine([GOOD, *[OTHER] * 151, GOOD])

    assert report.counts == {"duplicate_row": 151}
    assert len(report.warnings) == data.MAX_LISTED
    assert report.warnings[0].message == "the same row as line 2"


def test_files_of_several_formats_name_the_first_line_of_each() -> None:
    report = data.examine([GOOD, OTHER, b'{"text": "a"}', GOOD, b'{"prompt": "a", "completion": "b"}'])

    assert report.formats == {"chat": 1, "text": 3, "completion": 5}
    (problem,) = report.problems
    assert (problem.code, problem.line) == ("formats_mixed", 3)
    assert "chat from line 1, text from line 3, completion from line 5" in problem.message


@pytest.mark.parametrize(
    ("line", "messages"),
    [
        ({"prompt": "2+2", "completion": " 4"}, [("user", "2+2"), ("assistant", " 4")]),
        ({"instruction": "Name one.", "output": "Blue."}, [("user", "Name one."), ("assistant", "Blue.")]),
        ({"instruction": "Name one.", "input": "warm", "output": "Red."}, [("user", "Name one.\n\nwarm"), ("assistant", "Red.")]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
            [("system", "c"), ("user", "a"), ("assistant", "b")],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "c"},
                    {"from": "user", "value": "a"},
                    {"from": "model", "value": "b"},
                ]
            },
            [("system", "c"), ("user", "a"), ("assistant", "b")],
        ),
    ],
)
def test_other_formats_become_chats(line: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    assert only(line) == Chat(tuple(Message(role, content) for role, content in messages), 1)


def test_a_preference_compares_two_last_messages_and_all_before_is_context() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    line = {
        "input": {"messages": [USER, ASSISTANT, {"role": "user", "content": "c"}], "tools": [tool]},
        "preferred_output": [ASSISTANT | {"weight": 0}],
        "non_preferred_output": [{"role": "assistant", "content": "d"}],
    }
    asked = tuple(Message(role, content, 0) for role, content in (("user", "a"), ("assistant", "b"), ("user", "c")))
    read = only(line)

    assert read.sides == ((*asked, Message("assistant", "b")), (*asked, Message("assistant", "d")))
    assert read.tools == (tool,)


@pytest.mark.parametrize("is_good", [True, False])
def test_a_rating_is_of_the_last_answer_and_all_before_is_context(is_good: bool) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    turns = [USER, ASSISTANT, {"role": "user", "content": "c"}]
    asked = tuple(Message(role, content, 0) for role, content in (("user", "a"), ("assistant", "b"), ("user", "c")))
    expected = Chat((*asked, Message("assistant", "b")), 1, (tool,), is_good=is_good)

    assert only({"messages": [*turns, ASSISTANT | {"weight": 0}], "tools": [tool], "label": is_good}) == expected
    assert only({"prompt": turns, "completion": [ASSISTANT], "tools": [tool], "label": is_good}) == expected
    assert only({"prompt": "a", "completion": "b", "label": is_good}) == Chat(
        (Message("user", "a"), Message("assistant", "b")), 1, is_good=is_good
    )


def test_a_label_of_another_kind_is_a_column_of_completions() -> None:
    assert only({"prompt": "a", "completion": "b", "label": 1}) == Chat((Message("user", "a"), Message("assistant", "b")), 1)


def test_a_text_is_no_conversation() -> None:
    assert only({"text": " as it is\n", "source": "a column"}) == Chat((), 1, text=" as it is\n")


def test_developer_is_system_and_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]
    read = only({"messages": [{"role": "developer", "content": parts}, USER, ASSISTANT | {"weight": 0}]})

    assert [(message.role, message.content, message.weight) for message in read.messages] == [
        ("system", "be brief", 1),
        ("user", "a", 1),
        ("assistant", "b", 0),
    ]


def test_tools_calls_and_results_are_read() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": "ü"}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    read = only({"messages": [USER, asked, {"role": "tool", "tool_call_id": "c1", "content": "5"}, ASSISTANT], "tools": [tool]})

    assert read.tools == (tool,)
    assert read.messages[1] == Message("assistant", "", tool_calls=(ToolCall("c1", "f", {"b": 1, "a": "ü"}),))
    assert read.messages[2] == Message("tool", "5", tool_call_id="c1")


@pytest.mark.parametrize("line", [b"{", b'{"key": "a"}', row(USER, {"role": "assistant", "content": ""})])
def test_a_row_that_is_no_chat_stops_the_reading(line: bytes) -> None:
    with pytest.raises(data.RowError, match="line 2"):
        list(data.read([GOOD, line]))


def test_lines_end_at_newlines_only() -> None:
    content = "one\u2028two\x85three\rfour"
    text = json.dumps({"messages": [{"role": "user", "content": content}, ASSISTANT]}, ensure_ascii=False).encode()
    chunks = [text[i : i + 3] for i in range(0, len(text), 3)]

    (read,) = data.read(data.split_lines([*chunks, b"\n"]))
    assert read.messages[0].content == content


def test_a_line_without_end_is_cut_and_reported_once() -> None:
    endless = (b"x" * 300_000 for _ in range(20))
    lines = list(data.split_lines([GOOD, b"\n", *endless, b"\n", GOOD]))

    assert [(problem.line, problem.code) for problem in data.examine(lines).problems] == [(2, "line_too_long")]
    assert len(lines) == 3
    assert max(map(len, lines)) <= data.MAX_LINE_BYTES + 1


def test_nothing_behind_a_binary_beginning_is_read() -> None:
    def lines() -> Iterator[bytes]:
        yield b"\x1f\x8b\x08\x00"
        raise AssertionError

    assert [problem.code for problem in data.examine(lines()).problems] == ["file_binary"]


def test_what_a_report_tells_can_be_stored_and_read() -> None:
    rows = [json.dumps({"messages": [], key: 1}).encode() for key in ("a\x00b", "a\ud800b", "x" * 100_000)]
    report = data.examine(rows)

    told = report.model_dump_json()
    assert len(told) < 10_000
    assert not any("\x00" in text for _, text in parse.strings_of(json.loads(told)))
    assert data.Report.model_validate_json(told) == report


def test_the_documentation_lists_every_code_with_its_meaning_and_cure() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", DOCS.read_text(), re.MULTILINE)

    assert [(name, meaning, cure) for name, meaning, cure in rows if name in CODES] == [
        (name, code.meaning, code.cure) for name, code in CODES.items()
    ]


# The fast way and the exact one

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)
deep = st.integers(28, 36).flatmap(
    lambda levels: st.sampled_from([b"[" * levels + b"]" * levels, b'{"a":' * levels + b"1" + b"}" * levels])
)
texts = st.one_of(
    values.map(lambda value: json.dumps(value).encode()),
    values.map(lambda value: json.dumps(value, ensure_ascii=False, indent=1).replace("\n", " ").encode("utf-8", "surrogatepass")),
    st.lists(st.tuples(st.text(max_size=2), values), max_size=4).map(  # keys that stand twice
        lambda pairs: (
            b"{" + b" , ".join(json.dumps(key).encode() + b" :" + json.dumps(value).encode() for key, value in pairs) + b"}"
        )
    ),
    deep,
    st.text("0123456789+-.eE", min_size=1, max_size=30).map(lambda number: b'{"a": ' + number.encode() + b"}"),
    st.sampled_from([4299, 4300, 4301]).map(lambda digits: b"[" + b"9" * digits + b"]"),
    st.lists(
        st.sampled_from(
            [
                b'"',
                b"\\",
                b"\\u00",
                b"\\ud83d",
                b"\\ude00",
                b"a",
                b"{",
                b"}",
                b"[",
                b"]",
                b":",
                b",",
                b"\xc3\xa9",
                b"\xff",
                b"\x00",
                b"NaN",
                b" ",
            ]
        ),
        max_size=20,
    ).map(b"".join),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A text with a byte lost, doubled or changed."""
    text = draw(texts)
    at = draw(st.integers(0, max(0, len(text) - 1)))
    return text[:at] + draw(st.sampled_from([b"", b"\x00", b"\xef", b'"', b"}", text[at : at + 1] * 2])) + text[at + 1 :]


def verdict(parsed: Any) -> tuple[str, str]:
    """Value or code, so that NaN and -0.0 are told from what equals them."""
    try:
        return "value", repr(parsed())
    except parse.NotARow as refused:
        return refused.code, str(refused)


@given(texts | damaged())
def test_the_fast_way_and_the_exact_one_come_to_the_same(text: bytes) -> None:
    assert verdict(lambda: parse.parse(text, 2)) == verdict(lambda: parse.exact(text, 2))


@given(values)
def test_nearly_all_rows_go_the_fast_way(value: Any) -> None:
    """Else a file would be read at a tenth of the speed, and nobody would notice."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")

    assert parse.fast(text) == json.loads(text)


CORPUS = Path(__file__).parents[1] / "data" / "corpus"
WORDS = ["system", "assistant", "tool", "function", "text", "c1", "{}", "", " ", "<|im_end|>", "\x00", "\ud800"]


def corpus_rows() -> Iterator[Any]:
    for path in sorted(CORPUS.iterdir()):
        for line in path.read_bytes().splitlines():
            try:
                yield parse.parse(line, 1)
            except (parse.NotARow, ValueError):
                continue


CORPUS_ROWS = list(corpus_rows())


def replaced(value: Any, place: Place, by: Any) -> Any:
    """A copy of the value with another thing at a place."""
    if not place:
        return by
    made = list(value) if isinstance(value, list) else dict(value)
    made[place[0]] = replaced(value[place[0]], place[1:], by)
    return made


@st.composite
def odd_rows(draw: st.DrawFn) -> Any:
    """A row of the corpus in which a few things are others."""
    row = draw(st.sampled_from(CORPUS_ROWS))
    for _ in range(draw(st.integers(1, 3))):
        place, _ = draw(st.sampled_from(list(places_in(row))))
        by = draw(values | st.sampled_from(WORDS) | st.sampled_from([[], {}, [None], [[]], {"a": 1}, 0, 1, 1e308, False]))
        row = replaced(row, place, by)
    return row


@given(st.lists(odd_rows(), min_size=1, max_size=3))
def test_whatever_a_row_holds_it_is_judged(rows: list[Any]) -> None:
    """And what is found right becomes chats."""
    lines = [json.dumps(row).encode() for row in rows]
    report = data.examine(lines)

    assert sum(report.counts.values()) == report.problem_count + report.warning_count
    if report.is_valid:
        assert len(list(data.read(lines))) == len(rows)
    assert data.Report.model_validate_json(report.model_dump_json()) == report


def places_in(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    yield place, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, found in inner:
        yield from places_in(found, (*place, step))


@given(values, st.sampled_from([None, 1]))
def test_a_column_is_where_the_value_stands(value: Any, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    for place, found in places_in(value):
        column = column_of(text, place)
        assert column is not None
        assert json.JSONDecoder(strict=False).raw_decode(text, column - 1)[0] == found


def test_a_missing_key_stands_where_its_object_does() -> None:
    assert column_of('{"messages": [{}, {"a": 1}]}', ("messages", 1, "role")) == 19


def test_a_path_quotes_what_is_no_word() -> None:
    assert path_of(("messages", 2, "my key", 'a"b')) == '$.messages[2]["my key"]["a\\"b"]'
