"""Our marked templates against the published ones, as TRL carries them: the same text, and so the same tokens."""

import json
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

from app.core.chat import Message, ToolCall
from app.core.render import DATE, Renderer, RenderError, marked_template, marked_tools_template
from worker.model import bytewise

# family: (its copies in TRL, how it begins, how a turn ends)
STOCK = {
    "chatml": (("qwen3_instruct_2507",), "", "<|im_end|>"),
    "qwen2.5": (("qwen2_5",), "", "<|im_end|>"),
    "llama3": (("llama3",), "<|begin_of_text|>", "<|eot_id|>"),
    "llama3.1": (("llama3_1", "llama3_2"), "<|begin_of_text|>", "<|eot_id|>"),
    "gemma": (("gemma3",), "<bos>", "<end_of_turn>"),
}
CASES = [(family, name) for family, (names, _, _) in STOCK.items() for name in names]
WITH_TOOLS = [(family, name) for family, name in CASES if marked_tools_template(family)]

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Says "how it is".\n',
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Köln", "東京"]}}},
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
)
ASKED = Message("user", "Is it warm?")
CALL = ToolCall("call_1", "weather", {"city": "Köln", "days": [1, 2.5, None], "deep": {"a": True}})
RESULT = Message("tool", '{"celsius": 21}', tool_call_id="call_1")


def renderer(family: str) -> Renderer:
    """With a byte for a token, but for what begins a text and ends a turn: texts can be compared through it."""
    _, begin, end = STOCK[family]
    tokenizer = bytewise.tokenizer(320)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (begin, end) if token])
    end_id = tokenizer.token_to_id(end)
    assert end_id is not None
    return Renderer(tokenizer, marked_template(family), [end_id], 10**6, marked_tools_template(family))


def stock(name: str) -> str:
    found = find_spec("trl")
    assert found is not None and found.origin is not None
    return (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text()


def written(message: Message) -> dict[str, Any]:
    """As a program hands it to `apply_chat_template`."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    more = {"tool_calls": calls} if calls else {}
    more |= {"tool_call_id": message.tool_call_id} if message.tool_call_id else {}
    return {"role": message.role, "content": message.content, **more}


def theirs(family: str, name: str, messages: list[Message], tools: tuple[dict[str, Any], ...] = ()) -> str:
    text: str = render_jinja_template(
        [[written(message) for message in messages]],
        tools=list(tools) or None,
        chat_template=stock(name),
        bos_token=STOCK[family][1],
        **DATE,
    )[0][0]
    return text


def ours(family: str, messages: list[Message], tools: tuple[dict[str, Any], ...] = ()) -> str:
    made = renderer(family)
    return made.tokenizer.decode(made.example(messages, tools).tokens, skip_special_tokens=False)


contents = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=20).filter(
    lambda text: "<" not in text
)
turns = st.lists(st.tuples(contents, contents), min_size=1, max_size=3)


@pytest.mark.parametrize(("family", "name"), CASES)
@given(system=st.none() | contents, pairs=turns)
def test_a_conversation_is_written_as_the_base_knows_it(
    family: str, name: str, system: str | None, pairs: list[tuple[str, str]]
) -> None:
    opening = [] if system is None else [Message("system", system)]
    said = chain.from_iterable((Message("user", asked), Message("assistant", answer)) for asked, answer in pairs)
    messages = [*opening, *said]

    assert ours(family, messages) == theirs(family, name, messages)


CONVERSATIONS = {
    "a call and its result": [ASKED, Message("assistant", "", tool_calls=(CALL,)), RESULT, Message("assistant", "Yes.")],
    "a call at the end": [Message("system", "Be brief."), ASKED, Message("assistant", "", tool_calls=(CALL,))],
    "no call": [ASKED, Message("assistant", "I cannot say.")],
    "text beside a call": [ASKED, Message("assistant", "Let me look.", tool_calls=(CALL,)), RESULT, Message("assistant", "Yes.")],
    "two calls": [
        ASKED,
        Message("assistant", "", tool_calls=(CALL, ToolCall("call_2", "now", {}))),
        RESULT,
        Message("tool", "12:00", tool_call_id="call_2"),
        Message("assistant", "Yes, at noon."),
    ],
}


@pytest.mark.parametrize("tools", [TOOLS, ()], ids=["tools", "no tools"])
@pytest.mark.parametrize("told", CONVERSATIONS)
@pytest.mark.parametrize(("family", "name"), WITH_TOOLS)
def test_tools_and_calls_are_written_as_the_base_knows_them(
    family: str, name: str, told: str, tools: tuple[dict[str, Any], ...]
) -> None:
    """What a published template refuses or leaves out, ours refuses."""
    messages = CONVERSATIONS[told]
    try:
        expected = theirs(family, name, messages, tools)
    except TemplateError:
        expected = ""
    if all(message.content in expected for message in messages if message.role == "assistant") and expected:
        assert ours(family, messages, tools) == expected
    else:
        with pytest.raises(RenderError):
            ours(family, messages, tools)


@pytest.mark.parametrize("family", ["chatml", "qwen2.5", "llama3.1"])
def test_the_assistants_call_is_trained_on_and_nothing_else(family: str) -> None:
    made = renderer(family)
    example = made.example(CONVERSATIONS["a call and its result"], TOOLS)
    trained = [token for token, flag in zip(example.tokens, example.is_trained, strict=True) if flag]
    said = made.tokenizer.decode(trained, skip_special_tokens=False)
    end = STOCK[family][2]

    assert said.count(end) == 2 and said.endswith(f"Yes.{end}")
    assert '"name": "weather"' in said and json.dumps(CALL.arguments, ensure_ascii=False) in said
    assert "celsius" not in said and "how it is" not in said


def test_mistrals_tools_stand_before_the_last_question_and_its_ids_are_nine_letters() -> None:
    """No published copy is at hand: this holds what its documentation shows."""
    tokenizer = bytewise.tokenizer(320)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    stop = tokenizer.token_to_id("</s>")
    made = Renderer(tokenizer, marked_template("mistral"), [stop], 10**6, marked_tools_template("mistral"))
    text = tokenizer.decode(made.example(CONVERSATIONS["a call and its result"], TOOLS[1:]).tokens, skip_special_tokens=False)

    call_id, arguments = text.partition('"id": "')[2][:9], json.dumps(CALL.arguments, ensure_ascii=False)
    assert text == (
        '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "now", "parameters": {}}}][/AVAILABLE_TOOLS]'
        "[INST] Is it warm?[/INST]"
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {arguments}, "id": "{call_id}"}}]</s>'
        f'[TOOL_RESULTS] {{"content": {{"celsius": 21}}, "call_id": "{call_id}"}}[/TOOL_RESULTS] Yes.</s>'
    )
    assert call_id.isalnum()


@pytest.mark.parametrize("family", ["gemma", "llama3", "smollm2"])
def test_a_family_without_tools_refuses_rows_that_have_them(family: str) -> None:
    assert marked_tools_template(family) is None
    plain = renderer("chatml")
    made = Renderer(plain.tokenizer, plain.template, list(plain.stop_ids), 10**6)

    for messages, tools in ((CONVERSATIONS["no call"], TOOLS), (CONVERSATIONS["a call and its result"], ())):
        with pytest.raises(RenderError, match="has no tools"):
            made.example(messages, tools)


def test_turns_that_a_base_never_saw_in_that_order_are_refused() -> None:
    for family in ("gemma",):
        with pytest.raises(RenderError, match="take turns"):
            ours(family, [ASKED, ASKED, Message("assistant", "Yes.")])
