"""Two jobs at the gate of one alias, as a customer makes them: the first beats the base, the second does not beat the first."""

import time
from typing import Any

import pytest
from openai import NotFoundError, OpenAI

from tests import make
from tests.embedded.patience import PATIENCE_SECONDS
from tests.stack import Stack

SECONDS = PATIENCE_SECONDS
SAYS_SEVEN = {"type": "regex", "name": "seven", "pattern": "7"}


def call(client: OpenAI, path: str, **body: Any) -> dict[str, Any]:
    return client.post(path, cast_to=dict, body=body)  # type: ignore[type-var]


def tuned(client: OpenAI, training: str, gate: dict[str, Any]) -> Any:
    """A job of the alias `prod` when it is over."""
    job = client.fine_tuning.jobs.create(
        model=make.TINY,
        training_file=training,
        seed=3,
        hyperparameters={"n_epochs": 6, "batch_size": 8},
        extra_body={"quality_gate": gate, "alias": "prod", "training": {"learning_rate": 0.01}},
    )
    deadline = time.monotonic() + SECONDS
    while job.status not in {"succeeded", "failed", "cancelled"}:
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


def answers(client: OpenAI, model: str) -> str:
    asked = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Say it."}], max_tokens=4)
    return asked.model


def test_a_new_model_goes_live_by_winning(stack: Stack, client: OpenAI) -> None:
    chats = "\n".join(make.chat_line(f"What is {n}?", "7") for n in range(48)).encode()
    training = client.files.create(file=("train.jsonl", chats), purpose="fine-tune").id
    held_out = client.files.create(file=("held.jsonl", chats[: chats.index(b"\n", 600)]), purpose="evals").id
    client.files.wait_for_processing(held_out, poll_interval=0.1)
    named = call(client, "/evaluations", file=held_out, models=[make.TINY], graders=[SAYS_SEVEN], sampling={"max_tokens": 4})
    call(client, "/model_aliases", name="prod", model=make.TINY)
    gate = {"evaluation": named["id"], "against": "prod", "margin": 0.5, "confidence": 0.95}
    first, second = tuned(client, training, gate), tuned(client, training, gate)

    assert first.status == "succeeded", first
    assert (first.quality_gate["stage"], first.quality_gate["compared_with"]) == ("passed", make.TINY)
    assert answers(client, "prod") == first.fine_tuned_model  # the alias did not follow the second
    assert (second.status, second.fine_tuned_model, second.error.code) == ("failed", None, "quality_gate_failed"), second
    assert second.quality_gate["compared_with"] == first.fine_tuned_model
    kept = second.quality_gate["model"]
    with pytest.raises(NotFoundError, match="not live"):
        answers(client, kept)
    call(client, f"/fine_tuning/jobs/{second.id}/publish")
    assert answers(client, kept) == kept
    call(client, "/model_aliases/prod", model=kept)
    assert answers(client, "prod") == kept
    assert [call(client, "/model_aliases/prod/rollback")["model"] for _ in range(2)] == [first.fine_tuned_model, make.TINY]
    assert answers(client, "prod") == make.TINY
