"""A job's token sets in storage: those that are known are used again, the others are made in a process with limits."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import structlog

from app.core.data_report import Comparison, DataReport, FileReport
from app.core.errors import NotFound
from app.core.fit import Limits
from app.core.render import CARD
from app.files import derived
from app.files.derived import Known
from app.jobs.preparing import Dataset, Datasets, SourceFile, ToPrepare
from worker import limited, patience
from worker.services import Services
from worker.tokeniser import Answer, Order, SetOrder
from worker.training import duplicates, token_file

log = structlog.get_logger()

MEMORY_BYTES: Final = 1536 * 1024 * 1024  # bench/data_tokens.py shows what is really taken
CPU_PER_WALL = 2  # seconds of the processor for each of the clock, after which another would take the job
_PREFIX, _LEFT_BEHIND_SECONDS = "tokens-", 24 * 3600
MASK = "assistant turns of weight 1, each with its end-of-turn token"  # another policy, another word


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
class _Wanted:
    """The token set of one file of the job."""

    param: str
    file: SourceFile
    key: str


def make(to: Services, job: ToPrepare, *, card: Path, limits: Limits) -> Made:
    """Raises Unusable, Damaged, Unavailable."""
    return _Making(to, job, card, limits).make()


def keys_of(card: Path, limits: Limits, *shas: str) -> list[str]:
    """What a token set is known by, for each file: its bytes, and all that decides what tokens they become."""
    facts = (card / CARD).read_bytes()  # names tokenizer, template and stop tokens
    recipe = [version("tunesmith"), token_file.FORMAT, hashlib.sha256(facts).hexdigest(), MASK, limits.max_seq_length]
    return [_digest(sha256, *recipe, limits.long_rows) for sha256 in shas]


class _Making:
    def __init__(self, to: Services, job: ToPrepare, card: Path, limits: Limits) -> None:
        self._to, self._job, self._card, self._limits = to, job, card, limits
        files = [("training_file", job.training_file), ("validation_file", job.validation_file)]
        given = [(param, file) for param, file in files if file is not None]
        keys = keys_of(card, limits, *(file.sha256 for _, file in given))
        self._wanted = [_Wanted(param, file, key) for (param, file), key in zip(given, keys, strict=True)]
        self._likeness_key = _digest("likeness", duplicates.FORMAT, *keys)

    def make(self) -> Made:
        known = self._known()
        missing = [wanted for wanted in self._wanted if wanted.key not in known or not self._is_intact(known[wanted.key])]
        if missing or self._likeness_key not in known:
            with _folder(self._to.settings.work_dir) as folder:
                known |= self._work(folder, known, missing)
        sets = [known[wanted.key] for wanted in self._wanted]
        datasets = [Dataset(key=str(one.storage_key), sha256=str(one.sha256)) for one in sets]
        files = [FileReport.model_validate(one.facts) for one in sets]
        likeness = Comparison.model_validate(known[self._likeness_key].facts)
        return Made(
            datasets=Datasets(training=datasets[0], validation=datasets[1] if datasets[1:] else None),
            report=DataReport(training=files[0], validation=files[1] if files[1:] else None, likeness=likeness),
            reused=tuple(wanted.param for wanted in self._wanted if wanted not in missing),
        )

    def _known(self) -> dict[str, Known]:
        keys = [*(wanted.key for wanted in self._wanted), self._likeness_key]
        return patience.say(self._to.sessions, lambda session: derived.find(session, self._job.organization_id, keys))

    def _is_intact(self, known: Known) -> bool:
        """What lies in storage is read once more: a job must not wait in a queue for a set that cannot be trained on."""
        assert known.storage_key is not None
        try:
            is_intact = self._to.storage.sha256_of(known.storage_key) == known.sha256
        except NotFound:
            is_intact = False
        if not is_intact:
            log.warning("token_set_damaged", key=known.storage_key)
        return is_intact

    def _work(self, folder: Path, known: dict[str, Known], missing: list[_Wanted]) -> dict[str, Known]:
        """Tokenise what is missing, compare all of it, and keep both."""
        orders = [self._order(wanted, folder, None if wanted in missing else known[wanted.key]) for wanted in self._wanted]
        answer = self._ask(orders)
        reports = {"training_file": answer.training, "validation_file": answer.validation}
        made = dict[str, Known]()
        for wanted, order in zip(self._wanted, orders, strict=True):
            if report := reports[wanted.param]:
                made[wanted.key] = self._keep(wanted, order.tokens, report, known.get(wanted.key))
        assert answer.likeness is not None
        facts = answer.likeness.model_dump(mode="json")
        made[self._likeness_key] = Known(id="", storage_key=None, sha256=None, facts=facts)
        organization_id, key, sha256 = self._job.organization_id, self._likeness_key, self._job.training_file.sha256
        patience.say(
            self._to.sessions,
            lambda session: derived.remember(session, organization_id, key=key, file_sha256=sha256, facts=facts),
        )
        return made

    def _order(self, wanted: _Wanted, folder: Path, known: Known | None) -> SetOrder:
        """Bring here what the tokeniser reads. Raises Damaged."""
        tokens = folder / f"{wanted.param}.safetensors"
        if known is None:
            source = folder / f"{wanted.param}.jsonl"
            self._fetch(wanted.file.storage_key, wanted.file.sha256, source)
            return SetOrder(tokens=tokens, source=source)
        self._fetch(str(known.storage_key), str(known.sha256), tokens)
        return SetOrder(tokens=tokens)

    def _fetch(self, key: str, sha256: str, path: Path) -> None:
        if self._to.storage.get_file(key, path).sha256 != sha256:
            raise Damaged(f"{path.stem} differs in storage from what was put there")

    def _ask(self, orders: list[SetOrder]) -> Answer:
        """Raises Unusable."""
        order = Order(
            card=self._card,
            max_seq_length=self._limits.max_seq_length,
            long_rows=self._limits.long_rows,
            training=orders[0],
            validation=orders[1] if orders[1:] else None,
        )
        try:
            said = limited.run(
                "worker.tokeniser",
                order.model_dump_json(),
                memory_bytes=MEMORY_BYTES,
                cpu_seconds=int(CPU_PER_WALL * self._job.seconds),
                wall_seconds=self._job.seconds,
            )
        except limited.TookTooMuch as error:
            message = f"tokenising took {error}: split rows that are very long, or the file"
            raise Unusable(self._wanted[0].param, message) from None
        answer = Answer.model_validate_json(said)
        if answer.refused:
            raise Unusable(answer.refused.param, answer.refused.message)
        return answer

    def _keep(self, wanted: _Wanted, path: Path, report: FileReport, damaged: Known | None) -> Known:
        """Send a set to storage, read it back, and enter it. A damaged one is replaced where it lies: other jobs read it too."""
        organization_id, facts = self._job.organization_id, report.model_dump(mode="json")
        if damaged is not None:
            entry_id, storage_key = damaged.id, str(damaged.storage_key)
        else:
            entry_id, storage_key = patience.say(
                self._to.sessions,
                lambda session: derived.begin(session, organization_id, key=wanted.key, file_sha256=wanted.file.sha256),
            )
        sha256 = self._to.storage.put_file(storage_key, path).sha256
        if self._to.storage.sha256_of(storage_key) != sha256:
            raise Damaged("storage did not keep the tokens as they were sent")
        entry = patience.say(self._to.sessions, lambda session: derived.finish(session, entry_id, sha256=sha256, facts=facts))
        if entry is None:
            raise Damaged("the tokens were removed from storage while they were made")
        return entry


@contextmanager
def _folder(work_dir: Path) -> Iterator[Path]:
    """For one job's files. Those of a worker that was killed are removed by the next."""
    work_dir.mkdir(parents=True, exist_ok=True)
    for old in work_dir.glob(f"{_PREFIX}*"):
        if time.time() - old.stat().st_mtime > _LEFT_BEHIND_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    with TemporaryDirectory(dir=work_dir, prefix=_PREFIX) as folder:
        yield Path(folder)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
