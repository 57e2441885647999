"""The main job as a customer does it, on the tiny base: `tunesmith up`, the SDK, a webhook receiver, and nothing else."""

import csv
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from tests import make
from tests.embedded.patience import PATIENCE_SECONDS
from tests.stack import Stack
from tests.webhooks.receiver import Receiver, running


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with running() as made:
        yield made


@pytest.fixture(scope="module")
def secret(client: OpenAI, receiver: Receiver) -> str:
    """Of an endpoint that wants to hear of success."""
    endpoint = client.webhooks.create(name="flow", url=receiver.url, event_types=["fine_tuning.job.succeeded"])
    return endpoint.signing_secret


@pytest.fixture(scope="module")
def tuned(client: OpenAI, secret: str) -> FineTuningJob:
    """A job that went all the way, with an endpoint there to hear of it."""
    training = client.files.create(file=("train.jsonl", make.chat_file(48)), purpose="fine-tune")
    validation = client.files.create(file=("valid.jsonl", make.chat_file(6)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=make.TINY,
        training_file=training.id,
        validation_file=validation.id,
        suffix="flow",
        seed=3,
        hyperparameters={"n_epochs": 4, "batch_size": 8},
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while job.status not in {"succeeded", "failed", "cancelled"} and time.monotonic() < deadline:
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    return job


def test_the_job_tells_its_whole_story(client: OpenAI, tuned: FineTuningJob) -> None:
    events = list(client.fine_tuning.jobs.list_events(tuned.id, limit=100))[::-1]
    steps = [event for event in events if event.type == "metrics" and "train_loss" in (event.data or {})]  # type: ignore[operator]
    losses = [event.data["train_loss"] for event in steps]  # type: ignore[index]

    assert len(steps) == 24
    assert sum(losses[-4:]) < sum(losses[:4])
    assert any("valid_loss" in (event.data or {}) for event in events)  # type: ignore[operator]
    assert [(event.model_extra or {})["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1].message == "The job has successfully completed"
    assert tuned.trained_tokens and tuned.finished_at and tuned.error is None
    assert tuned.hyperparameters.n_epochs == 4


def test_the_result_file_holds_a_row_a_step(client: OpenAI, tuned: FineTuningJob) -> None:
    header, *rows = client.files.content(tuned.result_files[0]).text.splitlines()

    assert header == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [row.split(",")[0] for row in rows] == [str(step) for step in range(1, 25)]


def test_the_job_says_what_it_has_come_to(client: OpenAI, tuned: FineTuningJob) -> None:
    told = tuned.model_extra or {}
    events = [event.message for event in client.fine_tuning.jobs.list_events(tuned.id, limit=100)]
    rows = list(csv.DictReader(client.files.content(tuned.result_files[1]).text.splitlines()))
    files = {"training": tuned.training_file, "validation": tuned.validation_file}

    assert told["held_out"]["examples"] == 6
    assert told["held_out"]["adapter"]["loss"] < told["held_out"]["base"]["loss"]
    assert any(message.startswith("6 held-out rows, base against adapter: loss ") for message in events)
    assert [row["line"] for row in rows if row["split"] == "validation"] == ["1", "2", "3", "4", "5", "6"]
    assert all(row["file"] == files[row["split"]] for row in told["examined"]["hardest"])
    assert {row["line"] for row in told["examined"]["hardest"]} <= {int(row["line"]) for row in rows}


def test_the_webhook_came_signed(client: OpenAI, receiver: Receiver, secret: str, tuned: FineTuningJob) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not receiver.received and time.monotonic() < deadline:
        time.sleep(0.05)
    (message,) = receiver.received
    event = client.webhooks.unwrap(message.body, message.headers, secret=secret)

    assert (event.type, event.data.id) == ("fine_tuning.job.succeeded", tuned.id)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(message.body + b" ", message.headers, secret=secret)


def test_base_model_and_checkpoint_answer_and_differ(client: OpenAI, tuned: FineTuningJob) -> None:
    checkpoints = [found.fine_tuned_model_checkpoint for found in client.fine_tuning.jobs.checkpoints.list(tuned.id)]
    assert checkpoints
    answers = {}
    for model in (make.TINY, str(tuned.fine_tuned_model), checkpoints[-1]):
        said = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "What comes after 3?"}], max_tokens=12, temperature=0
        )
        assert said.usage is not None and said.usage.completion_tokens <= 12
        assert said.choices[0].finish_reason in {"stop", "length"}
        answers[model] = said.choices[0].message.content

    assert answers[make.TINY] != answers[str(tuned.fine_tuned_model)]


def test_a_stream_says_the_same_as_the_whole(client: OpenAI, tuned: FineTuningJob) -> None:
    asked = {
        "model": tuned.fine_tuned_model,
        "messages": [{"role": "user", "content": "What comes after 5?"}],
        "max_tokens": 16,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]

    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.model_copy(update={"prompt_tokens_details": None}) == whole.usage.model_copy(
        update={"prompt_tokens_details": None}
    )
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_an_answer_can_be_sent_back_as_history(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    said = client.chat.completions.create(model=make.TINY, messages=messages, max_tokens=3, temperature=1e-320)
    messages += [said.choices[0].message.model_dump(), {"role": "user", "content": "go on"}]

    assert client.chat.completions.create(model=make.TINY, messages=messages, max_tokens=3).choices


def test_a_completion_continues_a_text(client: OpenAI, tuned: FineTuningJob) -> None:
    said = client.completions.create(model=str(tuned.fine_tuned_model), prompt="What comes", max_tokens=5, temperature=0)

    assert said.usage is not None and said.usage.completion_tokens <= 5
    assert said.object == "text_completion"
    stream = client.completions.create(
        model=str(tuned.fine_tuned_model), prompt="What comes", max_tokens=5, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == said.choices[0].text


def test_a_mix_adds_a_part_of_each_model_to_the_base(client: OpenAI, tuned: FineTuningJob) -> None:
    checkpoint = client.fine_tuning.jobs.checkpoints.list(tuned.id).data[-1].fine_tuned_model_checkpoint

    def said(model: str, *parts: tuple[str, float]) -> str:
        mix = [{"model": name, "weight": weight} for name, weight in parts]
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What comes after 3?"}],
            max_tokens=12,
            temperature=0,
            extra_body={"adapters": mix} if mix else None,
        )
        assert answer.model == model
        return str(answer.choices[0].message.content)

    model = str(tuned.fine_tuned_model)
    assert said(make.TINY, (model, 1.0)) == said(model) != said(make.TINY)
    assert said(make.TINY, (model, 0.5), (checkpoint, 0.5))
    with pytest.raises(openai.BadRequestError) as refusal:
        said(model, (checkpoint, 1.0))
    assert refusal.value.param == "model"
    with pytest.raises(openai.BadRequestError) as refusal:
        said(make.TINY, (model, 1.0), (model, 0.5))
    assert refusal.value.param == "adapters.1.model"


def test_usage_tells_what_had_been_read_before(client: OpenAI, tuned: FineTuningJob) -> None:
    asked = {
        "model": str(tuned.fine_tuned_model),
        "messages": [{"role": "user", "content": "Once more, and slowly: what comes after 3?"}],
        "max_tokens": 2,
    }
    told = [client.chat.completions.create(**asked).usage for _ in range(2)]
    last = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))[-1].usage
    cached = [usage.prompt_tokens_details.cached_tokens for usage in (*told, last)]

    assert cached[1] == cached[2] >= told[0].prompt_tokens - 17
    assert cached[1] > cached[0]


def test_several_answers_are_those_of_their_seeds(client: OpenAI, tuned: FineTuningJob) -> None:
    asked: dict[str, Any] = {
        "model": tuned.fine_tuned_model,
        "messages": [{"role": "user", "content": "What comes after 5?"}],
        "max_tokens": 8,
        "temperature": 1.5,
    }
    alone = [client.chat.completions.create(**asked, seed=7 + more) for more in range(3)]
    together = client.chat.completions.create(**asked, seed=7, n=3)
    chunks = list(client.chat.completions.create(**asked, seed=7, n=3, stream=True, stream_options={"include_usage": True}))
    streamed = ["", "", ""]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        streamed[choice.index] += choice.delta.content or ""

    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.message.content for choice in together.choices] == [one.choices[0].message.content for one in alone]
    assert streamed == [choice.message.content for choice in together.choices]
    assert together.usage == chunks[-1].usage
    assert together.usage and alone[0].usage and together.usage.prompt_tokens == alone[0].usage.prompt_tokens  # told once
    assert together.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone if one.usage)


def test_logprobs_are_told_of_each_token(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": make.TINY,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "temperature": 0,
    }
    said = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    plain = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True)
    told = said.choices[0].logprobs.content  # type: ignore[union-attr]
    streamed = [token for chunk in stream if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content or ()]

    assert told and all(token.logprob == token.top_logprobs[0].logprob <= 0 and len(token.top_logprobs) == 2 for token in told)
    assert bytes(byte for token in told for byte in token.bytes or ()).decode(errors="replace") == said.choices[0].message.content
    assert streamed == told
    assert plain.choices[0].logprobs is None and plain.choices[0].message.content == said.choices[0].message.content

    text = client.completions.create(model=make.TINY, prompt="hi", max_tokens=4, temperature=0, logprobs=1)
    of_text = text.choices[0].logprobs
    assert of_text is not None and of_text.tokens and of_text.text_offset
    assert [len("".join(of_text.tokens[:at])) for at in range(len(of_text.tokens))] == of_text.text_offset
    assert [list(top.values()) for top in of_text.top_logprobs or ()] == [[value] for value in of_text.token_logprobs or ()]


def test_an_answer_is_held_to_its_schema(client: OpenAI, tuned: FineTuningJob) -> None:
    schema = {
        "type": "object",
        "properties": {"next": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["next"],
        "additionalProperties": False,
    }
    for model in (make.TINY, str(tuned.fine_tuned_model)):
        said = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What comes after 5?"}],
            max_tokens=60,
            temperature=0,
            response_format={"type": "json_schema", "json_schema": {"name": "next", "schema": schema, "strict": True}},
        )
        assert said.choices[0].finish_reason == "stop"
        assert 0 <= json.loads(said.choices[0].message.content or "")["next"] <= 99


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": "ft:nobody:none::x"}, "model", "model_not_found"),
        ({"n": 17}, "n", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
        ({"logit_bias": {"x": 1}}, "logit_bias", None),
        ({"logit_bias": {"99999": 1}}, "logit_bias", None),
        ({"presence_penalty": 3}, "presence_penalty", None),
        ({"response_format": {"type": "xml"}}, "response_format.type", None),
        ({"response_format": {"type": "json_schema"}}, "response_format", None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objekt"}}}},
            "response_format.json_schema.schema",
            None,
        ),
        ({"audio": {}}, "audio", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", None),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0", None),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "messages", "context_length_exceeded"),
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "messages", None),
        ({"temperature": 3}, "temperature", None),
        ({"stop": [""]}, "stop", None),
    ],
)
def test_a_chat_that_cannot_be_had_names_the_parameter(
    stack: Stack, change: dict[str, object], param: str, code: str | None
) -> None:
    body = {"model": make.TINY, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | change
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    answer = httpx.post(f"{stack.base_url}/chat/completions", json=body, headers=headers, timeout=PATIENCE_SECONDS)
    error = answer.json()["error"]

    assert answer.status_code in {400, 404}
    assert error["param"] == param
    assert code is None or error["code"] == code


def test_a_model_is_listed_then_deleted(client: OpenAI, tuned: FineTuningJob) -> None:
    name = str(tuned.fine_tuned_model)
    assert name in [model.id for model in client.models.list()]
    assert client.models.delete(name).deleted

    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=1)


def test_a_running_job_is_cancelled(client: OpenAI) -> None:
    training = client.files.create(file=("train.jsonl", make.chat_file(200)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=make.TINY, training_file=training.id, hyperparameters={"n_epochs": 100, "batch_size": 1}
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while job.status != "running" and time.monotonic() < deadline:
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    client.fine_tuning.jobs.cancel(job.id)
    while job.status == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)

    assert (job.status, job.fine_tuned_model) == ("cancelled", None)
