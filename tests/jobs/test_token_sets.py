"""A file is tokenised once for a base and its settings; what is known of it is used again, and only where it is the same."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, orm, select

from app import db, outbox
from app.accounts.caller import Caller
from app.core import catalog
from app.core.settings import Settings
from app.core.storage import Storage
from app.core.tokens import keys
from app.core.tokens.tokenise import TokenisedSet
from app.files import derived
from app.files import service as files
from app.jobs import service as jobs
from app.jobs.schemas import JobOut
from app.models import Derived, Job, JobEvent, JobState, OutboxMessage
from tests import make
from tests.conftest import make_organization
from worker import datasets
from worker.services import Services
from worker.tasks import prepare

FILE = make.chat_file(40)


@dataclass
class Shop:
    """One organization's jobs, prepared as the cpu queue does."""

    to: Services
    caller: Caller

    def job(self, training: bytes = FILE, validation: bytes | None = None, /, **asked: object) -> str:
        with self.to.sessions.begin() as session:
            contents = {"training_file": training, **({"validation_file": validation} if validation else {})}
            made = {
                param: make.stored_file(session, self.caller, self.to.storage, content) for param, content in contents.items()
            }
            if validation:
                asked["validation_file"] = made["validation_file"].id
            return make.job(session, self.caller, training_file=made["training_file"], **asked).id

    def prepared(self, *args: Any, **asked: Any) -> Job:
        return self.prepare(self.job(*args, **asked))

    def prepare(self, job_id: str) -> Job:
        assert prepare.prepare_next(self.to)
        return self.read(job_id)

    def read(self, job_id: str) -> Job:
        with self.to.sessions() as session:
            job = session.get_one(Job, job_id)
            session.expunge_all()
        return job

    def events(self, job: Job) -> list[JobEvent]:
        with self.to.sessions() as session:
            events = session.scalars(select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.sequence)).all()
            session.expunge_all()
        return list(events)

    def reused(self, job: Job) -> list[str]:
        return [name for event in self.events(job) for name in (event.data or {}).get("reused", [])]

    def objects(self) -> set[str]:
        return set(self.to.storage.list_keys(f"orgs/{self.caller.organization_id}/datasets/"))

    def age(self, days: float) -> None:
        """Time passes by ageing the rows, since the clock is the database's."""
        with self.to.sessions.begin() as session:
            for entry in session.scalars(select(Derived).where(Derived.organization_id == self.caller.organization_id)):
                entry.last_used_at -= timedelta(days=days)
                entry.created_at -= timedelta(days=days)

    def sweep(self) -> set[str]:
        """What is left in storage when the relay has been round."""
        with self.to.sessions.begin() as session:
            derived.sweep(session)
        return self.purged()

    def purged(self) -> set[str]:
        with self.to.sessions.begin() as session:
            for message in session.scalars(select(OutboxMessage).where(OutboxMessage.topic == outbox.Topic.PURGE)):
                if message.payload["prefix"].startswith(f"orgs/{self.caller.organization_id}/"):  # others may leave theirs
                    self.to.storage.delete(message.payload["prefix"])
                    session.delete(message)
        return self.objects()


@pytest.fixture
def shop(
    settings: Settings, system_sessions: orm.sessionmaker[orm.Session], storage: Storage, organization: Caller
) -> Iterator[Shop]:
    with system_sessions.begin() as session:  # what other tests left to prepare is not ours
        session.query(Job).filter(Job.state == JobState.VALIDATING_FILES).update({"state": JobState.CANCELLED})
    yield Shop(Services(settings, system_sessions, storage, catalog.load()), organization)


def test_a_second_job_on_the_same_bytes_starts_without_tokenising(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shop.prepared()
    stored = shop.objects()
    monkeypatch.setattr(datasets.limited, "run", lambda *_, **__: pytest.fail("it was tokenised again"))
    second = shop.prepared()

    assert (first.state, second.state) == (JobState.QUEUED, JobState.QUEUED)
    assert (second.datasets, second.plan, second.data_report) == (first.datasets, first.plan, first.data_report)
    assert len(stored) == 1 and shop.objects() == stored
    assert (shop.reused(first), shop.reused(second)) == ([], ["training_file"])


def test_what_is_stored_is_what_the_trainer_reads(shop: Shop, tmp_path: Path) -> None:
    job = shop.prepared()
    assert job.datasets is not None and job.plan is not None
    stored = shop.to.storage.get_file(job.datasets["training"]["key"], tmp_path / "set")
    read = TokenisedSet.read(tmp_path / "set")

    assert stored.sha256 == job.datasets["training"]["sha256"]
    assert (read.examples, read.tokens) == (job.plan["examples"], job.plan["tokens_per_epoch"]) == (40, read.tokens)
    assert read.labelled_tokens == job.plan["trained_tokens_per_epoch"]


@pytest.mark.parametrize(
    ("content", "training"),
    [(FILE + b"\n", {}), (FILE, {"max_seq_length": 100}), (FILE, {"long_rows": "truncate"})],
)
def test_whatever_decides_the_tokens_makes_another_set(shop: Shop, content: bytes, training: dict[str, Any]) -> None:
    shop.prepared()
    other = shop.prepared(content, training=training)

    assert shop.reused(other) == []
    assert len(shop.objects()) == 2


def test_another_template_tokenizer_or_release_makes_another_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(card_facts: bytes) -> str:
        return keys.of_set("0" * 64, card_facts, max_seq_length=100, long_rows="drop")

    one, two = key(b'{"template": "a"}'), key(b'{"template": "b"}')
    monkeypatch.setattr(keys, "version", lambda _: "another")

    assert len({one, two, key(b'{"template": "a"}')}) == 3


def test_only_the_file_that_is_new_is_tokenised(shop: Shop) -> None:
    shop.prepared()
    both = shop.prepared(FILE, make.chat_file(5))
    again = shop.prepared(FILE, make.chat_file(5))

    assert shop.reused(both) == ["training_file"]
    assert shop.reused(again) == ["training_file", "validation_file"]
    assert again.data_report == both.data_report
    assert len(shop.objects()) == 2


def test_a_split_is_made_once_too_and_by_the_seed(shop: Shop) -> None:
    asked = {"training": {"validation_split": 0.25}}
    one, again, other = (shop.prepared(**asked, seed=seed) for seed in (1, 1, 2))
    report = one.data_report
    assert report is not None and one.plan is not None

    assert again.datasets == one.datasets != other.datasets
    assert [shop.reused(job) for job in (one, again, other)] == [[], ["training_file"], ["training_file"]]
    assert (report["split"]["kept"]["examples"], report["split"]["held_back"]["examples"]) == (30, 10)
    assert (one.plan["examples"], one.plan["validation_examples"]) == (30, 10)
    assert len(shop.objects()) == 5  # the whole and two halves for each seed


def test_a_damaged_half_is_split_again(shop: Shop) -> None:
    asked = {"training": {"validation_split": 0.25}, "seed": 1}
    first = shop.prepared(**asked)
    assert first.datasets is not None
    shop.to.storage.put(first.datasets["validation"]["key"], b"damaged")
    second = shop.prepared(**asked)

    assert second.datasets == first.datasets
    assert shop.reused(second) == ["training_file"]
    assert shop.to.storage.sha256_of(first.datasets["validation"]["key"]) == first.datasets["validation"]["sha256"]


def test_an_organization_never_meets_what_another_ones_file_became(shop: Shop) -> None:
    mine = shop.prepared()
    stranger = replace(shop, caller=make_organization(shop.to.sessions))
    theirs = stranger.prepared()

    assert stranger.reused(theirs) == []
    assert mine.datasets is not None and theirs.datasets is not None
    assert mine.datasets["training"]["key"] not in stranger.objects()
    assert theirs.datasets["training"]["key"] in stranger.objects()


def test_two_who_make_the_same_at_once_end_with_one(shop: Shop) -> None:
    job_ids = [shop.job() for _ in range(2)]
    threads = [threading.Thread(target=prepare.prepare_next, args=(shop.to,)) for _ in job_ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, two = (shop.read(job_id) for job_id in job_ids)

    assert (one.state, two.state) == (JobState.QUEUED, JobState.QUEUED)
    assert one.datasets == two.datasets is not None
    assert shop.purged() == {one.datasets["training"]["key"]}


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_set_is_made_anew_where_it_lies(shop: Shop, damage: str) -> None:
    """Where it lies: the first job waits in a queue and will read it there."""
    first = shop.prepared()
    assert first.datasets is not None
    key = first.datasets["training"]["key"]
    if damage == "gone":
        shop.to.storage.delete(key)
    else:
        shop.to.storage.put(key, b"damaged")
    second = shop.prepared()

    assert shop.reused(second) == []
    assert second.datasets == first.datasets
    assert shop.to.storage.sha256_of(key) == first.datasets["training"]["sha256"]


def test_a_file_that_storage_did_not_keep_is_not_tokenised(shop: Shop) -> None:
    job_id = shop.job()
    with shop.to.sessions.begin() as session:
        file = session.get_one(files.File, session.get_one(Job, job_id).training_file_id)
        shop.to.storage.put(file.storage_key, FILE + b"\n")
    job = shop.prepare(job_id)

    assert (job.state, job.failures) == (JobState.VALIDATING_FILES, 1)
    assert shop.objects() == set()


def test_what_nobody_asks_for_in_a_month_is_swept(shop: Shop) -> None:
    job = shop.prepared()
    shop.age(29)
    shop.prepared()  # asked for again
    shop.age(29)
    with shop.to.sessions.begin() as session:
        session.query(Job).filter(Job.organization_id == job.organization_id).update({"state": JobState.CANCELLED})

    assert len(shop.sweep()) == 1
    shop.age(2)
    assert shop.sweep() == set()
    assert shop.reused(shop.prepared()) == []


def test_what_an_unfinished_job_trains_on_is_never_swept(shop: Shop) -> None:
    job = shop.prepared(FILE, make.chat_file(5))
    shop.age(400)

    assert len(shop.sweep()) == 2
    with shop.to.sessions.begin() as session:
        jobs.cancel(session, shop.caller, job.id)
    assert shop.sweep() == set()


def test_what_a_maker_that_died_has_sent_is_swept(shop: Shop) -> None:
    with shop.to.sessions.begin() as session:
        key = derived.begin(session, shop.caller.organization_id, key="k", file_sha256="0" * 64).storage_key
    shop.to.storage.put(key, b"half of it")

    assert shop.sweep() == {key}  # it may still be at work
    assert derived_keys(shop) == []
    shop.age(2)
    assert shop.sweep() == set()


def derived_keys(shop: Shop) -> list[str]:
    with shop.to.sessions.begin() as session:
        return list(derived.find(session, shop.caller.organization_id, ["k"]))


def test_a_deleted_file_takes_what_came_of_it_along(
    shop: Shop, api_sessions: orm.sessionmaker[orm.Session], system_sessions: orm.sessionmaker[orm.Session]
) -> None:
    """Once none of the organization's files has these bytes; deleting is the API's, whose role may do little."""
    first, second = shop.prepared(), shop.prepared()
    with system_sessions.begin() as session:
        session.query(Job).filter(Job.organization_id == first.organization_id).update({"state": JobState.CANCELLED})
    for job, left in ((first, 1), (second, 0)):
        with db.organization_session(api_sessions, shop.caller.organization_id) as session:
            files.delete(session, shop.caller, job.training_file_id)
        assert len(shop.purged()) == left
        with system_sessions() as session:
            mine = Derived.organization_id == shop.caller.organization_id
            assert bool(session.scalar(select(func.count()).select_from(Derived).where(mine))) == bool(left)


@pytest.mark.parametrize("moment", ["tokenising", "sending"])
def test_a_file_deleted_while_its_tokens_are_made_leaves_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    job_id = shop.job()

    def delete() -> None:
        with shop.to.sessions.begin() as session:
            job = jobs.cancel(session, shop.caller, job_id)
            files.delete(session, shop.caller, job.training_file_id)
        shop.purged()  # the relay may be that quick

    where, name = (datasets.limited, "run") if moment == "tokenising" else (type(shop.to.storage), "put_file")
    monkeypatch.setattr(where, name, after(delete, getattr(where, name)))
    assert shop.prepare(job_id).state == JobState.CANCELLED
    monkeypatch.undo()

    assert shop.purged() == set()
    with shop.to.sessions() as session:
        mine = Derived.organization_id == shop.caller.organization_id
        assert session.scalar(select(func.count()).select_from(Derived).where(mine)) == 0


def after(first: Callable[[], None], work: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **named: Any) -> Any:
        first()
        return work(*args, **named)

    return both


def test_a_file_that_takes_too_much_costs_its_job_and_not_the_worker(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "MEMORY_BYTES", 160 << 20)
    refused = shop.prepared(make.chat_line("?", "a b" * 300_000).encode())
    monkeypatch.undo()

    assert refused.error is not None and refused.state == JobState.FAILED
    assert refused.error["code"] == "invalid_file" and "160 MiB of memory" in refused.error["message"]
    assert shop.prepared().state == JobState.QUEUED


def test_a_job_tells_what_its_data_is_like(shop: Shop) -> None:
    long, other = make.chat_line("?", "x" * 600), make.chat_line("What is the largest town of this country?", "A town.")
    near = make.chat_line("What is the largest town of that country?", "A town.")
    training = "\n".join([other, long, make.chat_line("a", "b"), other, near]).encode()
    job = shop.prepared(training, other.encode())
    warnings = [event.message for event in shop.events(job) if event.level == "warn"]
    report = job.data_report
    assert report is not None

    assert report["training"]["left_out"] == {"row_too_long": 1}
    assert report["training"]["speakers"]["user"]["messages"] == 4
    assert report["likeness"]["training"]["exact"]["listed"] == [{"line": 4, "of_line": 1, "similarity": 1.0}]
    assert [match["line"] for match in report["likeness"]["training"]["near"]["listed"]] == [5]
    assert report["likeness"]["leaked"]["exact"]["count"] == 1
    assert any(message.startswith("Line 2 is left out") for message in warnings)
    assert any(message.startswith("1 rows that are trained on are the same") and "line 4 as 1" in message for message in warnings)
    assert any(message.startswith("1 rows for validation are trained on too") for message in warnings)


def test_a_file_without_a_usable_row_ends_its_job_with_the_reason(shop: Shop) -> None:
    job = shop.prepared(make.chat_line("?", "x" * 600).encode())

    assert job.state == JobState.FAILED and job.error is not None
    assert job.error["code"] == "invalid_file" and job.error["param"] == "training_file"
    assert "no row can be trained on; line 1: the row has" in job.error["message"]


def test_a_page_of_jobs_leaves_out_the_rows_that_their_reports_list(shop: Shop) -> None:
    job = shop.prepared(FILE + b"\n" + FILE.splitlines()[0])
    whole, listed = (JobOut.of(job, is_listed=is_listed).data_report for is_listed in (False, True))

    assert whole is not None and listed is not None
    exact = whole["likeness"]["training"]["exact"]
    assert exact["count"] == 1 and exact["listed"][0]["line"] == 41
    assert listed["likeness"]["training"]["exact"] == {"count": 1, "listed": []}
    assert listed["training"]["examples"] == 41
