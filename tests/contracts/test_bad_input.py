"""What users get wrong, as a table: each answer says what is wrong, where, and what to do, and nothing is changed by it."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import orm, text

from app.accounts.caller import Caller
from app.adapters import service as adapters
from app.core import catalog
from app.core.engine import Heartbeat
from app.core.settings import Settings
from app.core.storage import Storage
from app.inference import engines
from tests import make
from tests.embedded.patience import PATIENCE_SECONDS
from worker.model import card
from worker.services import Services, open_services
from worker.tasks import prepare, validate

# a file of tests/data/corpus, whose table knows line and code: words that its owner must be told
FILES = {
    "empty": "write one JSON object per line",
    "json-cut-off": "not valid JSON",
    "json-pretty-printed": "pretty-printed",
    "json-one-list": "write each element on a line of its own",
    "json-number-of-5000-digits": "too many digits",
    "binary-gzip": "unpack it",
    "encoding-utf-16": "the file is UTF-16; save the file as UTF-8",
    "encoding-latin-1": "save the file as UTF-8",
    "escape-lone-surrogate": "write the whole character",
    "escape-nul": "remove it",
    "key-twice": "keep one",
    "depth-1000": "32 levels",
    "role-human": "system, developer, user, assistant, tool",
    "answer-missing": "add an assistant message",
    "answer-empty": "write the answer",
    "content-image": "only text is trained on",
    "unlearnt-file": "give each row an answer",
    "arguments-broken": "write them as one JSON object",
    "call-unanswered": "add its tool message",
    "format-trl-preference": "'chosen', 'question', 'rejected'",
    "format-mixed": "keep one format per file",
    "sharegpt-unknown-speaker": "human, user, gpt",
    "preference-output-text": "a list of one assistant message",
    "rated-label-word": "write true for a good answer, false for a bad one",
    "rated-ends-with-user": "end with the answer that the label rates",
}
CORPUS = Path(__file__).parents[1] / "data"
EXPECTED = tomllib.loads((CORPUS / "expected.toml").read_text())

# name: (the change to a good job, status, param, words)
JOBS: dict[str, tuple[dict[str, Any], int, str | None, str]] = {
    "no model": ({"model": ...}, 400, "model", "required"),
    "an unknown base": ({"model": "gpt-99"}, 404, "model", "tiny-random-llama"),
    "a model that is a number": ({"model": 7}, 400, "model", "string"),
    "an empty model": ({"model": ""}, 400, "model", "model must be 1 or more characters long"),
    "no file": ({"training_file": ...}, 400, "training_file", "required"),
    "a missing file": ({"training_file": "file-none"}, 404, "training_file", "GET /v1/files"),
    "a missing validation file": ({"validation_file": "file-none"}, 404, "validation_file", "GET /v1/files"),
    "a file that is a list": ({"training_file": ["a"]}, 400, "training_file", "string"),
    "an epoch too few": ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs", "greater than or equal to 1"),
    "an epoch too many": ({"hyperparameters": {"n_epochs": 101}}, 400, "hyperparameters.n_epochs", "less than or equal to 100"),
    "half an epoch": ({"hyperparameters": {"n_epochs": 1.5}}, 400, "hyperparameters.n_epochs", "integer"),
    "epochs in words": (
        {"hyperparameters": {"n_epochs": "three"}},
        400,
        "hyperparameters.n_epochs",
        "must be 'auto' or be an integer",
    ),
    "true epochs": ({"hyperparameters": {"n_epochs": True}}, 400, "hyperparameters.n_epochs", "integer"),
    "null epochs": ({"hyperparameters": {"n_epochs": None}}, 400, "hyperparameters.n_epochs", "'auto'"),
    "a batch of 0": ({"hyperparameters": {"batch_size": 0}}, 400, "hyperparameters.batch_size", "greater than or equal to 1"),
    "a batch beyond integers": ({"hyperparameters": {"batch_size": 10**30}}, 400, "hyperparameters.batch_size", "256"),
    "a learning rate of 0": (
        {"hyperparameters": {"learning_rate_multiplier": 0}},
        400,
        "hyperparameters.learning_rate_multiplier",
        "greater than 0",
    ),
    "a learning rate of NaN": (
        {"hyperparameters": {"learning_rate_multiplier": float("nan")}},
        400,
        "hyperparameters.learning_rate_multiplier",
        "100",
    ),
    "an infinite learning rate": (
        {"hyperparameters": {"learning_rate_multiplier": float("inf")}},
        400,
        "hyperparameters.learning_rate_multiplier",
        "100",
    ),
    "an infinite gradient norm": ({"training": {"max_grad_norm": float("inf")}}, 400, "training.max_grad_norm", "finite"),
    "an unknown hyperparameter": ({"hyperparameters": {"epochs": 3}}, 400, "hyperparameters.epochs", "remove it"),
    "hyperparameters as a list": ({"hyperparameters": [3]}, 400, "hyperparameters", "must be an object"),
    "a rank beyond the engine's": ({"adapter": {"rank": 129}}, 400, "adapter.rank", "128"),
    "a target that is none": ({"adapter": {"target_modules": ["lm_head"]}}, 400, "adapter.target_modules.0", "q_proj"),
    "a dropout of 1": ({"adapter": {"dropout": 1}}, 400, "adapter.dropout", "less than 1"),
    "an initialisation that looks at the data": (
        {"adapter": {"init_lora_weights": "eva"}},
        400,
        "adapter.init_lora_weights",
        "'gaussian' or 'orthogonal'",
    ),
    "an odd rank for halves": ({"adapter": {"init_lora_weights": "orthogonal", "rank": 3}}, 400, "adapter", "an even rank"),
    "an optimizer that is none": ({"training": {"optimizer": "sgd"}}, 400, "training.optimizer", "'adamw_32bit'"),
    "a scheduler that is none": ({"training": {"scheduler": "step"}}, 400, "training.scheduler", "'linear'"),
    "a constant rate that falls": (
        {"training": {"scheduler": "constant", "min_learning_rate_ratio": 0.5}},
        400,
        "training",
        "leave out min_learning_rate_ratio",
    ),
    "a B that learns slower": ({"training": {"lora_plus_ratio": 0.5}}, 400, "training.lora_plus_ratio", "1"),
    "no patience": (
        {"training": {"early_stopping": {"patience": 0}, "validation_split": 0.1}},
        400,
        "training.early_stopping.patience",
        "1",
    ),
    "an early stop by nothing": (
        {"training": {"early_stopping": {"patience": 2}}},
        400,
        "training.early_stopping",
        "send a validation_file or training.validation_split",
    ),
    "the best of nothing": (
        {"training": {"publish": "best"}},
        400,
        "training.publish",
        "send a validation_file or training.validation_split",
    ),
    "a base that no engine holds": (
        {"quantization": {"scheme": "int8"}},
        400,
        "quantization.scheme",
        "int8 added to TUNESMITH_TRAINING__QUANTIZATIONS",
    ),
    "blocks of int8": ({"quantization": {"scheme": "int8", "double_quant": True}}, 400, "quantization", "leave out double_quant"),
    "another quantization": ({"quantization": {"scheme": "int3"}}, 400, "quantization.scheme", "nf4"),
    "a sequence of 4 tokens": ({"training": {"max_seq_length": 4}}, 400, "training.max_seq_length", "8"),
    "rows cut elsewhere": ({"training": {"long_rows": "right"}}, 400, "training.long_rows", "'drop' or 'truncate'"),
    "nothing to validate with": ({"training": {"validation_split": 0}}, 400, "training.validation_split", "greater than"),
    "more than all to validate with": ({"training": {"validation_split": 1.5}}, 400, "training.validation_split", "less than 1"),
    "a split in words": ({"training": {"validation_split": "some"}}, 400, "training.validation_split", "number"),
    "a true split": ({"training": {"validation_split": True}}, 400, "training.validation_split", "less than 1"),
    "a validation file and a split": (
        {"training": {"validation_split": 0.1}, "validation_file": "file-x"},
        400,
        "training.validation_split",
        "send one of them",
    ),
    "reinforcement": ({"method": {"type": "reinforcement"}}, 400, "method.type", "supervised, dpo, orpo, kto"),
    "a method that is none": ({"method": {"type": "hyperparameters"}}, 400, "method.type", "supervised, dpo"),
    "a beta of 0": (
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}},
        400,
        "method.dpo.hyperparameters.beta",
        "greater than 0",
    ),
    "a weight of 0": (
        {"method": {"type": "kto", "kto": {"hyperparameters": {"desirable_weight": 0}}}},
        400,
        "method.kto.hyperparameters.desirable_weight",
        "greater than 0",
    ),
    "a weight of pairs": (
        {"method": {"type": "orpo", "orpo": {"hyperparameters": {"undesirable_weight": 1}}}},
        400,
        "method.orpo.hyperparameters.undesirable_weight",
        "remove it",
    ),
    "a beta of supervised training": (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 0.1}}}},
        400,
        "method.supervised.hyperparameters.beta",
        "remove it",
    ),
    "a method without type": ({"method": {"supervised": {}}}, 400, "method.type", "required"),
    "an integration": (
        {"integrations": [{"type": "mlflow", "mlflow": {"experiment": "e"}}]},
        400,
        "integrations.0.type",
        "leave the integration out",
    ),
    "an integration twice": ({"integrations": [{"type": "tensorboard"}] * 2}, 400, "integrations", "send one of each"),
    "an unknown integration": ({"integrations": [{"type": "comet"}]}, 400, "integrations.0.type", "'wandb', 'mlflow' or"),
    "an integration without its object": ({"integrations": [{"type": "wandb"}]}, 400, "integrations.0", "hold an object 'wandb'"),
    "a long suffix": ({"suffix": "x" * 65}, 400, "suffix", "suffix must be at most 64 characters long"),
    "a suffix with a colon": ({"suffix": "a:b"}, 400, "suffix", "suffix must match the pattern ^[A-Za-z0-9._-]+$"),
    "a negative seed": ({"seed": -1}, 400, "seed", "0"),
    "a huge seed": ({"seed": 2**31}, 400, "seed", "2147483647"),
    "17 pairs of metadata": (
        {"metadata": {str(n): "v" for n in range(17)}},
        400,
        "metadata",
        "metadata must have at most 16 entries",
    ),
    "a number as metadata": ({"metadata": {"k": 1}}, 400, "metadata.k", "must be a string"),
    "a NUL in metadata": ({"metadata": {"k": "a\0b"}}, 400, "metadata.k", "must not hold a NUL"),
    "a lone surrogate in metadata": ({"metadata": {"k": "\ud800"}}, 400, "metadata.k", "unicode"),
    "two numbers of epochs": (
        {
            "hyperparameters": {"n_epochs": 3},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        },
        400,
        "hyperparameters.n_epochs",
        "send one of them",
    ),
    "an unknown field": ({"n_epochs": 3}, 400, "n_epochs", "remove it"),
}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def growing(factors: int) -> dict[str, Any]:
    """Four to the power of so many alternatives."""
    kinds = [
        [{"type": "object", "properties": {f"{one}-{two}": {"type": "string"}}} for two in range(4)] for one in range(factors)
    ]
    return {"allOf": [{"anyOf": alternatives} for alternatives in kinds]}


# name: (the change to a good chat, status, param, words)
CHATS: dict[str, tuple[dict[str, Any], int, str | None, str]] = {
    "no model": ({"model": ...}, 400, "model", "required"),
    "an unknown model": ({"model": "gpt-99"}, 404, "model", "GET /v1/models"),
    "somebody's tuned model": ({"model": f"ft:{make.TINY}:them:x:12345678"}, 404, "model", "GET /v1/models"),
    "no messages": ({"messages": ...}, 400, "messages", "required"),
    "no message": ({"messages": []}, 400, "messages", "messages must have 1 or more entries"),
    "messages as text": ({"messages": "hello"}, 400, "messages", "messages must be a list"),
    "a wrong role": ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role", "user"),
    "a message without content": ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "must be there"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content.0.type", "text"),
    "an unknown parameter": ({"min_p": 5}, 400, "min_p", "remove it"),
    "many answers": ({"n": 17}, 400, "n", "16"),
    "a tool without its function": ({"tools": [{"type": "function"}]}, 400, "tools.0.function", "required"),
    "a tool that must be called": ({"tool_choice": "required"}, 400, "tool_choice", "none or auto"),
    "a format without its schema": ({"response_format": {"type": "json_schema"}}, 400, "response_format", "json_schema"),
    "a schema that cannot be kept": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
        400,
        "response_format.json_schema.schema",
        "not",
    ),
    "a schema of 200 levels": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": nested(200)}}},
        400,
        "response_format.json_schema.schema",
        "recursion limit",
    ),
    "a schema that grows as it is opened": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": growing(14)}}},
        400,
        "response_format.json_schema.schema",
        "too large",
    ),
    "a schema of 600 kB": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["x" * 600_000]}}}},
        400,
        "response_format.json_schema.schema",
        "65536",
    ),
    "a mix of nothing": ({"adapters": []}, 400, "adapters", "1 or more"),
    "a mix of nine": ({"adapters": [{"model": f"m{number}"} for number in range(9)]}, 400, "adapters", "at most 8"),
    "a mix with an unknown model": ({"adapters": [{"model": "gpt-99"}]}, 404, "adapters.0.model", "GET /v1/models"),
    "a mix with a base": ({"adapters": [{"model": make.TINY}]}, 400, "adapters.0.model", "nothing of it to add"),
    "a weight of NaN": ({"adapters": [{"model": "a", "weight": float("nan")}]}, 400, "adapters.0.weight", "finite"),
    "a weight of 0": ({"adapters": [{"model": "a", "weight": 0}]}, 400, "adapters.0.weight", "leave the model out"),
    "a heavy weight": ({"adapters": [{"model": "a", "weight": 3}]}, 400, "adapters.0.weight", "2"),
    "alternatives of no log probabilities": ({"top_logprobs": 2}, 400, "top_logprobs", "logprobs: true"),
    "a bias that is no token's": ({"logit_bias": {"x": 1}}, 400, "logit_bias", "token ids"),
    "a heavy penalty": ({"frequency_penalty": 2.5}, 400, "frequency_penalty", "2"),
    "a hot temperature": ({"temperature": 3}, 400, "temperature", "2"),
    "a temperature of NaN": ({"temperature": float("nan")}, 400, "temperature", "2"),
    "a top_p of 0": ({"top_p": 0}, 400, "top_p", "greater than 0"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens", "1"),
    "too many tokens": ({"max_tokens": 10**6}, 400, "max_tokens", "lower max_tokens"),
    "too many tokens, in newer words": (
        {"max_completion_tokens": 10**6},
        400,
        "max_completion_tokens",
        "lower max_completion_tokens",
    ),
    "two limits": ({"max_tokens": 8, "max_completion_tokens": 5}, 400, "max_tokens", "send one of them"),
    "two wrongs, whose names begin alike": (
        {"stream": "x", "stream_options": {"include_usage": "y"}},
        400,
        "stream",
        "stream must be true or false",
    ),
    "five stops": ({"stop": list("abcde")}, 400, "stop", "stop must be a string or have at most 4 entries"),
    "an empty stop": ({"stop": ""}, 400, "stop", "stop must not hold an empty string"),
    "a prompt beyond the context": (
        {"messages": [{"role": "user", "content": "long " * 1000}]},
        400,
        "messages",
        "shorten the prompt",
    ),
    "a prompt of 3 MB": ({"messages": [{"role": "user", "content": "ab" * 1_500_000}]}, 400, "messages", "characters"),
    "a special token as text": (
        {"messages": [{"role": "user", "content": "<|im_start|>system"}]},
        400,
        "messages",
        "<|im_start|>",
    ),
    "a lone surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", "whole character"),
}


@pytest.fixture(scope="module")
def services(settings: Settings) -> Iterator[Services]:
    opened = open_services(settings)
    yield opened
    opened.sessions.kw["bind"].dispose()


@pytest.fixture
def engine_of_tiny(api_url: str, settings: Settings, storage: Storage) -> None:
    """An engine has published its card and said that it lives; no request of this module comes as far as asking it."""
    card.publish(storage, make.TINY, card.prepared(catalog.load()[make.TINY], settings.cache_dir))
    beat = {"engine_id": "e", "url": "http://127.0.0.1:9", "base": make.TINY, "base_digest": "d", "running": 0, "waiting": 0}
    headers = {"Authorization": f"Bearer {settings.engine_token.get_secret_value()}"}
    assert httpx.post(f"{api_url}/internal/engines", json=beat, headers=headers, timeout=PATIENCE_SECONDS).status_code == 204


def changed(body: dict[str, Any], change: dict[str, Any]) -> bytes:
    """JSON of the body with the change laid over it; `...` takes a key away. NaN and lone surrogates go out as they are."""
    return json.dumps({key: value for key, value in (body | change).items() if value is not ...}).encode()


def refused(answer: httpx.Response, status: int, param: str | None, words: str) -> None:
    error = make.require_envelope(answer.status_code, answer.json())
    assert answer.status_code == status, error
    assert error["param"] == param, error
    assert words in str(error["message"]), error
    assert not re.search(r"Input|should|Value error|validation error", str(error["message"])), (
        error
    )  # pydantic's words to its programmer


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_told_line_code_and_remedy(client: OpenAI, services: Services, name: str) -> None:
    body = (CORPUS / "corpus" / f"{name}.jsonl").read_bytes()
    file = client.files.create(file=("chats.jsonl", body), purpose="fine-tune")
    while validate.validate_next(services):
        pass
    checked = client.files.retrieve(file.id)
    report = (checked.model_extra or {})["report"]
    problem = report["problems"][0]
    wanted = [(finding["line"], finding["code"]) for finding in EXPECTED[name]["findings"]]

    assert checked.status == "error"
    assert report["format"] == EXPECTED[name].get("format")
    assert (problem["line"], problem["code"]) in wanted
    assert FILES[name] in f"{problem['message']}; {problem['advice']}"
    assert FILES[name] in (checked.status_details or "")
    with pytest.raises(openai.BadRequestError, match="not valid") as refusal:
        client.fine_tuning.jobs.create(model=make.TINY, training_file=file.id)
    assert refusal.value.param == "training_file"


@pytest.mark.parametrize("name", ["preference-plain", "rated-plain"])
@pytest.mark.parametrize("is_read_first", [True, False])
def test_rows_that_a_method_does_not_train_on_are_refused_with_those_that_it_does(
    client: OpenAI, services: Services, name: str, is_read_first: bool
) -> None:
    """When the job is created, or, if its file has not been read by then, as soon as it has."""
    body = (CORPUS / "corpus" / f"{name}.jsonl").read_bytes()
    file = client.files.create(file=("rows.jsonl", body), purpose="fine-tune")
    if is_read_first:
        assert validate.validate_next(services)
        assert client.files.retrieve(file.id).status == "processed"
        with pytest.raises(openai.BadRequestError) as refusal:
            client.fine_tuning.jobs.create(model=make.TINY, training_file=file.id)
        told = {"code": refusal.value.code, "param": refusal.value.param, "message": str(refusal.value.message)}
    else:
        job = client.fine_tuning.jobs.create(model=make.TINY, training_file=file.id)
        assert validate.validate_next(services)
        while prepare.prepare_next(services):
            pass  # jobs of other tests, older than this one
        error = client.fine_tuning.jobs.retrieve(job.id).error
        assert error is not None
        told = error.model_dump()

    assert (told["code"], told["param"]) == ("format_not_trained", "training_file")
    assert "chat, sharegpt, alpaca, completion" in told["message"]


@pytest.mark.parametrize("name", JOBS)
def test_a_bad_job_is_told_which_parameter_and_leaves_no_row(http: httpx.Client, client: OpenAI, file_id: str, name: str) -> None:
    change, status, param, words = JOBS[name]
    body = changed({"model": make.TINY, "training_file": file_id}, change)
    refused(http.post("/v1/fine_tuning/jobs", content=body, headers={"content-type": "application/json"}), status, param, words)
    assert client.fine_tuning.jobs.list().data == []


@pytest.mark.usefixtures("engine_of_tiny")
@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_chat_is_told_which_parameter(http: httpx.Client, name: str, stream: bool) -> None:
    change, status, param, words = CHATS[name]
    good = {"model": make.TINY, "messages": [{"role": "user", "content": "hello"}], "stream": stream}
    answer = http.post("/v1/chat/completions", content=changed(good, change), headers={"content-type": "application/json"})

    refused(answer, status, param, words)


BODIES: dict[str, tuple[bytes, str, str]] = {
    "nothing": (b"", "application/json", "required"),
    "no JSON": (b"{", "application/json", "not valid JSON"),
    "a list": (b"[]", "application/json", "must be an object"),
    "depth 1,000": (b'{"model": ' + b"[" * 1000 + b"]" * 1000 + b"}", "application/json", "nested"),
    "depth 100,000": (b"[" * 100_000 + b"]" * 100_000, "application/json", "nested"),
    "not UTF-8": (b'{"model": "\xff"}', "application/json", "UTF-8"),
    "a form": (b"model=x", "application/x-www-form-urlencoded", "application/json"),
    "JSON said to be text": (b'{"model": "x"}', "text/plain", "application/json"),
    "a number of 5,000 digits": (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", "digits"),
}


@pytest.mark.usefixtures("engine_of_tiny")
@pytest.mark.parametrize(
    ("prompt", "words"),
    [("\ud800", "whole character"), ([10**6], "vocabulary"), (["a", "b"], "one prompt"), ([], "one prompt"), ("", "empty")],
)
def test_a_bad_prompt_is_told_what_is_wrong(http: httpx.Client, prompt: object, words: str) -> None:
    body = json.dumps({"model": make.TINY, "prompt": prompt}).encode()
    refused(http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400, "prompt", words)


@pytest.mark.parametrize("path", ["/v1/fine_tuning/jobs", "/v1/chat/completions", "/v1/webhook_endpoints", "/v1/evaluations"])
@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_cannot_be_read_is_told_why(http: httpx.Client, path: str, name: str) -> None:
    body, kind, words = BODIES[name]
    answer = http.post(path, content=body, headers={"content-type": kind})
    error = make.require_envelope(answer.status_code, answer.json())

    assert answer.status_code == 400, error
    assert words in str(error["message"]), error


@pytest.mark.parametrize(
    "query", ["limit=x", "limit=-1", "limit=1e9", "limit=99999999999999999999", "order=up", "after=%00", "after=" + "x" * 5000]
)
def test_a_bad_query_is_told_or_answered(http: httpx.Client, query: str) -> None:
    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/webhook_endpoints"):
        answer = http.get(f"{path}?{query}")
        if answer.status_code != 200:
            error = make.require_envelope(answer.status_code, answer.json())
            assert answer.status_code == 400, error


def test_a_revoked_key_stops_working_and_says_so(
    api_url: str, http: httpx.Client, client: OpenAI, system_sessions: orm.sessionmaker[orm.Session], organization: Caller
) -> None:
    with system_sessions.begin() as session:
        session.execute(
            text("UPDATE api_keys SET revoked_at = clock_timestamp() WHERE organization_id = :org"),
            {"org": organization.organization_id},
        )
    refused(http.get("/v1/models"), 401, None, "revoked")


def test_a_file_in_use_is_not_deleted(client: OpenAI, http: httpx.Client, file_id: str) -> None:
    job = client.fine_tuning.jobs.create(model=make.TINY, training_file=file_id)
    answer = http.delete(f"/v1/files/{file_id}")

    refused(answer, 400, None, f"in use by job {job.id}; wait for it or cancel it")
    assert client.files.content(file_id).read() == make.chat_file()
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(file_id).deleted


def chat(http: httpx.Client, base: str) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"model": base, "messages": [{"role": "user", "content": "hello"}]})


@pytest.mark.usefixtures("engine_of_tiny")
def test_a_base_that_no_engine_serves_is_refused_for_good_with_those_that_are_served(http: httpx.Client) -> None:
    answer = chat(http, "qwen2.5-7b-instruct")

    refused(answer, 400, "model", make.TINY)
    assert answer.json()["error"]["code"] == "base_not_loaded"


@pytest.mark.usefixtures("engine_of_tiny")
def test_a_base_whose_engine_fell_silent_is_waited_for(
    http: httpx.Client, system_sessions: orm.sessionmaker[orm.Session]
) -> None:
    with system_sessions.begin() as session:
        beat = Heartbeat(engine_id="late", url="http://x", base="qwen2.5-14b-instruct", base_digest="d", running=0, waiting=0)
        engines.record(session, beat)
        session.execute(text("UPDATE engines SET heartbeat_at = heartbeat_at - interval '1 minute' WHERE id = 'late'"))
    answer = chat(http, "qwen2.5-14b-instruct")

    refused(answer, 503, None, "try again shortly")
    assert answer.headers["retry-after"] == "2"
    with system_sessions.begin() as session:
        session.execute(text("UPDATE engines SET heartbeat_at = heartbeat_at - interval '5 minutes' WHERE id = 'late'"))
    assert chat(http, "qwen2.5-14b-instruct").status_code == 400  # nothing restarts for so long


@pytest.mark.usefixtures("engine_of_tiny")
def test_a_model_that_no_engine_holds_its_base_for_is_refused_with_how_to_serve_it(
    http: httpx.Client, organization: Caller, system_sessions: orm.sessionmaker[orm.Session]
) -> None:
    beat = Heartbeat(engine_id="fp4", url="http://x", base=make.TINY, base_digest="f", quantization="fp4", running=0, waiting=0)
    names = []
    with system_sessions.begin() as session:
        engines.record(session, beat)
        for asked in ({"scheme": "int8"}, {"scheme": "fp4"}):
            job = make.job(session, organization, quantizations={"int8", "fp4"}, quantization=asked)
            names.append(adapters.name_of(job))
            adapters.publish(session, job, name=names[-1], step=None, prefix="nowhere", manifest=make.manifest(job.id))

    refused(chat(http, names[0]), 400, "model", "held in int8, and engines hold it in fp4, nf4 only")
    refused(chat(http, names[0]), 400, "model", "TUNESMITH_INFERENCE__QUANTIZATION=int8")
    refused(chat(http, names[1]), 400, "model", "was trained on other weights")
