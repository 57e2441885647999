"""Tokenise a job's files for its base, size the run, and queue it."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import structlog

from app.core import data, spec
from app.core.errors import BadRequest, Unavailable
from app.core.render import Renderer
from app.jobs import admission, preparing
from app.jobs.admission import Data
from app.jobs.preparing import Dataset, Datasets, ToPrepare
from worker import patience
from worker.model import card
from worker.model.source import BaseRefused
from worker.services import Services
from worker.training import tokenise
from worker.training.split import NothingLeft, split
from worker.training.tokenise import TokenisedSet

log = structlog.get_logger()


class Unusable(Exception):
    """Nothing in the file can be trained on with this base and these settings."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class _Tokeniser:
    """Turns the files of one job into stored token arrays."""

    to: Services
    job: ToPrepare
    renderer: Renderer
    max_seq_length: int

    def training_and_validation(self) -> tuple[TokenisedSet, TokenisedSet | None]:
        """From two files, or from one that is split. Raises Unusable."""
        training = self.read(self.job.training_key, param="training_file")
        part = self.job.requested.training.validation_split
        if part is None:
            key = self.job.validation_key
            return training, self.read(key, param="validation_file") if key else None
        try:
            return split(training, part, seed=self.job.seed)
        except NothingLeft as error:
            raise Unusable("training.validation_split", f"{error}; lower training.validation_split") from None

    def read(self, key: str, *, param: str) -> TokenisedSet:
        """Raises Unusable when no row is left."""
        lines = data.split_lines(self.to.storage.stream(key))
        long_rows = self.job.requested.training.long_rows
        tokenised = tokenise.tokenise(data.read(lines), self.renderer, max_seq_length=self.max_seq_length, long_rows=long_rows)
        if tokenised.examples == 0:
            first = tokenised.dropped[0]
            raise Unusable(param, f"no row can be trained on; line {first.line}: {first.message}")
        return tokenised

    def store(self, tokenised: TokenisedSet) -> Dataset:
        key = f"orgs/{self.job.organization_id}/datasets/{tokenised.sha256}.safetensors"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokens.safetensors"
            tokenised.write(path)
            return Dataset(key=key, sha256=self.to.storage.put_file(key, path).sha256)


def prepare_next(to: Services) -> bool:
    """Prepare one job; False when none waits."""
    with to.sessions.begin() as session:
        job = preparing.claim(session)
    if job is None:
        return False
    try:
        _prepare(to, job)
    except Unusable as error:
        message, param = str(error), error.param
        patience.say(
            to.sessions, lambda session: preparing.reject(session, job.id, code="invalid_file", message=message, param=param)
        )
    except BadRequest as error:
        refused = {"code": error.code or "invalid_value", "message": str(error), "param": error.param or "model"}
        patience.say(to.sessions, lambda session: preparing.reject(session, job.id, **refused))
    except Unavailable:
        log.warning("preparation_postponed", job_id=job.id)
        patience.say(to.sessions, lambda session: preparing.postpone(session, job.id))
        return False
    except Exception as error:  # a base that cannot be had, a full disk: another try may do, but not for ever
        log.exception("preparation_failed", job_id=job.id)
        reason = str(error) if isinstance(error, BaseRefused) else type(error).__name__
        leases = to.settings.leases
        patience.say(to.sessions, lambda session: preparing.failed(session, job.id, reason=reason, settings=leases))
    return True


def _prepare(to: Services, job: ToPrepare) -> None:
    base = to.catalog[job.base]
    renderer = Renderer.open(card.prepared(base, to.settings.cache_dir))
    tokeniser = _Tokeniser(to, job, renderer, spec.max_seq_length(job.requested, base))
    training, validation = tokeniser.training_and_validation()
    known = Data(
        examples=training.examples,
        dropped=training.dropped_count,
        truncated=training.truncated_count,
        validation=validation.examples if validation else 0,
        tokens=training.tokens,
        trained_tokens=training.labelled_tokens,
        longest=max(training.longest, validation.longest if validation else 0),
    )
    settings = to.settings
    admitted = admission.admit(
        base, job.requested, known, seed=job.seed, among=settings.training.tiers, gpu=settings.gpu, catalog=to.catalog
    )
    datasets = Datasets(training=tokeniser.store(training), validation=tokeniser.store(validation) if validation else None)
    patience.say(
        to.sessions,
        lambda session: preparing.finish(
            session, job.id, admitted=admitted, datasets=datasets, dropped=training.dropped, truncated=training.truncated
        ),
    )
    log.info("job_prepared", job_id=job.id, queue=admitted.queue, examples=training.examples, tokens=training.tokens)
