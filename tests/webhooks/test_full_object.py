"""Endpoints that want the whole object in `data`: the job or checkpoint as the API shows it at that moment."""

import json
from typing import Any

import httpx
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from app.accounts.caller import Caller
from tests import make
from tests.webhooks.steps import Sessions, rows_of

TYPES = [f"fine_tuning.job.{name}" for name in ("created", "started", "checkpoint", "succeeded")]


def test_the_object_is_what_the_api_shows_at_that_moment(
    client: OpenAI, http: httpx.Client, system_sessions: Sessions, organization: Caller
) -> None:
    whole = http.post("/v1/webhook_endpoints", json={"url": "http://127.0.0.1:9/", "event_types": TYPES, "full_object": True})
    brief = http.post("/v1/webhook_endpoints", json={"url": "http://127.0.0.1:9/", "event_types": TYPES})
    assert (whole.json()["full_object"], brief.json()["full_object"]) == (True, False)
    with system_sessions.begin() as session:
        job = make.queued_job(session, organization)
        lease = make.claim(session, job)
        make.checkpoint(session, lease)
        make.complete(session, lease)

    told: dict[tuple[str, str], Any] = {
        (row.endpoint_id, row.event_type): json.loads(row.body)["data"] for row in rows_of(system_sessions, organization)
    }
    assert len(told) == 8
    for type in TYPES:
        assert told[brief.json()["id"], type] == {"id": told[whole.json()["id"], type]["id"]}
    created, started, checkpoint, succeeded = (told[whole.json()["id"], type] for type in TYPES)
    assert [shown["status"] for shown in (created, started, succeeded)] == ["validating_files", "running", "succeeded"]
    assert FineTuningJob.model_validate(succeeded).fine_tuned_model == job.fine_tuned_model
    assert FineTuningJobCheckpoint.model_validate(checkpoint).fine_tuning_job_id == job.id
    assert succeeded.items() <= http.get(f"/v1/fine_tuning/jobs/{job.id}").json().items()


def test_how_much_is_told_may_be_changed(client: OpenAI, system_sessions: Sessions, organization: Caller) -> None:
    made = client.webhooks.create(name="a", url="http://127.0.0.1:9/", event_types=["fine_tuning.job.cancelled"])
    for is_whole in (True, False):
        changed = client.webhooks.update(made.id, extra_body={"full_object": is_whole})
        assert (changed.model_extra or {})["full_object"] is is_whole
        file = client.files.create(file=("a.jsonl", make.chat_file()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=make.TINY, training_file=file.id)
        client.fine_tuning.jobs.cancel(job.id)
        data = json.loads(rows_of(system_sessions, organization)[-1].body)["data"]
        assert data["id"] == job.id
        assert ("training_file" in data) is is_whole
