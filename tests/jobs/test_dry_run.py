"""What a dry run tells is what comes of the job, and nothing comes of the dry run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from sqlalchemy import func, orm, select

from app.accounts.caller import Caller
from app.core import catalog, ids
from app.core.catalog import Base, Catalog
from app.core.errors import Unavailable
from app.core.settings import GpuSettings, Settings, TrainingSettings
from app.core.storage import Storage
from app.files import glance
from app.files import service as files
from app.jobs.dry_run import DryRunner, DryRunOut
from app.jobs.schemas import JobCreate
from app.models import Derived, Job, JobState, OutboxMessage, Throughput
from tests import make
from worker.model import card
from worker.services import Services
from worker.tasks import prepare, publish

FILE = make.chat_file(40)


@dataclass(frozen=True)
class House:
    """An installation and one organization in it."""

    to: Services
    api_sessions: orm.sessionmaker[orm.Session]
    caller: Caller

    def file(self, content: bytes) -> str:
        """An upload that nobody has looked at yet."""
        with self.to.sessions.begin() as session:
            file_id = ids.new("file-")
            stored = self.to.storage.put(files.key_for(self.caller, file_id), content)
            files.add(session, self.caller, file_id=file_id, filename="a.jsonl", purpose="fine-tune", stored=stored)
            return file_id

    def dry_run(self, training_file: str, **asked: object) -> DryRunOut:
        request = JobCreate.model_validate({"model": make.TINY, "training_file": training_file, "dry_run": True, **asked})
        runner = DryRunner(self.api_sessions, self.to.storage, self.to.catalog, self.to.settings)
        return runner.run(self.caller, request)

    def job(self, content: bytes, validation: bytes | None = None, **asked: object) -> Job:
        """A job as it is when its files have been tokenised."""
        with self.to.sessions.begin() as session:
            if validation is not None:
                asked["validation_file"] = make.stored_file(session, self.caller, self.to.storage, validation).id
            file = make.stored_file(session, self.caller, self.to.storage, content)
            job_id = make.job(session, self.caller, training_file=file, **asked).id
        assert prepare.prepare_next(self.to)
        with self.to.sessions() as session:
            return session.get_one(Job, job_id)

    def rows(self) -> tuple[int, ...]:
        """How many of everything that a job makes."""
        with self.to.sessions() as session:
            counts = [session.scalar(select(func.count()).select_from(table)) for table in (Job, Derived, OutboxMessage)]
        return *(count or 0 for count in counts), len(list(self.to.storage.list_keys("orgs/")))


@pytest.fixture
def house(
    settings: Settings,
    system_sessions: orm.sessionmaker[orm.Session],
    api_sessions: orm.sessionmaker[orm.Session],
    storage: Storage,
    organization: Caller,
) -> House:
    with system_sessions.begin() as session:  # what other tests left to prepare is not ours
        session.query(Job).filter(Job.state == JobState.VALIDATING_FILES).update({"state": JobState.CANCELLED})
    to = Services(settings, system_sessions, storage, catalog.load())
    publish.publish(to, to.catalog[make.TINY])
    return House(to, api_sessions, organization)


def test_it_tells_what_the_job_will_be(house: House) -> None:
    asked = {"seed": 7, "hyperparameters": {"n_epochs": 3}, "training": {"max_seq_length": 200}}
    validation = make.chat_file(9)
    told = house.dry_run(house.file(FILE), validation_file=house.file(validation), **asked)
    job = house.job(FILE, validation, **asked)

    assert told.ok and told.problems == []
    assert job.plan is not None and {**(told.plan or {}), "auto": told.auto} == job.plan
    assert told.auto is not None and told.auto["learning_rate"]["value"] == told.training["learning_rate"]
    assert told.data_report is not None and told.data_report.model_dump(mode="json") == job.data_report
    assert told.hyperparameters == {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.0}
    assert told.training["max_seq_length"] == 200 and told.training["learning_rate"] == job.spec["optimizer"]["learning_rate"]
    assert told.files["training_file"].rows == 40 and told.files["validation_file"].rows == 9
    assert told.sampled == {}
    assert told.queue is not None and (told.queue.name, told.queue.position) == ("train.cpu", told.queue.position)


def test_nothing_is_queued_or_kept(house: House) -> None:
    file_id = house.file(FILE)
    before = house.rows()
    house.dry_run(file_id)

    assert house.rows() == before


def test_through_the_sdk_it_is_one_call(house: House, client: OpenAI, file_id: str) -> None:
    told = client.fine_tuning.jobs.create(model=make.TINY, training_file=file_id, extra_body={"dry_run": True})

    assert told.object == "fine_tuning.job.dry_run" and told.training_file == file_id
    assert told.model_extra is not None and told.model_extra["ok"] and told.model_extra["plan"]["examples"] == 12
    assert list(client.fine_tuning.jobs.list()) == []
    queued = client.fine_tuning.jobs.create(model=make.TINY, training_file=file_id, extra_body={"dry_run": False})
    assert queued.object == "fine_tuning.job"


def test_the_preview_shows_what_is_trained(house: House) -> None:
    rows = house.dry_run(house.file(FILE)).preview

    assert len(rows) == 5
    assert [piece.text for piece in rows[1].pieces if piece.trained] == ["2<|im_end|>"]
    assert "What comes after 1?" in "".join(piece.text for piece in rows[1].pieces if not piece.trained)


@pytest.mark.parametrize("is_validated", [False, True])
def test_what_is_wrong_with_a_file_is_told_line_by_line(house: House, is_validated: bool) -> None:
    file_id = house.file(FILE + b'\n{"messages": []}\nnot JSON')
    if is_validated:
        report = house.dry_run(file_id).files["training_file"]
        with house.to.sessions.begin() as session:
            files.finish_validation(session, file_id, report)
    told = house.dry_run(file_id)

    assert not told.ok and told.plan is None and told.price is None and told.queue is None
    assert [(reason.code, reason.param) for reason in told.problems] == [("invalid_file", "training_file")]
    assert sorted(problem.line for problem in told.files["training_file"].problems) == [41, 42]


def test_rows_that_are_not_trained_on_here_are_a_problem(house: House) -> None:
    told = house.dry_run(house.file(b'{"text": "once"}\n{"text": "twice"}'), method={"type": "dpo"})

    assert [(reason.code, reason.param) for reason in told.problems] == [("format_not_trained", "training_file")]


def test_a_preference_run_is_told_as_the_job_will_be(house: House) -> None:
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2}}}
    told, job = house.dry_run(house.file(make.preference_file()), method=method), house.job(make.preference_file(), method=method)

    assert told.ok and told.plan is not None and {**told.plan, "auto": told.auto} == job.plan and told.plan["examples"] == 12
    assert told.auto is not None and told.auto["beta"]["value"] == 0.1
    assert told.hyperparameters["beta"] == 0.1 and told.method == {
        "type": "dpo",
        "dpo": {"hyperparameters": told.hyperparameters},
    }
    assert [piece.text for piece in told.preview[0].rejected_pieces if piece.trained] == ["Dunno<|im_end|>"]
    assert job.spec["preference"] == {"method": "dpo", "beta": 0.1}
    assert told.data_report is not None and told.data_report.training.longest > told.data_report.training.lengths.longest


def test_a_file_without_a_usable_row_is_a_problem(house: House) -> None:
    told = house.dry_run(house.file(FILE), training={"max_seq_length": 8})

    assert [reason.code for reason in told.problems] == ["invalid_file"]
    assert "no row can be trained on" in told.problems[0].message


def test_truncations_and_leaks_are_warned_of(house: House) -> None:
    long = make.chat_line("What? " * 100, "That.").encode()
    asked = {"max_seq_length": 100, "long_rows": "truncate"}
    told = house.dry_run(house.file(FILE + b"\n" + long), validation_file=house.file(FILE), training=asked)

    assert told.ok and told.plan is not None and told.plan["truncated_examples"] == 1
    assert any(warning.startswith("Line 41 is cut") for warning in told.warnings)
    assert any("rows for validation are trained on too" in warning for warning in told.warnings)


def test_time_is_told_where_it_was_measured(house: House) -> None:
    file_id = house.file(FILE)
    with house.to.sessions.begin() as session:
        for speed in session.scalars(select(Throughput).where(Throughput.base == make.TINY)):
            session.delete(speed)
    unmeasured = house.dry_run(file_id)
    with house.to.sessions.begin() as session:
        session.add(Throughput(id=ids.new("tp_"), queue="train.cpu", base=make.TINY, tokens=500, worker_seconds=10.0))
    told = house.dry_run(file_id)

    assert unmeasured.time is None and unmeasured.estimated_finish is None
    assert told.time is not None and told.plan is not None
    tokens = told.plan["tokens_per_epoch"] * told.hyperparameters["n_epochs"]
    assert (told.time.seconds, told.time.tokens_per_second) == (tokens / 50, 50)
    rated = house.dry_run(house.file(make.rated_file(24)), method={"type": "kto"})
    assert rated.time is not None and rated.plan is not None
    tokens = rated.plan["tokens_per_epoch"] * rated.hyperparameters["n_epochs"]
    assert (rated.time.seconds, rated.time.tokens_per_second) == (tokens / 25, 25)  # twice as many forwards
    assert rated.preview is not None and [row.label for row in rated.preview] == [False, True, True, False, True]
    assert rated.hyperparameters["undesirable_weight"] == 2.0 and rated.auto is not None
    assert rated.auto["undesirable_weight"]["value"] == 2.0


def test_the_price_is_that_of_the_operators_book(house: House, tmp_path: Path) -> None:
    book = tmp_path / "prices.toml"
    book.write_text(f'currency = "EUR"\nper_million_tokens = 1\n[bases]\n"{make.TINY}" = 2000\n')
    file_id = house.file(FILE)
    free = house.dry_run(file_id).price
    there = replace(house, to=replace(house.to, settings=house.to.settings.model_copy(update={"price_file": book})))
    price = there.dry_run(file_id).price

    assert free is not None and (free.currency, free.amount) == ("USD", 0)
    assert price is not None and (price.currency, price.tokens) == ("EUR", free.tokens)
    assert price.amount == round(free.tokens * 2000 / 1e6, 2)


def test_a_long_file_is_looked_at_from_its_beginning(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = house.file(FILE)
    monkeypatch.setattr(glance, "SAMPLE_BYTES", len(FILE) // 2)
    told, split = house.dry_run(file_id), house.dry_run(file_id, training={"validation_split": 10})

    sample = told.sampled["training_file"]
    assert 18 <= sample.rows <= 20 and sample.of_bytes == len(FILE)
    assert told.plan is not None and abs(told.plan["examples"] - 40) <= 1
    assert "the first" in told.warnings[0] and "estimated" in told.warnings[0]
    assert split.plan is not None and abs(split.plan["examples"] - 30) <= 2 and split.plan["validation_examples"] == 10


def test_what_a_job_has_found_out_of_a_long_file_is_exact(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    job = house.job(FILE)
    monkeypatch.setattr(glance, "SAMPLE_BYTES", len(FILE) // 2)
    told = house.dry_run(house.file(FILE))
    other = house.dry_run(house.file(FILE), training={"max_seq_length": 100})

    assert ({**(told.plan or {}), "auto": told.auto}, told.sampled, len(told.preview)) == (job.plan, {}, 5)
    assert other.sampled


def test_a_run_without_room_is_a_problem_that_says_what_would_fit(house: House) -> None:
    base = _large(house)
    there = replace(
        house,
        to=replace(
            house.to,
            settings=house.to.settings.model_copy(
                update={"training": TrainingSettings(tiers=frozenset({"16"})), "gpu": GpuSettings(has_engine=False)}
            ),
            catalog=Catalog((base,), {}),
        ),
    )
    publish.publish(there.to, base)
    long = make.chat_line("x" * 20_000, "That.").encode()
    told = there.dry_run(there.file(FILE + b"\n" + long), model=base.id, training={"max_seq_length": 32_768})

    assert [reason.code for reason in told.problems] == ["no_room"] and told.plan is None
    assert "what would fit: training.max_seq_length of" in told.problems[0].message
    assert told.data_report is not None and told.data_report.training.examples == 41


def _large(house: House) -> Base:
    """As large as an 8B to the planner, and as cheap as the tiny one."""
    tiny, large = house.to.catalog[make.TINY], house.to.catalog["llama-3.1-8b-instruct"].architecture
    architecture = large.model_copy(update={"vocab": tiny.architecture.vocab})
    changes: dict[str, Any] = {"id": "large-dry-llama", "tier": "16", "context_length": 32_768, "architecture": architecture}
    return tiny.model_copy(update=changes)


def test_a_model_that_is_continued_gives_its_base_and_shape(house: House) -> None:
    with house.to.sessions.begin() as session:
        lease = make.claim(session, tuned := make.queued_job(session, house.caller, adapter={"rank": 8}))
        make.complete(session, lease)
    told = house.dry_run(house.file(FILE), model=tuned.fine_tuned_model)

    assert (told.ok, told.model, told.base_model) == (True, tuned.fine_tuned_model, make.TINY)
    assert (told.continue_from, told.adapter["rank"]) == (tuned.fine_tuned_model, 8)


def test_a_base_nobody_has_loaded_is_worth_another_try(house: House) -> None:
    unseen = house.to.catalog[make.TINY].model_copy(update={"id": "tiny-unseen"})
    there = replace(house, to=replace(house.to, catalog=Catalog((unseen,), {})))
    with pytest.raises(Unavailable, match="still being loaded"):
        there.dry_run(there.file(FILE), model="tiny-unseen")


def test_whatever_would_refuse_the_job_refuses_the_dry_run(house: House, client: OpenAI, stranger: OpenAI, file_id: str) -> None:
    def refused(asker: OpenAI, **asked: Any) -> tuple[str | None, str | None]:
        request = {"model": make.TINY, "training_file": file_id, "extra_body": {"dry_run": True}, **asked}
        with pytest.raises(openai.APIStatusError) as raised:
            asker.fine_tuning.jobs.create(**request)
        return raised.value.code, raised.value.param

    assert refused(stranger) == ("file_not_found", "training_file")
    assert refused(client, model="nobody") == ("model_not_found", "model")
    assert refused(client, extra_body={"dry_run": "perhaps"}) == ("invalid_value", "dry_run")
    assert refused(client, extra_body={"dry_run": True, "training": {"long_rows": "bend"}})[1] == "training.long_rows"


def test_a_file_that_takes_too_much_costs_its_process_only(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glance, "MEMORY_BYTES", 1 << 20)
    told = house.dry_run(house.file(FILE))

    assert [reason.code for reason in told.problems] == ["invalid_file"]
    assert "more than 1 MiB of memory" in told.problems[0].message


def test_rows_that_cannot_be_used_are_no_problem_while_others_may_follow(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "\n".join(make.chat_line("?", "x" * 600) for _ in range(6)).encode()
    file_id = house.file(long + b"\n" + FILE)
    monkeypatch.setattr(glance, "SAMPLE_BYTES", len(long) + 1)
    told = house.dry_run(file_id)

    assert told.ok and told.plan is None
    assert any("of the rows that were looked at: no row can be trained on" in warning for warning in told.warnings)
    assert len(told.preview) == 5 and all(row.problem for row in told.preview)


def test_a_long_line_without_an_end_is_told_as_what_it_is(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glance, "SAMPLE_BYTES", 1_200_000)
    told = house.dry_run(house.file(b"[" + b"1," * 700_000 + b"1]"))

    assert told.files["training_file"].counts == {"line_too_long": 1}


@pytest.mark.parametrize("content", [None, b"x" * len(FILE)])
def test_a_file_that_storage_lost_or_changed_is_a_problem(house: House, content: bytes | None) -> None:
    file_id = house.file(FILE)
    key = files.key_for(house.caller, file_id)
    if content is None:
        house.to.storage.delete(key)
    else:
        house.to.storage.put(key, content)
    told = house.dry_run(file_id)

    assert [(reason.code, reason.param) for reason in told.problems] == [("file_damaged", "training_file")]
    assert file_id in told.problems[0].message and "orgs/" not in told.problems[0].message


def test_one_that_takes_too_long_says_so_and_stops_no_job(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glance, "WALL_SECONDS", 0.01)
    told = house.dry_run(house.file(FILE))

    assert told.ok and told.plan is None and "a job has more time" in told.warnings[0]


def test_every_base_that_is_held_is_published_when_a_worker_starts(house: House, tmp_path: Path) -> None:
    first = house.to.catalog[make.TINY].model_copy(update={"id": ids.new("tiny-")})
    source = catalog.PathSource(kind="path", path=tmp_path / "nowhere", revision="1")
    lost = first.model_copy(update={"id": ids.new("lost-"), "source": source})
    large = first.model_copy(update={"id": ids.new("large-"), "tier": "80"})
    to = replace(house.to, catalog=Catalog((lost, large, first), {}))

    assert publish.publish_all(to) == [lost]
    assert [to.storage.exists(f"bases/{base.id}/base.json") for base in (first, lost, large)] == [True, False, False]
    assert card.find(large, to.settings.cache_dir) is None
