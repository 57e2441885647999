"""`tunesmith data`: what a training file holds, and what is wrong with it, without any service."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cli.failure import failed
from cli.models import NO_WORKER
from cli.table import columns

if TYPE_CHECKING:
    from app.core.catalog import Base
    from app.core.data import Problem, Report
    from app.core.render import Renderer

CHUNK_BYTES = 256 * 1024
LEAST_LENGTH = 8
CHECK = """\
Read a training file as the service does when it is uploaded, and say what is wrong with it, line by line. docs/data.md has the
formats, and every code with its cure. The status is 1 if the file is invalid.

With --model, each row is also written in the words of that base: how many tokens there are, and which rows would be left out. A
base from a hub needs its tokenizer for that, which is fetched if it is not here yet."""


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


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("data", help="check a training file before it is uploaded")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="what is wrong with a file, by line",
        description=CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("file", metavar="FILE", type=Path)
    check.add_argument("--model", metavar="BASE", help="a base model's id or alias: see `tunesmith models list`")
    check.add_argument("--max-seq-length", metavar="N", type=_length, help="tokens of the longest row that BASE is trained on")
    check.add_argument("--json", action="store_true", help="write the report as the API gives it")
    check.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from app.core import data

    try:
        with options.file.open("rb") as file:
            report = data.examine(data.split_lines(_chunks(file)))
    except OSError as error:
        return failed(error)
    tokens = None
    if options.model and report.is_valid:
        if find_spec("worker") is None:
            return failed(NO_WORKER)
        tokens = _tokens(options.file, options.model, options.max_seq_length)
        if tokens is None:
            return 1
    if options.json:
        print(json.dumps(_document(report, tokens), ensure_ascii=False, indent=2))
    else:
        _print(options.file, report, tokens)
    return 0 if report.is_valid and (tokens is None or tokens.examples) else 1


def _length(text: str) -> int:
    if not text.isdecimal() or int(text) < LEAST_LENGTH:
        raise argparse.ArgumentTypeError(f"must be a number from {LEAST_LENGTH}")
    return int(text)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _tokens(path: Path, model: str, asked_length: int | None) -> Tokens | None:
    """None once it has been said why not."""
    from app.core import spec
    from app.core.errors import NotFound
    from app.core.render import Renderer
    from cli.doctor import configuration

    settings = configuration.read_or_say()
    if settings is None:
        return None
    known, finding = configuration.read_catalog(settings)
    if not configuration.is_fit(finding) or known is None:
        return None
    from worker.model import card
    from worker.model.refused import BaseRefused

    try:
        base = known.resolve(model)
        renderer = Renderer.open(card.prepared(base, settings.cache_dir))
        requested = spec.Requested(training=spec.TrainingOptions(max_seq_length=asked_length or spec.AUTO))
        return _counted(path, base, renderer, spec.max_seq_length(requested, base))
    except (NotFound, BaseRefused, OSError, ValueError) as error:
        failed(error)
        return None


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


def _document(report: "Report", tokens: Tokens | None) -> dict[str, object]:
    document: dict[str, object] = report.model_dump(mode="json")
    if tokens:
        document["model"] = asdict(tokens) | {"left_out": [problem.model_dump(mode="json") for problem in tokens.left_out]}
    return document


def _print(path: Path, report: "Report", tokens: Tokens | None) -> None:
    verdict = "valid" if report.is_valid else "INVALID"
    counts = f"{report.rows} rows, {report.problem_count} problems, {report.warning_count} warnings"
    print(f"{path}: {verdict}; format {report.format or 'unknown'}, {counts}")
    _print_table("problems", report.problems, report.problem_count)
    _print_table("warnings", report.warnings, report.warning_count)
    if tokens:
        limit = f"rows of at most {tokens.max_seq_length} tokens"
        print(f"\n{tokens.base}, {limit}: {tokens.examples} examples of {tokens.tokens} tokens,")
        print(
            f"{tokens.trained_tokens} of them trained on, {tokens.longest} in the longest; {tokens.left_out_count} rows left out"
        )
        _print_table("left out", tokens.left_out, tokens.left_out_count)


def _print_table(title: str, listed: "tuple[Problem, ...]", count: int) -> None:
    if not listed:
        return
    print(f"\n{title}" + (f" (the first {len(listed)} of {count})" if count > len(listed) else ""))
    rows = [("LINE", "CODE", "PATH", "WHAT; CURE")]
    for problem in listed:
        where = f"{problem.line}:{problem.column}" if problem.column else str(problem.line)
        rows.append((where, problem.code, problem.path, f"{problem.message}; {problem.advice}"))
    for line in columns(rows):
        print(line)
