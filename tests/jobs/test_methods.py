"""Jobs by method: what becomes of their rows, and which rows they refuse."""

import json
from typing import Any

import openai
import pytest
from openai import OpenAI
from sqlalchemy import orm

from app.core.data import examine
from app.files import service as files
from app.models import Job
from tests import make
from tests.jobs.test_datasets import Prepared, prepared, services, stored

__all__ = ["prepared", "services", "stored"]  # fixtures

DPO = {"type": "dpo"}
RATED = [json.loads(line) for line in make.rated_file(12).splitlines()]
PAIRS = [json.loads(line) for line in make.preference_file(12).splitlines()]


def test_pairs_are_stored_as_one_example_each(prepared: Prepared, stored: Any) -> None:
    job: Job = prepared(*PAIRS, method=DPO)
    training, _ = stored(job)

    assert job.plan is not None and job.plan["examples"] == training.examples == training.pairs == 12
    assert job.spec is not None and job.spec["micro_batch_tokens"] >= training.longest
    assert all(len(training.lengths_of(e)) == 2 for e in range(12))


def test_a_split_never_parts_a_pair(prepared: Prepared, stored: Any) -> None:
    training, validation = stored(prepared(*PAIRS, method=DPO, training={"validation_split": 3}))

    assert (training.pairs, validation.pairs) == (training.examples, validation.examples) == (9, 3)
    assert sorted([*training.lines_E, *validation.lines_E]) == list(range(1, 13))


def test_ratings_are_stored_counted_and_weighed(prepared: Prepared, stored: Any) -> None:
    job: Job = prepared(*RATED, method={"type": "kto"}, training={"validation_split": 3})
    training, validation = stored(job)
    assert job.plan is not None and job.spec is not None and job.data_report is not None
    told, parts = job.data_report["training"], job.data_report["split"]

    assert (training.rated, validation.rated) == (training.examples, validation.examples) == (9, 3)
    assert (told["rated_good"], told["rated_bad"]) == (8, 4)
    good = parts["kept"]["rated_good"]
    assert good == (training.ratings_E > 0).sum() and parts["kept"]["rated_bad"] == 9 - good
    assert parts["held_back"]["rated_good"] == (validation.ratings_E > 0).sum() == 8 - good
    assert job.spec["preference"] == {"method": "kto", "beta": 0.1, "undesirable_weight": good / (9 - good)}
    assert job.plan["auto"]["undesirable_weight"]["value"] == good / (9 - good) != 1


def test_the_two_sides_of_a_pair_are_no_duplicates(prepared: Prepared) -> None:
    long = "the same long answer to the same long question, word for word, up to its end "
    pair = {
        "input": {"messages": [{"role": "user", "content": long}]},
        "preferred_output": [{"role": "assistant", "content": long}],
        "non_preferred_output": [{"role": "assistant", "content": long + "!"}],
    }
    once, twice = prepared(pair, method=DPO), prepared(pair, pair, method=DPO)

    counts = [job.data_report["likeness"]["training"]["exact"]["count"] for job in (once, twice)]  # type: ignore[index]
    assert counts == [0, 1]
    assert once.data_report["likeness"]["training"]["near"]["count"] == 0  # type: ignore[index]


def test_texts_are_trained_on_whole_and_told_as_rows_and_examples(prepared: Prepared, stored: Any) -> None:
    texts = [{"text": "long text " * 12}, {"text": "short"}]
    job: Job = prepared(*texts, training={"max_seq_length": 64})
    training, _ = stored(job)

    assert job.data_report is not None and job.plan is not None
    said = job.data_report["training"]
    assert (said["rows"], said["examples"], job.plan["examples"]) == (2, 3, 3)
    assert training.lines_E.tolist() == [1, 1, 2] and training.labelled_tokens == training.tokens - 3
    assert said["lengths"]["longest"] == 121 and said["speakers"]["text"]["tokens"] == training.tokens


@pytest.mark.parametrize(
    ("content", "method", "advice"),
    [
        (make.preference_file(), "supervised", "set method.type to 'dpo' or 'orpo'"),
        (make.chat_file(), "dpo", "set method.type to 'supervised'"),
        (make.chat_file(), "kto", "set method.type to 'supervised'"),
        (make.rated_file(), "orpo", "set method.type to 'kto'"),
    ],
)
@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_a_file_for_another_method_is_refused_with_that_method(
    client: OpenAI, system_sessions: orm.sessionmaker[orm.Session], content: bytes, method: str, advice: str, param: str
) -> None:
    def uploaded(body: bytes) -> str:
        file = client.files.create(file=("a.jsonl", body), purpose="fine-tune")
        with system_sessions.begin() as session:
            files.finish_validation(session, file.id, examine(body.splitlines()))
        return file.id

    fitting = {"supervised": make.chat_file(), "kto": make.rated_file()}.get(method, make.preference_file())
    asked = {"training_file": uploaded(fitting), param: uploaded(content)}
    with pytest.raises(openai.BadRequestError, match=advice) as refusal:
        client.fine_tuning.jobs.create(model=make.TINY, method={"type": method}, **asked)  # type: ignore[arg-type]

    assert (refusal.value.code, refusal.value.param) == ("format_not_trained", param)


def test_the_job_shows_the_method_as_asked_and_then_as_resolved(
    client: OpenAI, system_sessions: orm.sessionmaker[orm.Session], file_id: str
) -> None:
    asked = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "beta": "auto"}}, "supervised": {}}
    job = client.fine_tuning.jobs.create(model=make.TINY, training_file=file_id, method=asked)  # type: ignore[arg-type]

    assert job.method is not None and job.method.type == "dpo" and job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert (job.method.dpo.hyperparameters.beta, job.method.dpo.hyperparameters.n_epochs) == ("auto", 2)
    with system_sessions.begin() as session:
        session.get_one(Job, job.id).spec = {
            **make.admitted().spec.model_dump(mode="json"),
            "preference": {"method": "dpo", "beta": 0.1},
        }
    shown = client.fine_tuning.jobs.retrieve(job.id)
    assert shown.method is not None and shown.method.dpo is not None and shown.method.dpo.hyperparameters is not None
    assert shown.method.dpo.hyperparameters.beta == 0.1
    assert type(shown).model_validate(shown.model_dump()).id == job.id  # the SDK's own type, without its lenience
