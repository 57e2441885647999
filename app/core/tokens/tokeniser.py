"""The tokeniser process: `app.core.limited` starts it, an `Order` goes in, an `Answer` comes out.

Strangers' files are rendered, tokenised and compared here. It has no database, no bucket and no secret: files come and go
through a folder that is its starter's.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from pydantic import BaseModel

from app.core import data, limited
from app.core.data import Report, RowError
from app.core.data_report import Comparison, FileReport, SplitReport
from app.core.preview import RowPreview, preview
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
    """`card` is the folder of the base's tokenizer and template. Files that nobody has examined yet are examined first."""

    card: Path
    max_seq_length: int
    long_rows: LongRows
    training: SetOrder
    validation: SetOrder | None = None
    split: SplitOrder | None = None
    examines: bool = False
    preview_rows: int = 0

    def files(self) -> dict[str, SetOrder]:
        """By the name of the API's parameter."""
        given = {"training_file": self.training, "validation_file": self.validation}
        return {param: asked for param, asked in given.items() if asked is not None}


class Refusal(BaseModel):
    """What keeps a file from being trained on."""

    param: str
    message: str


class Answer(BaseModel):
    """Reports on the sets that were made, and how alike the rows of all are; or why it cannot be done.

    `examined` is by parameter. Where it holds a file that cannot be trained on, there is nothing else.
    """

    examined: dict[str, Report] = {}
    preview: tuple[RowPreview, ...] = ()
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
    answer = Answer()
    sources = {param: asked.source for param, asked in order.files().items() if asked.source is not None}
    if order.examines:
        answer.examined = {param: data.examine(_lines(source)) for param, source in sources.items()}
        if not all(report.is_valid and report.format in data.TRAINED for report in answer.examined.values()):
            return answer
    renderer = Renderer.open(order.card)
    made = dict[str, FileReport]()
    for param, source in sources.items():
        try:
            if param == "training_file" and order.preview_rows:
                answer.preview = _preview(source, renderer, order)
            report = made[param] = _tokenise(source, order.files()[param].tokens, renderer, order)
        except RowError as error:  # validated once, by a release that knew less
            answer.refused = Refusal(param=param, message=str(error))
            return answer
        if report.examples == 0:
            reasons = [f"; line {problem.line}: {problem.message}" for problem in report.problems[:1]]
            answer.refused = Refusal(param=param, message="".join(["no row can be trained on", *reasons]))
            return answer
    answer.training, answer.validation = made.get("training_file"), made.get("validation_file")
    paths = [asked.tokens for asked in order.files().values()]
    if order.split is not None:
        try:
            answer.split = _split(order.training.tokens, order.split)
        except NothingLeft as error:
            message = f"{error}; lower training.validation_split"
            answer.refused = Refusal(param="training.validation_split", message=message)
            return answer
        paths = [order.split.kept, order.split.held_back]
    with ExitStack() as stack:
        readers = [stack.enter_context(TokenReader(path)) for path in paths]
        answer.likeness = duplicates.compare(*readers, folder=order.training.tokens.parent)
    return answer


def _lines(source: Path) -> Iterator[bytes]:
    with source.open("rb") as file:
        yield from data.split_lines(iter(lambda: file.read(tokenise.CHUNK_BYTES), b""))


def _tokenise(source: Path, tokens: Path, renderer: Renderer, order: Order) -> FileReport:
    chats = data.read(_lines(source))
    return tokenise.tokenise_to(tokens, chats, renderer, max_seq_length=order.max_seq_length, long_rows=order.long_rows)


def _preview(source: Path, renderer: Renderer, order: Order) -> tuple[RowPreview, ...]:
    limits = {"max_seq_length": order.max_seq_length, "rows": order.preview_rows}
    return tuple(preview(data.read(_lines(source)), renderer, long_rows=order.long_rows, **limits))


def _split(tokens: Path, asked: SplitOrder) -> SplitReport:
    with TokenReader(tokens) as examples:
        return split(examples, asked.part, seed=asked.seed, kept=asked.kept, held_back=asked.held_back)


if __name__ == "__main__":
    sys.exit(main())
