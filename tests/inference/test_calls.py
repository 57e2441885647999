"""Calls of tools, read out of what a model says."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from app.core import catalog
from app.core.chat import Message, ToolCall
from app.core.engine import Chunk
from app.inference.calls import Speech
from app.inference.gateway import Target
from app.inference.schemas import ChatMessage, ChatRequest
from app.inference.service import Answer, Whole
from tests.core.test_templates import ASKED, CALL, TOOLS, renderer

TAG = "<tool_call>"
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TWO = ONE + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def said(text: str, opening: str = TAG, *, size: int = 3, most: int | None = None) -> tuple[str, list[tuple[str, Any]]]:
    """Text and calls of an answer that comes in pieces of `size` characters."""
    speech = Speech(opening, {"weather", "now"}, most=most)
    told = "".join(speech.push(text[at : at + size]) for at in range(0, len(text), size))
    rest, calls = speech.end()
    assert all(call["id"].startswith("call_") and call["type"] == "function" for call in calls)
    return told + rest, [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("text", "opening", "content", "calls"),
    [
        ("It is warm.", TAG, "It is warm.", []),
        (ONE, TAG, "", [("weather", {"city": "Köln"})]),
        ("\n" + ONE + "\n", TAG, "", [("weather", {"city": "Köln"})]),
        ("Let me look.\n" + ONE, TAG, "Let me look.\n", [("weather", {"city": "Köln"})]),
        (TWO, TAG, "", [("weather", {"city": "Köln"}), ("now", {})]),
        ("1 <tool 2", TAG, "1 <tool 2", []),  # begins like a call
        (ONE[:-12], TAG, ONE[:-12], []),  # the limit came first
        (ONE.replace("weather", "rm"), TAG, ONE.replace("weather", "rm"), []),  # nobody offered that
        (ONE.replace("}}", "}"), TAG, ONE.replace("}}", "}"), []),
        (ONE + " and more", TAG, ONE + " and more", []),
        ('{"name": "now", "parameters": {}}', "{", "", [("now", {})]),
        (' {"name": "now", "parameters": {"a": [1]}}', "{", "", [("now", {"a": [1]})]),
        ('{"name": "now"}', "{", '{"name": "now"}', []),
        ('{"size_cm": 12}', "{", '{"size_cm": 12}', []),
        ('So: {"name": "now", "parameters": {}}', "{", 'So: {"name": "now", "parameters": {}}', []),
        ('[{"name": "now", "arguments": {}, "id": "a1B2c3D4e"}]', "[", "", [("now", {})]),
        ("[1, 2]", "[", "[1, 2]", []),
        ("[]", "[", "[]", []),
        ("", TAG, "", []),
    ],
)
def test_calls_are_told_from_text(text: str, opening: str, content: str, calls: list[tuple[str, Any]], size: int) -> None:
    assert said(text, opening, size=size) == (content, calls)


def test_of_several_calls_one_is_kept_where_one_is_wanted() -> None:
    assert said(TWO, most=1) == ("", [("weather", {"city": "Köln"})])


def test_text_is_told_as_it_comes() -> None:
    speech = Speech(TAG, {"now"})

    assert [speech.push(piece) for piece in ("It ", "is <", "b> warm", "<tool_call")] == ["It ", "is ", "<b> warm", ""]


@pytest.mark.parametrize("family", ["chatml", "qwen2.5", "llama3.1"])
def test_what_a_template_writes_is_read_again(family: str) -> None:
    """The text that a model learns to say for a call, without the end of its turn."""
    made = renderer(family)
    calls = (CALL,) if family == "llama3.1" else (CALL, ToolCall("call_2", "now", {}))
    conversation = [ASKED, Message("assistant", "", tool_calls=calls)]
    example = made.example(conversation, TOOLS)
    learnt = [token for token, is_trained in zip(example.tokens, example.is_trained, strict=True) if is_trained]
    prompt = made.prompt(conversation[:1], TOOLS)

    assert example.tokens[: len(prompt)] == prompt
    assert said(made.decode(learnt), made.call_opening) == ("", [(call.name, call.arguments) for call in calls])


TOLD = [
    Chunk(text="I look. <tool"),
    Chunk(text='_call>\n{"name": "now", "arguments": {"zone": "UTC"}}'),
    Chunk(text="\n</tool_call>", finish_reason="stop", completion_tokens=9),
]


def answer(**asked: Any) -> Answer:
    base = next(base for base in catalog.load().values() if base.family == "chatml")
    tools = [{"type": "function", "function": {"name": "now", "strict": True}}]
    messages = [{"role": "user", "content": "When?"}]
    request = ChatRequest.model_validate({"model": base.id, "messages": messages, "tools": tools, **asked})
    assert request.offered_tools in ([], [{"type": "function", "function": {"name": "now"}}])
    return Answer(Target(base.id, None, base, None, (), renderer("chatml")), request)


def test_a_call_is_streamed_after_the_text_before_it() -> None:
    one = answer()
    (said,), (ended_with_calls, end) = (
        [piece["choices"][0] for chunk in chunks for piece in one.pieces(0, chunk)] for chunks in (TOLD[:2], TOLD[2:])
    )

    assert said["delta"] == {"content": "I look. "} and said["finish_reason"] is None
    (call,) = ended_with_calls["delta"]["tool_calls"]
    assert (call["index"], call["function"]) == (0, {"name": "now", "arguments": '{"zone": "UTC"}'})
    assert (end["delta"], end["finish_reason"]) == ({}, "tool_calls")


def test_a_whole_answer_tells_its_calls() -> None:
    whole = Whole("".join(chunk.text for chunk in TOLD), "stop", 5, 9)
    choice = answer().whole([whole])["choices"][0]

    assert choice["message"]["content"] == "I look. "
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["now"]
    assert choice["finish_reason"] == "tool_calls"
    assert ChatMessage.model_validate(choice["message"]).to_message().tool_calls[0].arguments == {"zone": "UTC"}


CALLED = {"id": "1", "function": {"name": "a", "arguments": "{}"}}


def test_who_offers_no_tools_is_told_text() -> None:
    whole = Whole(ONE, "stop", 5, 9)

    assert answer(tool_choice="none").whole([whole])["choices"][0]["message"] == {
        "role": "assistant", "content": ONE, "refusal": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            {"role": "user", "content": "a", "tool_calls": [{"id": "1", "function": {"name": "a", "arguments": "{}"}}]},
            "assistant",
        ),
        ({"role": "assistant"}, "content"),
        ({"role": "tool", "content": "12:00"}, "tool_call_id"),
        ({"role": "user", "content": "a", "tool_call_id": "1"}, "tool_call_id"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "a", "arguments": "[]"}}]}, "JSON object"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "a", "arguments": "{"}}]}, "JSON object"),
    ],
)
def test_a_message_that_misplaces_calls_is_refused(message: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ChatMessage.model_validate(message)
