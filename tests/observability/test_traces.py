"""One request, one trace: through the API, the relay, the workers and the engine, to a collector that is there."""

import secrets
import subprocess
import sys
import threading

import httpx
import pytest
import uvicorn
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from app.core import tracing
from app.core.settings import Settings, TracingSettings
from app.main import create_app
from tests import make
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from tests.evaluations import make as evaluations
from tests.observability.collector import Told, collecting
from tests.observability.conftest import Observed
from tests.webhooks.receiver import running

SECRET = "zanzibar"


def traceparent(trace_id: str, *, is_sampled: bool = True) -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-{'b' * 16}-{'01' if is_sampled else '00'}"}


def spans_of(observed: Observed, trace_id: str, *names: str) -> dict[str, Told]:
    """Those of the trace by name, once all of these have come."""
    eventually(lambda: set(names) <= {span.name for span in observed.collector.of_trace(trace_id)})
    return {span.name: span for span in observed.collector.of_trace(trace_id)}


def test_a_jobs_request_leads_to_its_adapter_in_one_trace(observed: Observed, user: OpenAI, trained: FineTuningJob) -> None:
    trace_id = secrets.token_hex(16)
    with running() as receiver:
        endpoint = user.webhooks.create(name="a", url=receiver.url, event_types=["fine_tuning.job.succeeded"])
        user.fine_tuning.jobs.create(
            model=make.TINY,
            training_file=trained.training_file,
            hyperparameters={"n_epochs": 1},
            seed=7,
            extra_headers=traceparent(trace_id),
        )
        names = (
            "POST /v1/fine_tuning/jobs",
            "ring",
            "prepare",
            "attempt",
            "fetch",
            "train",
            "checkpoint",
            "load",
            "steps",
            "publish",
            "webhook",
        )
        found = spans_of(observed, trace_id, *names)
        rings = [span for span in observed.collector.of_trace(trace_id) if span.name == "ring"]
        user.webhooks.delete(endpoint.id)

    request, attempt, train = found["POST /v1/fine_tuning/jobs"], found["attempt"], found["train"]
    assert request.parent_id == "b" * 16
    assert {ring.parent_id for ring in rings} <= {request.span_id, found["prepare"].span_id}
    assert found["prepare"].parent_id == found["webhook"].parent_id == attempt.parent_id == request.span_id
    assert {found[name].parent_id for name in ("fetch", "train", "publish")} == {attempt.span_id}
    assert {found[name].parent_id for name in ("checkpoint", "load", "steps")} == {train.span_id}
    assert {found[name].service for name in names} == {f"tunesmith-{name}" for name in ("api", "relay", "cpu", "train")}
    assert attempt.attributes["outcome"] == "succeeded" and attempt.attributes["attempt"] == "1"
    assert found["webhook"].attributes["is_delivered"] == "True"
    assert found["steps"].seconds + found["load"].seconds <= train.seconds <= attempt.seconds


def test_a_chat_is_one_trace_through_gateway_and_engine(observed: Observed, user: OpenAI, trained: FineTuningJob) -> None:
    trace_id = secrets.token_hex(16)
    user.chat.completions.create(
        model=str(trained.fine_tuned_model),
        messages=[{"role": "user", "content": SECRET}],
        max_tokens=4,
        extra_headers=traceparent(trace_id),
    )
    parts = ("adapters", "queue", "prefill", "decode")
    found = spans_of(observed, trace_id, "POST /v1/chat/completions", "chat", *parts)

    assert found["chat"].parent_id == found["POST /v1/chat/completions"].span_id
    assert {found[name].parent_id for name in parts} == {found["chat"].span_id}
    assert found["chat"].service == "tunesmith-engine"
    assert int(found["prefill"].attributes["tokens"]) > 0
    assert SECRET not in str(observed.collector.spans)


def test_an_evaluation_is_one_trace(observed: Observed, user: OpenAI, trained: FineTuningJob) -> None:
    file = user.files.create(file=("rows.jsonl", evaluations.sums(2)), purpose="evals")
    made = evaluations.create(user, file.id, graders=[evaluations.EXACT], sampling={"max_tokens": 4})

    def of_it() -> list[Told]:
        return [span for span in observed.collector.spans if span.attributes.get("evaluation_id") == made["id"]]

    eventually(of_it)
    evaluate = of_it()[0]
    found = spans_of(observed, evaluate.trace_id, "evaluate", "chat")

    assert (evaluate.name, evaluate.parent_id, evaluate.service) == ("evaluate", "", "tunesmith-cpu")
    assert found["chat"].parent_id == evaluate.span_id


def test_an_api_that_ends_has_told_of_its_last_request(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_tracer", None)
    monkeypatch.setattr(tracing, "_provider", None)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    with collecting() as collector:
        traced, port = settings.model_copy(update={"tracing": TracingSettings(endpoint=collector.url)}), make.free_port()
        server = uvicorn.Server(uvicorn.Config(create_app(traced), port=port, log_config=None))
        thread = threading.Thread(target=server.run)
        thread.start()
        eventually(lambda: server.started)
        httpx.get(f"http://127.0.0.1:{port}/v1/models", verify=False, timeout=PATIENCE_SECONDS)
        server.should_exit = True
        thread.join()

        assert [span.service for span in collector.spans] == ["tunesmith-api"]


def test_a_refusal_is_told_by_its_status_and_not_by_its_words(observed: Observed, user: OpenAI) -> None:
    trace_id = secrets.token_hex(16)
    headers = {"Authorization": f"Bearer {user.api_key}", **traceparent(trace_id)}
    httpx.get(f"{observed.stack.base_url}/files/{SECRET}", headers=headers, verify=False, timeout=PATIENCE_SECONDS)
    found = spans_of(observed, trace_id, "GET /v1/files/{file_id}")

    assert found["GET /v1/files/{file_id}"].attributes["status"] == "404"
    assert SECRET not in str(found)


def test_who_does_not_want_to_be_traced_is_not(observed: Observed, user: OpenAI) -> None:
    unwanted, wanted = secrets.token_hex(16), secrets.token_hex(16)
    user.models.list(extra_headers=traceparent(unwanted, is_sampled=False))
    user.models.list(extra_headers=traceparent(wanted))
    spans_of(observed, wanted, "GET /v1/models")

    assert observed.collector.of_trace(unwanted) == []


def test_without_a_collector_nothing_is_imported_and_nothing_told() -> None:
    program = (
        "import sys; from app.core import tracing; from app.core.settings import TracingSettings; "
        "tracing.configure('a', TracingSettings())\n"
        "with tracing.span('a'): assert tracing.current() is None and tracing.headers() == {}\n"
        "sys.exit('opentelemetry' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_an_error_leaves_its_type_and_what_cannot_be_read_begins_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_tracer", None)
    monkeypatch.setattr(tracing, "_provider", None)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with collecting() as collector:
        tracing.configure("test", TracingSettings(endpoint=collector.url))
        with pytest.raises(ValueError, match=SECRET), tracing.span("work", parent="no traceparent"):
            raise ValueError(SECRET)
        eventually(lambda: collector.spans)
    (span,) = collector.spans

    assert (span.name, span.parent_id, span.error) == ("work", "", "ValueError")
    assert SECRET not in str(span)
