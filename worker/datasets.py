"""A job's token sets in storage: those that are known are used again, the others are made in a process with limits."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import structlog
from pydantic import BaseModel

from app.core import limited
from app.core.data_report import Comparison, DataReport, FileReport, SetReport, SplitReport
from app.core.errors import NotFound
from app.core.render import CARD
from app.core.tokens import keys
from app.core.tokens.tokeniser import Answer, Order, SetOrder, SplitOrder
from app.files import derived
from app.files.derived import Begun, Known
from app.jobs.preparing import Dataset, Datasets, SourceFile, ToPrepare
from worker import patience
from worker.services import Services

log = structlog.get_logger()

MEMORY_BYTES: Final = 1024 * 1024 * 1024  # bench/second_pass.py shows what is really taken
CPU_PER_WALL = 2  # seconds of the processor for each of the clock, after which another would take the job
_PREFIX, _LEFT_BEHIND_SECONDS = "tokens-", 24 * 3600


class Unusable(Exception):
    """Nothing in the file can be trained on with this base and these settings."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class Damaged(RuntimeError):
    """Storage does not hold what was put there."""


@dataclass(frozen=True)
class Made:
    """What the trainer reads, and the report on it. `reused` names the files that were not tokenised for it."""

    datasets: Datasets
    report: DataReport
    reused: tuple[str, ...]


@dataclass(frozen=True)
class _Set:
    """A token set: by name and key, and the file whose bytes it comes from."""

    name: str
    key: str
    file: SourceFile


def make(to: Services, job: ToPrepare, *, card: Path, max_seq_length: int) -> Made:
    """Raises Unusable, Damaged, Unavailable."""
    return _Making(to, job, card, max_seq_length).make()


class _Making:
    def __init__(self, to: Services, job: ToPrepare, card: Path, max_seq_length: int) -> None:
        self._to, self._job, self._card, self._max_seq_length = to, job, card, max_seq_length
        self._long_rows, self._part = job.requested.training.long_rows, job.requested.training.validation_split
        self._card_facts = (card / CARD).read_bytes()
        given = {"training_file": job.training_file, "validation_file": job.validation_file}
        self._files = [_Set(name, self._key(file), file) for name, file in given.items() if file is not None]
        self._halves = list[_Set]()
        if self._part is not None:
            whole, part = self._files[0].key, self._part
            halves = {name: keys.of_half(whole, name, part, job.seed) for name in ("kept", "held_back")}
            self._halves = [_Set(name, key, job.training_file) for name, key in halves.items()]
        self._trained_on = self._halves or self._files
        self._likeness_key = keys.of_likeness(*(one.key for one in self._trained_on))

    def _key(self, file: SourceFile) -> str:
        return keys.of_set(file.sha256, self._card_facts, max_seq_length=self._max_seq_length, long_rows=self._long_rows)

    def make(self) -> Made:
        known, tokenised = self._known(), list[_Set]()
        intact = self._intact(self._trained_on, known)
        facts = {self._likeness_key, *(one.key for one in self._files)}
        if len(intact) < len(self._trained_on) or not facts <= known.keys():
            whole = self._intact(self._files, known) if self._halves else intact
            tokenised = [one for one in self._files if one not in whole]
            with _folder(self._to.settings.work_dir) as folder:
                known |= self._work(folder, known, tokenised)
        sets = [known[one.key] for one in self._trained_on]
        stored = [Dataset(key=str(one.storage_key), sha256=str(one.sha256)) for one in sets]
        return Made(
            datasets=Datasets(training=stored[0], validation=stored[1] if stored[1:] else None),
            report=self._report(known),
            reused=tuple(one.name for one in self._files if one not in tokenised),
        )

    def _report(self, known: dict[str, Known]) -> DataReport:
        files = [FileReport.model_validate(known[one.key].facts) for one in self._files]
        halves = [SetReport.model_validate(known[one.key].facts) for one in self._halves]
        return DataReport(
            training=files[0],
            validation=files[1] if files[1:] else None,
            split=SplitReport(kept=halves[0], held_back=halves[1]) if halves else None,
            likeness=Comparison.model_validate(known[self._likeness_key].facts),
        )

    def _known(self) -> dict[str, Known]:
        keys = [*(one.key for one in (*self._files, *self._halves)), self._likeness_key]
        return patience.say(self._to.sessions, lambda session: derived.find(session, self._job.organization_id, keys))

    def _intact(self, sets: Sequence[_Set], known: dict[str, Known]) -> list[_Set]:
        """Those that storage still holds. They are read once more: a job must not wait in a queue for what cannot be read."""
        return [one for one in sets if one.key in known and self._is_intact(known[one.key])]

    def _is_intact(self, known: Known) -> bool:
        try:
            is_intact = self._to.storage.sha256_of(str(known.storage_key)) == known.sha256
        except NotFound:
            is_intact = False
        if not is_intact:
            log.warning("token_set_damaged", key=known.storage_key)
        return is_intact

    def _work(self, folder: Path, known: dict[str, Known], tokenised: list[_Set]) -> dict[str, Known]:
        """Tokenise what is missing, split it if that was asked for, compare, and keep all of it."""
        paths = {one.name: folder / f"{one.name}.safetensors" for one in (*self._files, *self._halves)}
        orders = [self._order(one, paths[one.name], None if one in tokenised else known[one.key]) for one in self._files]
        answer = self._ask(orders, paths)
        reports: dict[str, BaseModel | None] = {"training_file": answer.training, "validation_file": answer.validation}
        if answer.split:
            reports |= {"kept": answer.split.kept, "held_back": answer.split.held_back}
        made = {
            one.key: self._keep(one, paths[one.name], report, known.get(one.key))
            for one in (*self._files, *self._halves)
            if (report := reports[one.name]) is not None
        }
        assert answer.likeness is not None
        return made | {self._likeness_key: self._remember(answer.likeness)}

    def _order(self, wanted: _Set, tokens: Path, known: Known | None) -> SetOrder:
        """Bring here what the tokeniser reads. Raises Damaged."""
        if known is not None:
            self._fetch(str(known.storage_key), str(known.sha256), tokens)
            return SetOrder(tokens=tokens)
        source = tokens.with_suffix(".jsonl")
        self._fetch(wanted.file.storage_key, wanted.file.sha256, source)
        return SetOrder(tokens=tokens, source=source)

    def _fetch(self, key: str, sha256: str, path: Path) -> None:
        if self._to.storage.get_file(key, path).sha256 != sha256:
            raise Damaged(f"{path.stem} differs in storage from what was put there")

    def _ask(self, orders: list[SetOrder], paths: dict[str, Path]) -> Answer:
        """Raises Unusable."""
        order = Order(
            card=self._card,
            max_seq_length=self._max_seq_length,
            long_rows=self._long_rows,
            training=orders[0],
            validation=orders[1] if orders[1:] else None,
            split=SplitOrder(part=self._part, seed=self._job.seed, kept=paths["kept"], held_back=paths["held_back"])
            if self._part is not None
            else None,
        )
        try:
            said = limited.run(
                "app.core.tokens.tokeniser",
                order.model_dump_json(),
                memory_bytes=MEMORY_BYTES,
                cpu_seconds=int(CPU_PER_WALL * self._job.seconds),
                wall_seconds=self._job.seconds,
            )
        except limited.TookTooMuch as error:
            message = f"tokenising took {error}: split rows that are very long, or the file"
            raise Unusable("training_file", message) from None
        answer = Answer.model_validate_json(said)
        if answer.refused:
            raise Unusable(answer.refused.param, answer.refused.message)
        return answer

    def _keep(self, made: _Set, path: Path, report: BaseModel, before: Known | None) -> Known:
        """Send a set to storage, read it back, and enter it. One that is known goes where it lay: other jobs read it there."""
        organization_id, facts = self._job.organization_id, report.model_dump(mode="json")
        if before is not None:
            begun = Begun(before.id, organization_id, made.key, made.file.sha256, str(before.storage_key))
        else:
            begun = patience.say(
                self._to.sessions,
                lambda session: derived.begin(session, organization_id, key=made.key, file_sha256=made.file.sha256),
            )
        sha256 = self._to.storage.put_file(begun.storage_key, path).sha256
        if self._to.storage.sha256_of(begun.storage_key) != sha256:
            raise Damaged("storage did not keep the tokens as they were sent")
        entry = patience.say(self._to.sessions, lambda session: derived.finish(session, begun, sha256=sha256, facts=facts))
        if entry is None:
            raise Damaged("the file was deleted while its tokens were made")
        return entry

    def _remember(self, likeness: Comparison) -> Known:
        organization_id, facts = self._job.organization_id, likeness.model_dump(mode="json")
        key, sha256 = self._likeness_key, self._job.training_file.sha256
        patience.say(
            self._to.sessions,
            lambda session: derived.remember(session, organization_id, key=key, file_sha256=sha256, facts=facts),
        )
        return Known(id="", storage_key=None, sha256=None, facts=facts)


@contextmanager
def _folder(work_dir: Path) -> Iterator[Path]:
    """For one job's files. Those of a worker that was killed are removed by the next."""
    work_dir.mkdir(parents=True, exist_ok=True)
    for old in work_dir.glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):  # another worker has just ended with it
            if time.time() - old.stat().st_mtime > _LEFT_BEHIND_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    with TemporaryDirectory(dir=work_dir, prefix=_PREFIX) as folder:
        yield Path(folder)
