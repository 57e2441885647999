"""The tokeniser process: `python -m worker.tokeniser`, started by `worker.limited`. Reads an `Order`, answers an `Answer`.

Strangers' files are rendered, tokenised and compared here. It has no database, no bucket and no secret: files come and go
through a folder that is its starter's.
"""

import sys
from contextlib import ExitStack
from pathlib import Path

from pydantic import BaseModel

from app.core import chat
from app.core.chat import RowError
from app.core.data_report import Comparison, FileReport
from app.core.fit import Limits
from app.core.render import Renderer
from app.core.spec import LongRows
from worker import limited
from worker.training import duplicates, tokenise
from worker.training.token_file import TokenReader


class SetOrder(BaseModel):
    """A tokenised set at `tokens`: to be made from the file `source`, or there already."""

    tokens: Path
    source: Path | None = None


class Order(BaseModel):
    """`card` is the folder of the base's tokenizer and template."""

    card: Path
    max_seq_length: int
    long_rows: LongRows
    training: SetOrder
    validation: SetOrder | None = None


class Refusal(BaseModel):
    """What keeps a file from being trained on."""

    param: str
    message: str


class Answer(BaseModel):
    """Reports on the sets that were made, and how alike the rows of all are; or why it cannot be done."""

    training: FileReport | None = None
    validation: FileReport | None = None
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
    answer = Answer()
    renderer = Renderer.open(order.card)
    for param, asked in (("training_file", order.training), ("validation_file", order.validation)):
        if asked is None or asked.source is None:
            continue
        try:
            report = _tokenise(asked.source, asked.tokens, renderer, Limits(order.max_seq_length, order.long_rows))
        except RowError as error:  # validated once, by a release that knew less
            return Answer(refused=Refusal(param=param, message=f"line {error.problem.line}: {error}"))
        if report.examples == 0:
            reasons = [f"; line {problem.line}: {problem.message}" for problem in report.problems[:1]]
            return Answer(refused=Refusal(param=param, message="".join(["no row can be trained on", *reasons])))
        answer = answer.model_copy(update={param.removesuffix("_file"): report})
    with ExitStack() as stack:
        readers = [stack.enter_context(TokenReader(of.tokens)) for of in (order.training, order.validation) if of]
        likeness = duplicates.compare(*readers, folder=order.training.tokens.parent)
        return answer.model_copy(update={"likeness": likeness})


def _tokenise(source: Path, tokens: Path, renderer: Renderer, limits: Limits) -> FileReport:
    with source.open("rb") as file:
        chunks = iter(lambda: file.read(tokenise.CHUNK_BYTES), b"")
        return tokenise.tokenise_to(tokens, chat.read(chat.split_lines(chunks)), renderer, limits)


if __name__ == "__main__":
    sys.exit(main())
