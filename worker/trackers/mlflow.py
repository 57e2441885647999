"""MLflow by its REST API: a few requests, of which each may be repeated. Its client library would weigh tens of megabytes.

A run is found again by its tag, so that there is one however often its making is tried. A metric said twice, with the same
step, time and value, is one row of the server's database.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Self

import httpx

from app.core.settings import MlflowSettings
from app.jobs import tracking
from app.jobs.tracking import Due, Ending, Run
from app.models import JobState
from worker.services import Services
from worker.trackers.failure import TrackerFailed

JOB_TAG: Final = "tunesmith.job_id"
METRICS_AT_ONCE, PARAMS_AT_ONCE, PARAM_CHARACTERS, TAG_CHARACTERS = 1000, 100, 500, 5000  # what every server takes
TIMEOUT_SECONDS = 20.0
STATUSES: Final = {JobState.SUCCEEDED: "FINISHED", JobState.FAILED: "FAILED", JobState.CANCELLED: "KILLED"}


async def tell(due: Due, to: Services) -> Run:
    """Raises TrackerFailed."""
    settings = to.settings.mlflow
    async with _Server(settings) as server:
        run = due.run or await _begin(server, due, settings)
        metrics = [
            {"key": name, "value": value, "timestamp": _milliseconds(point.at), "step": point.step}
            for point in due.points
            for name, value in point.metrics.items()
        ]
        for chunk in _chunks(metrics, METRICS_AT_ONCE):
            await server.post("runs/log-batch", run_id=run.id, metrics=chunk)
        if due.ending:
            await _end(server, run, due.ending)
        return run


async def _begin(server: "_Server", due: Due, settings: MlflowSettings) -> Run:
    experiment_id = await _experiment(server, due.asked["experiment"])
    named = f"tags.`{JOB_TAG}` = '{due.job_id}'"
    found = await server.post("runs/search", experiment_ids=[experiment_id], filter=named, max_results=1)
    if runs := found.get("runs"):
        run_id = runs[0]["info"]["run_id"]
    else:
        made = await server.post(
            "runs/create",
            experiment_id=experiment_id,
            run_name=due.asked.get("run_name") or due.job_id,
            start_time=_milliseconds(due.started_at),
            tags=_pairs({**due.asked.get("tags", {}), JOB_TAG: due.job_id}),
        )
        run_id = made["run"]["info"]["run_id"]
    params = _pairs({name: value[:PARAM_CHARACTERS] for name, value in tracking.flat(due.config).items()})
    for chunk in _chunks(params, PARAMS_AT_ONCE):
        await server.post("runs/log-batch", run_id=run_id, params=chunk)
    url = f"{settings.ui_url}/#/experiments/{experiment_id}/runs/{run_id}" if settings.ui_url else None
    return Run(run_id, url)


async def _experiment(server: "_Server", name: str) -> str:
    """The id of this experiment, which is made if it is not there."""
    known = await server.get("experiments/get-by-name", unless="RESOURCE_DOES_NOT_EXIST", experiment_name=name)
    if known is None:  # another job may make it now
        made = await server.post("experiments/create", unless="RESOURCE_ALREADY_EXISTS", name=name)
        if "experiment_id" in made:
            return str(made["experiment_id"])
        known = await server.get("experiments/get-by-name", experiment_name=name)
    return str(known["experiment"]["experiment_id"])


async def _end(server: "_Server", run: Run, ending: Ending) -> None:
    about = {**ending.summary, **({"error": ending.error} if ending.error else {})}
    tags = {f"tunesmith.{name}": str(value)[:TAG_CHARACTERS] for name, value in about.items()}
    await server.post("runs/log-batch", run_id=run.id, tags=_pairs(tags))
    await server.post("runs/update", run_id=run.id, status=STATUSES[JobState(ending.state)], end_time=_milliseconds(ending.at))


class _Server:
    """Requests, and what they say of what went wrong."""

    def __init__(self, settings: MlflowSettings) -> None:
        token, password = settings.token.get_secret_value(), settings.password.get_secret_value()
        self._client = httpx.AsyncClient(
            base_url=f"{settings.tracking_uri}/api/2.0/mlflow/",
            timeout=TIMEOUT_SECONDS,
            auth=(settings.username, password) if settings.username and not token else None,
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._client.aclose()

    async def post(self, path: str, *, unless: str | None = None, **body: Any) -> Any:
        return await self._ask("POST", path, unless, json=body) or {}

    async def get(self, path: str, *, unless: str | None = None, **query: str) -> Any:
        return await self._ask("GET", path, unless, params=query)

    async def _ask(self, method: str, path: str, unless: str | None, **content: Any) -> Any:
        """The answer; None where the server refuses with the code `unless`. Raises TrackerFailed."""
        try:
            response = await self._client.request(method, path, **content)
            answer = response.json()
        except httpx.HTTPError as error:
            raise TrackerFailed("it does not answer", detail=f"{path}: {type(error).__name__}: {error}") from None
        except ValueError:
            raise TrackerFailed(f"it answers {response.status_code}, and not as an MLflow server does") from None
        if response.is_success:
            return answer
        code = answer.get("error_code") if isinstance(answer, dict) else None
        if code is not None and code == unless:
            return None
        said = f"it answers {response.status_code}" + (f" ({code})" if code else "")
        raise TrackerFailed(said, detail=f"{path}: {response.status_code} {response.text}"[:500])


def _pairs(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in values.items()]


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _milliseconds(instant: datetime) -> int:
    return round(instant.timestamp() * 1000)
