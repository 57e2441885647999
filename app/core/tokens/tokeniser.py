"""The tokeniser process: `app.core.limited` starts it, an `Order` goes in, an `Answer` comes out.

Strangers' files are rendered, tokenised and compared here. It has no database, no bucket and no secret: files come and go
through a folder that is its starter's.
"""

import sys
from contextlib import ExitStack
from pathlib import Path

from pydantic import BaseModel

from app.core import data, limited
from app.core.data import RowError
from app.core.data_report import Comparison, FileReport, SplitReport
from app.core.render import Renderer
from app.core.spec import LongRows
from app.core.tokens import duplicates, tokenise
from app.core.tokens.split import NothingLeft, split
from app.core.tokens.token_file import TokenReader


class SetOrder(BaseModel):
    """A tokenised set at `tokens`: to be made from the file `source`, or there already."""

    tokens: Path
    source: Path | None = None


class SplitOrder(BaseModel):
    """The training set is to be split: into what is trained on and what is held back for validation."""

    part: float | int
    seed: int
    kept: Path
    held_back: Path


class Order(BaseModel):
    """`card` is the folder of the base's tokenizer and template."""

    card: Path
    max_seq_length: int
    long_rows: LongRows
    training: SetOrder
    validation: SetOrder | None = None
    split: SplitOrder | None = None


class Refusal(BaseModel):
    """What keeps a file from being trained on."""

    param: str
    message: str


class Answer(BaseModel):
    """Reports on the sets that were made, and how alike the rows of all are; or why it cannot be done."""

    training: FileReport | None = None
    validation: FileReport | None = None
    split: SplitReport | None = None
    likeness: Comparison | None = None
    refused: Refusal | None = None


def main() -> int:
    order = Order.model_validate_json(limited.accept())
    try:
        answer = _answer(order)
    except MemoryError:
        return limited.OUT_OF_MEMORY
    sys.stdout.write(answer.model_dump_json())
    return 0


def _answer(order: Order) -> Answer:
    made, renderer = dict[str, FileReport](), Renderer.open(order.card)
    for param, asked in (("training_file", order.training), ("validation_file", order.validation)):
        if asked is None or asked.source is None:
            continue
        try:
            report = made[param.removesuffix("_file")] = _tokenise(asked.source, asked.tokens, renderer, order)
        except RowError as error:  # validated once, by a release that knew less
            return Answer(refused=Refusal(param=param, message=str(error)))
        if report.examples == 0:
            reasons = [f"; line {problem.line}: {problem.message}" for problem in report.problems[:1]]
            return Answer(refused=Refusal(param=param, message="".join(["no row can be trained on", *reasons])))
    paths, split_report = [asked.tokens for asked in (order.training, order.validation) if asked], None
    if order.split is not None:
        try:
            split_report = _split(order.training.tokens, order.split)
        except NothingLeft as error:
            message = f"{error}; lower training.validation_split"
            return Answer(refused=Refusal(param="training.validation_split", message=message))
        paths = [order.split.kept, order.split.held_back]
    with ExitStack() as stack:
        readers = [stack.enter_context(TokenReader(path)) for path in paths]
        likeness = duplicates.compare(*readers, folder=order.training.tokens.parent)
    return Answer(training=made.get("training"), validation=made.get("validation"), split=split_report, likeness=likeness)


def _tokenise(source: Path, tokens: Path, renderer: Renderer, order: Order) -> FileReport:
    with source.open("rb") as file:
        lines = data.split_lines(iter(lambda: file.read(tokenise.CHUNK_BYTES), b""))
        return tokenise.tokenise_to(
            tokens, data.read(lines), renderer, max_seq_length=order.max_seq_length, long_rows=order.long_rows
        )


def _split(tokens: Path, asked: SplitOrder) -> SplitReport:
    with TokenReader(tokens) as examples:
        return split(examples, asked.part, seed=asked.seed, kept=asked.kept, held_back=asked.held_back)


if __name__ == "__main__":
    sys.exit(main())
