"""`tunesmith files check`: what a training file holds, and what is wrong with it, without any service."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from typer import Argument, Option

from cli.failure import Failed
from cli.files.report import lines_of, table
from cli.models import NO_WORKER
from cli.options import AsJson
from cli.output import busy, counting, show

if TYPE_CHECKING:
    from app.core.catalog import Base
    from app.core.data import Problem, Report
    from app.core.render import Renderer

CHUNK_BYTES = 256 * 1024
LEAST_LENGTH = 8

Checked = Annotated[Path, Argument(metavar="FILE", help="What is to be uploaded.")]
Model = Annotated[str | None, Option(metavar="BASE", help="A base model's id or alias: see `tunesmith models list`.")]
Length = Annotated[int | None, Option(min=LEAST_LENGTH, metavar="N", help="Tokens of the longest row that BASE is trained on.")]


@dataclass(frozen=True)
class Tokens:
    """What a base makes of a file. `left_out` are the first of the `left_out_count` rows that it would not be trained on."""

    base: str
    max_seq_length: int
    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    left_out_count: int
    left_out: tuple["Problem", ...]


def check(file: Checked, model: Model = None, max_seq_length: Length = None, as_json: AsJson = False) -> int:
    """Say what is wrong with a training file, by line.

    It is read as the service does when it is uploaded; nothing is sent. docs/data.md
    has the formats, and every code with its cure. The status is 1 if the file is
    invalid.

    With --model, each row is also written in the words of that base: how many tokens
    there are, and which rows would be left out. A base from a hub needs its tokenizer
    for that, which is fetched if it is not here yet.
    """
    from app.core import data

    try:
        with file.open("rb") as opened, counting(f"reading {file.name}", file.stat().st_size) as done:
            report = data.examine(data.split_lines(_chunks(opened, done)))
    except OSError as error:
        raise Failed(error) from error
    tokens = None
    if model and report.is_valid:
        if find_spec("worker") is None:
            raise Failed(NO_WORKER)
        tokens = _tokens(file, model, max_seq_length)
    document = _document(report, tokens)
    show(document, "\n".join([*lines_of(file, document), *_told(document.get("model"))]), as_json=as_json)
    return 0 if report.is_valid and (tokens is None or tokens.examples) else 1


def _chunks(file: BinaryIO, done: Callable[[int], None] = lambda _: None) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
        done(len(chunk))


def _tokens(path: Path, model: str, asked_length: int | None) -> Tokens:
    """Raises Failed."""
    from app.core import spec
    from app.core.errors import NotFound
    from app.core.render import Renderer
    from cli.doctor import configuration
    from worker.model import card
    from worker.model.refused import BaseRefused

    settings = configuration.require()
    known = configuration.require_catalog(settings)
    try:
        base = known.resolve(model)
        with busy(f"counting tokens of {base.id}"):
            renderer = Renderer.open(card.prepared(base, settings.cache_dir))
            requested = spec.Requested(training=spec.TrainingOptions(max_seq_length=asked_length or spec.AUTO))
            return _counted(path, base, renderer, spec.max_seq_length(requested, base))
    except (NotFound, BaseRefused, OSError, ValueError) as error:
        raise Failed(error) from error


def _counted(path: Path, base: "Base", renderer: "Renderer", max_tokens: int) -> Tokens:
    from app.core import data
    from app.core.fitting import fit_all

    examples = tokens = trained = longest = 0
    left_out, left_out_count = list[data.Problem](), 0
    with path.open("rb") as file:
        for chat in data.read(data.split_lines(_chunks(file))):
            for fitted in fit_all([chat], renderer, max_tokens=max_tokens, long_rows="drop"):
                if fitted.example:
                    length = len(fitted.example.tokens)
                    examples, tokens, longest = examples + 1, tokens + length, max(longest, length)
                    trained += sum(fitted.example.is_trained)
                elif fitted.problem:
                    left_out_count += 1
                    left_out = [*left_out, fitted.problem][: data.MAX_LISTED]
    return Tokens(base.id, max_tokens, examples, tokens, trained, longest, left_out_count, tuple(left_out))


def _document(report: "Report", tokens: Tokens | None) -> dict[str, Any]:
    document: dict[str, Any] = report.model_dump(mode="json")
    if tokens:
        document["model"] = asdict(tokens) | {"left_out": [problem.model_dump(mode="json") for problem in tokens.left_out]}
    return document


def _told(model: dict[str, Any] | None) -> Iterator[str]:
    if model is None:
        return
    limit = f"rows of at most {model['max_seq_length']} tokens"
    yield f"\n{model['base']}, {limit}: {model['examples']} examples of {model['tokens']} tokens,"
    trained = f"{model['trained_tokens']} of them trained on, {model['longest']} in the longest"
    yield f"{trained}; {model['left_out_count']} rows left out"
    yield from table("left out", model["left_out"], model["left_out_count"])
