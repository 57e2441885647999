"""What Prometheus reads of a whole stack that has trained a job and answered with its model."""

import asyncio

import httpx
import pytest
from openai import NotFoundError, OpenAI
from openai.types.fine_tuning import FineTuningJob
from prometheus_client.parser import text_string_to_metric_families

from app.core.settings import MetricsSettings, Settings
from app.main import create_app
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from tests.observability.conftest import PROCESSES, Observed

SILENCE = "tunesmith_worker_broker_silence_seconds"


def read(observed: Observed, process: str, name: str, **labels: str) -> float | None:
    """The sum of the samples with this name and these labels; None where there is none."""
    found = [
        sample.value
        for family in text_string_to_metric_families(observed.metrics_of(process))
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return sum(found) if found else None


@pytest.mark.parametrize("process", PROCESSES)
def test_every_process_tells_of_itself(observed: Observed, process: str) -> None:
    assert (read(observed, process, "process_resident_memory_bytes") or 0) > 0


def test_no_stranger_reads_them(observed: Observed, user: OpenAI) -> None:
    for process in ("api", "engine"):
        for headers in ({}, {"Authorization": f"Bearer {user.api_key}"}):
            answer = httpx.get(observed.url_of(process), headers=headers, verify=False, timeout=PATIENCE_SECONDS)
            assert answer.status_code == 401
    engines_own = {"Authorization": f"Bearer {observed.state['engine_token']}"}
    told = {
        process: httpx.get(observed.url_of(process), headers=engines_own, verify=False, timeout=PATIENCE_SECONDS)
        for process in ("api", "engine")
    }
    assert {process: answer.status_code for process, answer in told.items()} == {"api": 401, "engine": 200}


def test_an_api_without_a_token_of_theirs_tells_nobody(settings: Settings) -> None:
    async def asked() -> httpx.Response:
        app = create_app(settings.model_copy(update={"metrics": MetricsSettings()}))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api") as client:
            return await client.get("/metrics", headers={"Authorization": "Bearer "})

    assert asyncio.run(asked()).status_code == 404


def test_requests_are_counted_by_route_and_never_by_id(observed: Observed, trained: FineTuningJob) -> None:
    route = "/v1/fine_tuning/jobs/{job_id}"

    assert (read(observed, "api", "tunesmith_http_requests_total", route=route, status="200") or 0) > 0
    assert (read(observed, "api", "tunesmith_http_request_seconds_count", route=route) or 0) > 0
    assert (read(observed, "api", "tunesmith_http_request_bytes_total", route="/v1/files") or 0) > 100
    assert trained.id not in observed.metrics_of("api")


def test_inventing_addresses_and_methods_makes_no_series(observed: Observed, trained: FineTuningJob) -> None:
    url = observed.stack.base_url.removesuffix("/v1")
    for number, method in enumerate(("PROPFIND", "REPORT", "UNLOCK")):
        httpx.request(method, f"{url}/nowhere/{number}", verify=False, timeout=PATIENCE_SECONDS)
    told = observed.metrics_of("api")

    assert "PROPFIND" not in told and "nowhere" not in told
    assert read(observed, "api", "tunesmith_http_requests_total", method="other", status="404") == 3


def test_the_gateway_counts_tokens_and_what_it_refuses(observed: Observed, user: OpenAI, trained: FineTuningJob) -> None:
    with pytest.raises(NotFoundError):
        user.chat.completions.create(model="ft:nobody", messages=[{"role": "user", "content": "a"}])

    assert (read(observed, "api", "tunesmith_gateway_tokens_total", direction="in") or 0) > 0
    assert (read(observed, "api", "tunesmith_gateway_tokens_total", direction="out") or 0) > 0
    assert (read(observed, "api", "tunesmith_gateway_first_token_seconds_count") or 0) > 0
    assert read(observed, "api", "tunesmith_gateway_rejections_total", reason="model_not_found") == 1


def test_the_relay_tells_how_the_database_stands(observed: Observed, trained: FineTuningJob) -> None:
    def stands(name: str, **labels: str) -> float | None:
        return read(observed, "relay", name, **labels)

    eventually(lambda: stands("tunesmith_jobs", state="succeeded"))
    eventually(lambda: stands("tunesmith_processes_live") == 3)
    assert stands("tunesmith_database_up") == 1
    assert (stands("tunesmith_job_attempts_total") or 0) >= 1
    assert stands("tunesmith_queue_depth", queue="cpu") == 0
    assert stands("tunesmith_engines_live") == 1
    assert {stands("tunesmith_processes_live", kind=kind) for kind in ("relay", "cpu", "train")} == {1}
    assert (stands("tunesmith_relay_rings_total", result="heard") or 0) >= 2
    assert (stands("tunesmith_relay_loop_age_seconds", loop="sweep") or 99) < 30
    assert (stands("tunesmith_relay_broker_age_seconds", what="reached") or 99) < 30


def test_workers_tell_what_they_did_and_that_the_broker_answers(observed: Observed, trained: FineTuningJob) -> None:
    assert read(observed, "train", "tunesmith_worker_attempts_ended_total", outcome="succeeded")
    assert (read(observed, "train", "tunesmith_worker_steps_total") or 0) > 0
    assert (read(observed, "train", "tunesmith_worker_trained_tokens_total") or 0) > 0
    assert (read(observed, "train", "tunesmith_worker_checkpoint_upload_seconds_count") or 0) > 0
    assert (read(observed, "train", "tunesmith_worker_trainer_peak_bytes") or 0) > 2**20
    for worker in ("cpu", "train"):
        eventually(lambda worker=worker: (read(observed, worker, SILENCE) or 9) < 3)  # type: ignore[misc]


def test_the_engine_tells_of_tokens_and_adapters(observed: Observed, trained: FineTuningJob) -> None:
    def told(name: str, **labels: str) -> float:
        return read(observed, "engine", name, **labels) or 0

    assert told("tunesmith_engine_prompt_tokens_total") > 0
    assert told("tunesmith_engine_generated_tokens_total") > 0
    assert told("tunesmith_engine_first_token_seconds_count") > 0
    assert told("tunesmith_engine_batch_sequences_count") > 0
    assert told("tunesmith_engine_adapters", tier="slots") == 1
    assert told("tunesmith_engine_adapter_load_seconds_count", result="loaded") >= 1
    assert told("tunesmith_engine_cache_pages", kind="all") > 0


def test_a_broker_that_falls_silent_is_seen_at_every_worker(observed: Observed) -> None:
    (valkey,) = observed.stack.children("valkey-server")
    valkey.suspend()
    try:
        for worker in ("cpu", "train"):
            eventually(lambda worker=worker: (read(observed, worker, SILENCE) or 0) > 3)  # type: ignore[misc]
    finally:
        valkey.resume()
    for worker in ("cpu", "train"):
        eventually(lambda worker=worker: (read(observed, worker, SILENCE) or 9) < 3)  # type: ignore[misc]
