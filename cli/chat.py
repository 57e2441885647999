"""`tunesmith chat`: talk to a model, or to a mix of them."""

import json
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option

from cli import complete
from cli.failure import Failed, say
from cli.options import AsJson, Stack
from cli.output import show

if TYPE_CHECKING:
    from cli.api import Api

PATH = "/chat/completions"
WEIGHED = re.compile(r"(?P<model>.+):(?P<weight>-?\d(\.\d+)?)")  # names have colons too, but no single digit after the last
Chat = list[dict[str, str]]


def parsed_adapter(text: str) -> dict[str, Any]:
    """`NAME:WEIGHT`, or a name alone, which counts once."""
    found = WEIGHED.fullmatch(text)
    if found is None:
        return {"model": text, "weight": 1.0}
    if not float(found["weight"]):
        raise BadParameter(f"{text} counts nothing; leave it out")
    return {"model": found["model"], "weight": float(found["weight"])}


Model = Annotated[str, Argument(metavar="MODEL", help="A base, a model of yours, or an alias.", autocompletion=complete.models)]
Message = Annotated[str | None, Argument(metavar="[MESSAGE]", help="Else it is asked for, again and again, or read from stdin.")]
Adapters = Annotated[
    list[str] | None,
    Option(
        "--adapter",
        metavar="NAME[:WEIGHT]",
        help="A model of yours that is added to MODEL, its base; may be repeated: docs/inference.md.",
        autocompletion=complete.models,
    ),
]
System = Annotated[str | None, Option(metavar="TEXT", help="The system message.")]
MaxTokens = Annotated[int | None, Option(min=1, metavar="N", help="The longest answer.")]
Temperature = Annotated[float | None, Option(min=0.0, max=2.0, metavar="T", help="0 always takes the likeliest token.")]
Seed = Annotated[int | None, Option(metavar="N", help="The same seed gives the same answer.")]


def chat(
    model: Model,
    message: Message = None,
    adapter: Adapters = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    data_dir: Stack = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a model.

    The answer is written as it comes. Without MESSAGE it is a conversation: Ctrl-C stops an answer, Ctrl-D ends it. --json writes
    the service's answer, once it is whole.
    """
    from cli.api import connect

    asked: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    asked["adapters"] = list(map(parsed_adapter, adapter)) if adapter else None
    asked = {name: value for name, value in asked.items() if value is not None}
    said: Chat = [{"role": "system", "content": system}] if system else []
    with connect(data_dir) as api:
        if message is None and sys.stdin.isatty():
            if as_json:
                raise Failed("--json needs a MESSAGE, or one on stdin")
            _converse(api, asked, said)
            return
        said.append({"role": "user", "content": sys.stdin.read() if message is None else message})
        if as_json:
            answer = api.post(PATH, {**asked, "messages": said})
            show(answer, "", as_json=True)
        else:
            _answer(api, {**asked, "messages": said})


def _converse(api: "Api", asked: dict[str, Any], said: Chat) -> None:
    import readline  # noqa: F401  # lines can be edited, and the last ones come again

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if not line:
            continue
        said.append({"role": "user", "content": line})
        try:
            said.append({"role": "assistant", "content": _answer(api, {**asked, "messages": said})})
        except Failed as why:  # what has been said is not lost by it
            say(why)
            said.pop()


def _answer(api: "Api", asked: dict[str, Any]) -> str:
    """Written as it comes; all of it, or what had come before Ctrl-C."""
    pieces = list[str]()
    try:
        for piece in _pieces(api, asked):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    print()
    return "".join(pieces)


def _pieces(api: "Api", asked: dict[str, Any]) -> Iterator[str]:
    with api.stream("POST", PATH, json={**asked, "stream": True}) as messages:
        for message in messages:
            if message.data == "[DONE]":
                return
            chunk = json.loads(message.data)
            if "error" in chunk:
                raise Failed(f"the answer broke off: {chunk['error']['message']}")
            for choice in chunk["choices"]:
                if piece := choice["delta"].get("content"):
                    yield piece
