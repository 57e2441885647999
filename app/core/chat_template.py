"""Chat templates as bases bring them: jinja2 in a sandbox, with all that transformers offers to templates.

Its own function writes the same (tests/core/test_chat_template.py compares), but importing it takes longer than all else that
most of our processes import; and two threads may not render one template at once there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Spans = list[tuple[int, int]]


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    opens_turn: bool = False,
    **variables: str,
) -> tuple[str, Spans]:
    """The text, and where in it lies what stood in `{% generation %}`. Raises TemplateError.

    `messages` and `tools` are plain JSON. The template may be a stranger's: it is given nothing that it could do harm with.
    """
    written = _Written()
    token = _writing.set(written)
    try:
        for block in _compiled(template).generate(
            messages=messages, tools=tools or None, documents=None, add_generation_prompt=opens_turn, **variables
        ):
            written.blocks.append(block)
            written.length += len(block)
    finally:
        _writing.reset(token)
    return "".join(written.blocks), written.spans


@dataclass
class _Written:
    """The text so far."""

    blocks: list[str] = field(default_factory=list)
    length: int = 0
    spans: Spans = field(default_factory=list)


_writing: ContextVar[_Written] = ContextVar("writing")


class _Generation(Extension):
    """`{% generation %}` surrounds what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        text, written = caller(), _writing.get()
        written.spans.append((written.length, written.length + len(text)))
        return text


class _Dict:
    """`dict(…)`, without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Holds no name that begins with an underscore, by which Python's internals could be reached."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja2 has it, so that `self` may be a name
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _require_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no name that begins with an underscore, as {name!r} does")


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _json  # jinja2's own escapes for HTML
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
