"""Every route, asked for every id of somebody else: it does not exist, and nothing changes."""

import re
from collections.abc import Iterator
from functools import cache

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import orm, select

from app.accounts.caller import Caller
from app.adapters import aliases
from app.core.settings import Settings
from app.main import create_app
from app.models import Table
from tests import make
from tests.conftest import make_key, make_organization, sdk
from tests.embedded.patience import PATIENCE_SECONDS

Sessions = orm.sessionmaker[orm.Session]

OWNED = [table for table in Table.metadata.sorted_tables if "organization_id" in table.c]


@cache
def routes() -> list[tuple[str, str]]:
    """As the API publishes them, so that a new one is asked too."""
    app = create_app(Settings(key_pepper="any", engine_token="any"))  # type: ignore[arg-type]
    return [(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods]


NAMING = [(method, path) for method, path in routes() if "{" in path]
NO_LISTS = ("/v1/fine_tuning/jobs/compare",)  # wants to be told of what
# what names a thing in its body: the field, and what else the body must hold
IN_BODIES = [
    ("/v1/fine_tuning/jobs", "training_file", {"model": make.TINY}),
    ("/v1/fine_tuning/jobs", "continue_from", {"model": make.TINY, "training_file": "file-any"}),
    ("/v1/fine_tuning/sweeps", "training_file", {"model": make.TINY, "grid": {"seed": [1]}, "training": {"validation_split": 2}}),
    ("/v1/evaluations", "file", {"models": [make.TINY]}),
    ("/v1/chat/completions", "model", {"messages": [{"role": "user", "content": "a"}]}),
    ("/v1/completions", "model", {"prompt": "a"}),
    ("/v1/model_aliases", "model", {"name": "mine"}),
]
# what the body of a POST must hold to be understood, where it is not a name
BODIES: dict[str, dict[str, object]] = {
    "/v1/model_aliases/{name}": {"model": make.TINY},
    "/v1/uploads/{upload_id}/complete": {"part_ids": ["part_any"]},
    "/v1/webhook_endpoints/{endpoint_id}/rotate_secret": {},
    "/v1/webhook_endpoints/{endpoint_id}/test": {"event_type": "fine_tuning.job.failed"},
    "/v1/webhook_endpoints/{endpoint_id}/replay": {"since": 0},
}


@pytest.fixture(scope="module")
def owner(system_sessions: Sessions) -> Caller:
    """Of an organization that does not ask."""
    return make_organization(system_sessions)


@pytest.fixture(scope="module")
def stranger(api_url: str, settings: Settings, system_sessions: Sessions) -> Iterator[httpx.Client]:
    """Of another one, which asks for all of it."""
    key = make_key(system_sessions, settings, make_organization(system_sessions))
    with httpx.Client(
        base_url=api_url, headers={"Authorization": f"Bearer {key}"}, verify=False, timeout=PATIENCE_SECONDS
    ) as made:
        yield made


@pytest.fixture(scope="module")
def theirs(api_url: str, settings: Settings, system_sessions: Sessions, owner: Caller) -> list[str]:
    """An id of each thing that the owner has."""
    with sdk(api_url, make_key(system_sessions, settings, owner)) as client:
        return _owned(client, system_sessions, owner)


def _owned(client: OpenAI, sessions: Sessions, owner: Caller) -> list[str]:
    upload = client.uploads.create(bytes=2, filename="a", mime_type="text/jsonl", purpose="fine-tune")
    part = client.uploads.parts.create(upload.id, data=b"a")
    endpoint = client.webhooks.create(name="a", url="http://127.0.0.1:9/", event_types=["fine_tuning.job.failed"])
    with sessions.begin() as session:
        job = make.queued_job(session, owner)
        lease = make.claim(session, job)
        make.checkpoint(session, lease)
        make.complete(session, lease)
        delivery = make.delivery(session, owner, endpoint.id)
        alias = aliases.point(session, owner, "theirs", model=str(job.fine_tuned_model), job_id=job.id)
        sweep = make.sweep(session, owner)
        evaluation, sample = make.evaluation(session, owner, str(job.fine_tuned_model))
    (event, *_) = client.fine_tuning.jobs.list_events(job.id).data
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id).data
    models = [str(job.fine_tuned_model), checkpoint.fine_tuned_model_checkpoint]
    ids = [job.training_file_id, str(job.result_file_id), job.id, event.id, checkpoint.id, endpoint.id, owner.project_id]
    return [*ids, delivery.id, evaluation.id, sample, sweep.id, *models, alias.id, alias.name, upload.id, part.id]


def rows_of(session: orm.Session, caller: Caller) -> list[str]:
    found = [session.execute(select(table).where(table.c.organization_id == caller.organization_id)) for table in OWNED]
    return sorted(str(row) for rows in found for row in rows)


@pytest.fixture
def unchanged(theirs: list[str], system_sessions: Sessions, owner: Caller) -> Iterator[None]:
    """After the test their rows are what they were."""
    with system_sessions() as session:
        before = rows_of(session, owner)
    yield
    with system_sessions() as session:
        assert rows_of(session, owner) == before


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("method", "path"), NAMING)
def test_anothers_id_is_not_found(stranger: httpx.Client, theirs: list[str], method: str, path: str) -> None:
    for id_ in theirs:
        body = BODIES.get(path, {"name": "stolen"}) if method == "POST" else None
        answer = stranger.request(method, re.sub(r"\{[^}]+\}", id_, path), json=body)
        assert answer.status_code == 404, answer.text
        make.require_envelope(404, answer.json())


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("path", "field", "rest"), IN_BODIES)
def test_anothers_id_in_a_body_is_not_found(
    stranger: httpx.Client,
    theirs: list[str],
    path: str,
    field: str,
    rest: dict[str, object],
) -> None:
    for id_ in theirs:
        answer = stranger.post(path, json={**rest, field: id_})
        assert answer.status_code == 404, answer.text
        assert make.require_envelope(404, answer.json())["param"] == field


@pytest.mark.parametrize(
    "path", [path for method, path in routes() if method == "GET" and path.startswith("/v1/") and "{" not in path]
)
def test_anothers_id_as_a_cursor_shows_nothing_of_theirs(stranger: httpx.Client, theirs: list[str], path: str) -> None:
    for id_ in theirs:
        answer = stranger.get(f"{path}?after={id_}&order=asc")
        assert answer.status_code == (400 if path in NO_LISTS else 200), answer.text
        assert not [theirs_id for theirs_id in theirs if theirs_id in answer.text]


def test_anothers_job_is_not_compared(stranger: httpx.Client, theirs: list[str]) -> None:
    answer = stranger.get(f"/v1/fine_tuning/jobs/compare?ids={','.join(theirs)}")
    error = make.require_envelope(404, answer.json())
    assert (answer.status_code, error["param"]) == (404, "ids") and all(id_ in str(error["message"]) for id_ in theirs)


def test_there_is_something_to_steal(theirs: list[str], system_sessions: Sessions, owner: Caller) -> None:
    """Else the tests above compare nothing with nothing."""
    with system_sessions() as session:
        held = {
            table.name
            for table in OWNED
            if session.execute(select(table).where(table.c.organization_id == owner.organization_id)).first()
        }
    things = {"files", "uploads", "upload_parts", "jobs", "job_events", "job_checkpoints", "adapters"}
    things |= {"webhook_endpoints", "webhook_deliveries"}
    assert held >= things | {"evaluations", "evaluation_samples", "sweeps", "model_aliases", "model_alias_changes"}
    assert len(set(theirs)) == len(theirs)
