"""Our rendering of chat templates against that of transformers: the same text, the same spans, and a sandbox."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from app.core import chat_template

SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wie groß?\n  <b>日本</b> "},
    {"role": "assistant", "content": " 12 cm "},
    {"role": "user", "content": "And doubled?"},
    {"role": "assistant", "content": "24 cm"},
]
CALL = {
    "id": "a1B2c3D4e",
    "type": "function",
    "function": {"name": "size", "arguments": {"what": "日本", "deep": [1, None, True]}},
}
CALLED = [
    {"role": "user", "content": "How large?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"cm": 12}', "tool_call_id": "a1B2c3D4e"},
    {"role": "assistant", "content": "12 cm"},
]
TOOLS = [{"type": "function", "function": {"name": "size", "description": "Says <so>.\n", "parameters": {"type": "object"}}}]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "date_string": "26 Jul 2024"}
CONVERSATIONS = ((SAID, []), (SAID[1:4], []), (CALLED, TOOLS), (SAID, TOOLS))


def templates() -> dict[str, str]:
    """Ours, and those that TRL carries but for one that wants images."""
    found = find_spec("trl")
    assert found is not None and found.origin is not None
    theirs = {f"trl/{path.name}": path.read_text() for path in (Path(found.origin).parent / "chat_templates").glob("*.jinja")}
    ours = {path.name: path.read_text() for path in (files("app.core") / "templates").iterdir()}
    return {name: text for name, text in sorted((theirs | ours).items()) if "llava" not in name}


def theirs(template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]], *, opens_turn: bool) -> Any:
    (text,), spans = render_jinja_template(
        [messages],
        tools=tools or None,
        chat_template=template,
        add_generation_prompt=opens_turn,
        return_assistant_tokens_mask="endgeneration" in template,
        **VARIABLES,
    )
    return text, spans[0] if spans else []


def attempt(rendered: Callable[[], Any]) -> Any:
    """What it returns, or what it raises: who is refused there is refused here."""
    try:
        return rendered()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", templates())
def test_it_writes_what_transformers_writes(name: str) -> None:
    template = templates()[name]
    asked = [(messages, tools, opens_turn) for messages, tools in CONVERSATIONS for opens_turn in (False, True)]
    expected = [attempt(partial(theirs, template, messages, tools, opens_turn=opens)) for messages, tools, opens in asked]
    found = [
        attempt(partial(chat_template.render, template, messages, tools=tools, opens_turn=opens, **VARIABLES))
        for messages, tools, opens in asked
    ]

    assert found == expected
    assert any(isinstance(one, tuple) for one in found)


def test_spans_are_those_of_each_rendering_in_many_threads() -> None:
    template = "{% for m in messages %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endfor %}"

    def spans(count: int) -> list[str]:
        text, found = chat_template.render(template, [{"role": "user", "content": "x" * n} for n in range(count)])
        return [text[start:end] for start, end in found]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(spans, range(100))) == [["x" * n for n in range(count)] for count in range(100)]


def test_json_is_written_as_it_is_and_as_it_is_asked_for() -> None:
    value = {"b": "<ä>", "a": [1]}
    template = "{{ messages[0] | tojson }}|{{ messages[0] | tojson(ensure_ascii=true, indent=1, sort_keys=true) }}"

    assert chat_template.render(template, [value])[0] == f"{json.dumps(value, ensure_ascii=False)}|" + json.dumps(
        value, indent=1, sort_keys=True
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ dict.__call__.__globals__ }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(_a=1) %}",
        "{% set ns = namespace() %}{% set ns._a = 1 %}",
        "{{ raise_exception('no') }}",
        "{% for %}",
    ],
)
def test_a_template_that_reaches_out_or_refuses_is_a_template_error(template: str) -> None:
    with pytest.raises(TemplateError):
        chat_template.render(template, list(SAID))
