"""Files looked at while somebody waits: tokenised as for a job, in a process with limits, and thrown away.

Of a file that is longer than a sample only the beginning is looked at.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from pydantic import BaseModel

from app.core import cards, limited, spec
from app.core.errors import Conflict, NotFound, Unavailable
from app.core.preview import ROWS
from app.core.settings import MIB
from app.core.storage import Storage
from app.core.tokens.tokeniser import Answer, Order, Refusal, SetOrder, SplitOrder
from app.models import File

SAMPLE_BYTES: Final = 4 * MIB  # three thousand rows of a usual length
FEW_BYTES: Final = 64 * 1024  # for a preview alone
MEMORY_BYTES, CPU_SECONDS, WALL_SECONDS = 1024 * MIB, 60, 30.0


class Sample(BaseModel):
    """How much of a file was looked at, always from its beginning."""

    rows: int
    bytes: int
    of_bytes: int

    @property
    def scale(self) -> float:
        """By how much the file is longer."""
        return self.of_bytes / max(1, self.bytes)


@dataclass(frozen=True)
class Wanted:
    """Files by the name of the API's parameter, and how a job would tokenise them. `formats`: of the rows that its method reads.

    `examines`: they were not validated yet. `previews`: all else is known, and only the first rows are wanted.
    """

    files: Mapping[str, File]
    formats: tuple[str, ...]
    base: str
    card_facts: bytes
    max_seq_length: int
    options: spec.TrainingOptions
    seed: int
    examines: bool
    previews: bool


class Damaged(Conflict):
    """Storage does not hold the file that was uploaded."""

    code = "file_damaged"


@dataclass(frozen=True)
class Glance:
    """`sampled` has those files that were not looked at whole. `unfinished` says why there is no answer to speak of."""

    answer: Answer
    sampled: dict[str, Sample]
    unfinished: str | None = None


def look(storage: Storage, wanted: Wanted) -> Glance:
    """Raises Damaged; Unavailable: storage is away, its disk is full, or no tokenizer was published yet."""
    try:
        with TemporaryDirectory() as name:
            folder = Path(name)
            tokenizer = cards.read_tokenizer(storage, wanted.base, wanted.card_facts)
            cards.write(wanted.card_facts, tokenizer, folder)
            most = FEW_BYTES if wanted.previews else SAMPLE_BYTES
            samples = {param: _fetch(storage, file, _source(folder, param), most, param) for param, file in wanted.files.items()}
            answer, unfinished = _ask(_order(wanted, folder, samples["training_file"]))
    except OSError as error:
        message = "the API has no room for a dry run's files; tell the operator, and try again later"
        raise Unavailable(message, code="insufficient_storage") from error
    rows = {"training_file": answer.training, "validation_file": answer.validation}
    sampled = {
        param: sample.model_copy(update={"rows": report.rows if (report := rows[param]) else 0})
        for param, sample in samples.items()
        if sample.bytes < sample.of_bytes
    }
    return Glance(answer, sampled, unfinished)


def _source(folder: Path, param: str) -> Path:
    return folder / f"{param}.jsonl"


def _fetch(storage: Storage, file: File, path: Path, most_bytes: int, param: str) -> Sample:
    """All of a file, or as many whole lines of its beginning as make a sample."""
    try:
        text = storage.get_beginning(file.storage_key, min(most_bytes, file.size_bytes)) if file.size_bytes else b""
    except NotFound:
        raise Damaged(f"{file.id} is gone from storage; upload it again", param=param) from None
    if len(text) < file.size_bytes:
        text = text[: text.rfind(b"\n") + 1] or text  # of a line without an end enough is there to say so
    elif hashlib.sha256(text).hexdigest() != file.sha256:
        raise Damaged(f"{file.id} differs in storage from what was uploaded; upload it again", param=param)
    path.write_bytes(text)
    return Sample(rows=0, bytes=len(text), of_bytes=file.size_bytes)


def _order(wanted: Wanted, folder: Path, training: Sample) -> Order:
    sets = {param: SetOrder(tokens=folder / f"{param}.safetensors", source=_source(folder, param)) for param in wanted.files}
    part = wanted.options.validation_split
    if isinstance(part, int):  # rows of the whole file
        part = max(1, round(part / training.scale))
    halves = {name: folder / f"{name}.safetensors" for name in ("kept", "held_back")}
    return Order(
        card=folder,
        max_seq_length=wanted.max_seq_length,
        long_rows=wanted.options.long_rows,
        training=sets["training_file"],
        validation=sets.get("validation_file"),
        split=None if part is None else SplitOrder(part=part, seed=wanted.seed, **halves),
        examines=wanted.examines,
        formats=wanted.formats,
        preview_rows=ROWS,
    )


def _ask(order: Order) -> tuple[Answer, str | None]:
    """The answer, and why it holds nothing. Raises Unavailable."""
    try:
        said = limited.run(
            "app.core.tokens.tokeniser",
            order.model_dump_json(),
            memory_bytes=MEMORY_BYTES,
            cpu_seconds=CPU_SECONDS,
            wall_seconds=WALL_SECONDS,
        )
    except limited.TookTooMuch as error:
        message = f"looking at the file took {error}: split rows that are very long"
        return Answer(refused=Refusal(param="training_file", message=message)), None
    except limited.TimedOut:
        return Answer(), f"the files could not be looked at within {WALL_SECONDS:.0f} seconds; a job has more time"
    except limited.Died as died:
        raise Unavailable("the dry run was not finished; try again shortly", code="dry_run_unfinished") from died
    return Answer.model_validate_json(said), None
