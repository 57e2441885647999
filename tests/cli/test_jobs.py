"""Jobs from a terminal: made of what was typed, listed, told to stop and go on, put side by side."""

import json
from pathlib import Path

import pytest
from openai import OpenAI
from sqlalchemy import orm

from app.accounts.caller import Caller
from app.core.settings import Settings
from app.core.storage import Storage
from tests import make
from tests.cli.conftest import Tunesmith
from tests.inference import served
from tests.jobs.test_comparing import finished_job

Sessions = orm.sessionmaker[orm.Session]
CREATE = ("jobs", "create", "--model", make.TINY)


def test_options_are_the_body_of_the_job(tunesmith: Tunesmith, file_id: str) -> None:
    options = (
        "--epochs 2 --batch-size 4 --lr 0.001 --rank 8 --seed 7 --suffix mine --metadata team=a --set training.scheduler=linear"
    )
    said = tunesmith(*CREATE, file_id, *options.split(), "--set", "adapter.alpha=64", "--json")
    job = json.loads(said.out)

    assert (said.status, said.err) == (0, "")
    assert (job["training_file"], job["seed"], job["user_provided_suffix"], job["metadata"]) == (
        file_id,
        7,
        "mine",
        {"team": "a"},
    )
    assert (job["hyperparameters"]["n_epochs"], job["hyperparameters"]["batch_size"]) == (2, 4)
    assert (job["adapter"]["rank"], job["adapter"]["alpha"]) == (8, 64)
    assert (job["training"]["learning_rate"], job["training"]["scheduler"]) == (0.001, "linear")


def test_a_body_from_a_file_is_taken_and_options_go_before_it(tunesmith: Tunesmith, file_id: str, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"model": make.TINY, "seed": 1, "adapter": {"rank": 4, "alpha": 4}}))
    job = json.loads(tunesmith("jobs", "create", file_id, "--body", "job.json", "--rank", "8", "--json").out)

    assert (job["model"], job["seed"], job["adapter"]["rank"], job["adapter"]["alpha"]) == (make.TINY, 1, 8, 4)


@pytest.mark.usefixtures("validating")
def test_a_path_is_pushed_first(tunesmith: Tunesmith, client: OpenAI, tmp_path: Path) -> None:
    for name in ("train.jsonl", "more.jsonl"):
        (tmp_path / name).write_bytes(make.chat_file())
    said = tunesmith(*CREATE, "train.jsonl", "--validation", "more.jsonl")
    job = client.fine_tuning.jobs.retrieve(said.out.partition(":")[0])

    assert said.status == 0 and f"tunesmith jobs watch {job.id}" in said.out
    assert client.files.retrieve(job.training_file).filename == "train.jsonl"
    assert client.files.retrieve(str(job.validation_file)).filename == "more.jsonl"


@pytest.mark.usefixtures("validating")
def test_an_invalid_file_makes_no_job(tunesmith: Tunesmith, client: OpenAI, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    said = tunesmith(*CREATE, "train.jsonl")

    assert (said.status, said.err.count("\n")) == (1, 1)
    assert "train.jsonl is not valid, and no job was made" in said.err and "     1 | {}" in said.out
    assert client.fine_tuning.jobs.list().data == []


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["nowhere.jsonl"], 1, "there is no file nowhere.jsonl here"),
        (["file-nobody"], 1, "file-nobody"),
        (["file-nobody", "--set", "training"], 1, "--set training: write NAME=VALUE"),
        (["file-nobody", "--set", "seed=1", "--set", "seed.deep=1"], 1, "seed is no object"),
        (["file-nobody", "--method", "magic"], 2, "'magic' is not one of 'supervised'"),
        (["file-nobody", "--body", "nowhere.json"], 1, "nowhere.json"),
    ],
)
def test_what_cannot_be_made_is_told_in_a_line(tunesmith: Tunesmith, arguments: list[str], status: int, why: str) -> None:
    said = tunesmith(*CREATE, *arguments)

    assert (said.status, said.out, said.err.count("\n")) == (status, "", 1)
    assert why in said.err


@pytest.mark.usefixtures("validating")
def test_a_dry_run_makes_no_job(
    tunesmith: Tunesmith, client: OpenAI, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    served.renderer(settings, storage)  # the base's card
    (tmp_path / "train.jsonl").write_bytes(make.chat_file())
    said = tunesmith(*CREATE, "train.jsonl", "--dry-run", "--epochs", "3")

    told = list(map(str.split, said.out.splitlines()))

    assert said.status == 0, said.err
    assert "it can be made" in said.out and ["steps", "36"] in told and "in tier cpu" in said.out
    assert client.fine_tuning.jobs.list().data == []


def test_a_job_is_listed_halted_let_go_on_and_stopped(
    tunesmith: Tunesmith, client: OpenAI, system_sessions: Sessions, organization: Caller
) -> None:
    with system_sessions.begin() as session:
        job_id = make.queued_job(session, organization).id

    assert tunesmith("jobs", "pause", job_id).out.startswith(f"{job_id}: paused; ")
    assert tunesmith("jobs", "list").out.splitlines()[1].split()[:3] == [job_id, "paused", make.TINY]
    assert tunesmith("jobs", "resume", job_id).out.startswith(f"{job_id}: queued, place 1 of ")
    assert json.loads(tunesmith("jobs", "cancel", job_id, "--json").out)["status"] == "cancelled"
    again = tunesmith("jobs", "resume", job_id)
    assert (again.status, again.err.count("\n")) == (1, 1)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "cancelled"


def test_a_list_is_as_long_as_was_asked(tunesmith: Tunesmith, system_sessions: Sessions, organization: Caller) -> None:
    with system_sessions.begin() as session:
        made = [make.queued_job(session, organization).id for _ in range(5)]

    assert [job["id"] for job in json.loads(tunesmith("jobs", "list", "--limit", "3", "--json").out)] == made[:1:-1]


def test_jobs_are_compared_by_what_differs(tunesmith: Tunesmith, system_sessions: Sessions, organization: Caller) -> None:
    with system_sessions.begin() as session:
        file = make.valid_file(session, organization)
        first, second = (
            finished_job(session, organization, losses, training_file=file, adapter={"rank": rank})
            for losses, rank in (((2.0, 1.5, 1.8), 8), ((2.0, 1.0, 1.1), 16))
        )
        ids = first.id, second.id
    said = tunesmith("jobs", "compare", *ids)
    rows = {line[:30].split("  ")[0]: line for line in said.out.splitlines()}

    assert said.status == 0, said.err
    assert said.out.splitlines()[0].split() == list(ids)
    assert rows["adapter.rank (requested)"].split()[2:] == ["8", "16"]
    assert "1.5000 at step 4" in rows["lowest"] and "1.0000 at step 4" in rows["lowest"]
    assert "█" in rows["loss"] and rows["status"].split() == ["status", "succeeded", "succeeded"]
    assert not any(name.startswith("adapter.alpha") for name in rows)
    assert [job["id"] for job in json.loads(tunesmith("jobs", "compare", *ids, "--json").out)["data"]] == list(ids)
    assert "name 2 to 20" in tunesmith("jobs", "compare", ids[0]).err
