"""Every route, asked for every id of somebody else: it does not exist, and nothing changes."""

import re
from collections.abc import Iterator

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

OWNED = [table for table in Table.metadata.sorted_tables if "organization_id" in table.c]


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
BODIES = {"/v1/model_aliases/{name}": {"model": make.TINY}}


@pytest.fixture
def theirs(client: OpenAI, system_sessions: orm.sessionmaker[orm.Session], organization: Caller) -> list[str]:
    """An id of each thing, of an organization that does not ask."""
    endpoint = client.webhooks.create(name="a", url="http://127.0.0.1:9/", event_types=["fine_tuning.job.failed"])
    with system_sessions.begin() as session:
        job = make.queued_job(session, organization)
        lease = make.claim(session, job)
        make.checkpoint(session, lease)
        make.complete(session, lease)
        alias = aliases.point(session, organization, "theirs", model=str(job.fine_tuned_model), job_id=job.id)
        sweep = make.sweep(session, organization)
        evaluation, sample = make.evaluation(session, organization, str(job.fine_tuned_model))
    (event, *_) = client.fine_tuning.jobs.list_events(job.id).data
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id).data
    models = [str(job.fine_tuned_model), checkpoint.fine_tuned_model_checkpoint]
    ids = [job.training_file_id, str(job.result_file_id), job.id, event.id, checkpoint.id, endpoint.id, organization.project_id]
    return [*ids, evaluation.id, sample, sweep.id, *models, alias.id, alias.name]


def rows_of(session: orm.Session, caller: Caller) -> list[str]:
    found = [session.execute(select(table).where(table.c.organization_id == caller.organization_id)) for table in OWNED]
    return sorted(str(row) for rows in found for row in rows)


@pytest.fixture
def unchanged(theirs: list[str], system_sessions: orm.sessionmaker[orm.Session], organization: Caller) -> Iterator[None]:
    """After the test their rows are what they were."""
    with system_sessions() as session:
        before = rows_of(session, organization)
    yield
    with system_sessions() as session:
        assert rows_of(session, organization) == before


def ask(api_url: str, key: str, method: str, path: str, body: object) -> httpx.Response:
    return httpx.request(method, api_url + path, headers={"Authorization": f"Bearer {key}"}, json=body, verify=False)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("method", "path"), NAMING)
def test_anothers_id_is_not_found(api_url: str, stranger: OpenAI, theirs: list[str], method: str, path: str) -> None:
    for id_ in theirs:
        body = BODIES.get(path, {"name": "stolen"}) if method == "POST" else None
        answer = ask(api_url, stranger.api_key, method, re.sub(r"\{[^}]+\}", id_, path), body)
        assert answer.status_code == 404, answer.text
        make.require_envelope(404, answer.json())


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("path", "field", "rest"), IN_BODIES)
def test_anothers_id_in_a_body_is_not_found(
    api_url: str,
    stranger: OpenAI,
    theirs: list[str],
    path: str,
    field: str,
    rest: dict[str, object],
) -> None:
    for id_ in theirs:
        answer = ask(api_url, stranger.api_key, "POST", path, {**rest, field: id_})
        assert answer.status_code == 404, answer.text
        assert make.require_envelope(404, answer.json())["param"] == field


@pytest.mark.parametrize(
    "path", [path for method, path in routes() if method == "GET" and path.startswith("/v1/") and "{" not in path]
)
def test_anothers_id_as_a_cursor_shows_nothing_of_theirs(api_url: str, stranger: OpenAI, theirs: list[str], path: str) -> None:
    for id_ in theirs:
        answer = ask(api_url, stranger.api_key, "GET", f"{path}?after={id_}&order=asc", None)
        assert answer.status_code == (400 if path in NO_LISTS else 200), answer.text
        assert not [theirs_id for theirs_id in theirs if theirs_id in answer.text]


def test_anothers_job_is_not_compared(api_url: str, stranger: OpenAI, theirs: list[str]) -> None:
    answer = ask(api_url, stranger.api_key, "GET", f"/v1/fine_tuning/jobs/compare?ids={','.join(theirs)}", None)
    error = make.require_envelope(404, answer.json())
    assert (answer.status_code, error["param"]) == (404, "ids") and all(id_ in str(error["message"]) for id_ in theirs)


def test_there_is_something_to_steal(
    theirs: list[str], system_sessions: orm.sessionmaker[orm.Session], organization: Caller
) -> None:
    """Else the tests above compare nothing with nothing."""
    with system_sessions() as session:
        held = {
            table.name
            for table in OWNED
            if session.execute(select(table).where(table.c.organization_id == organization.organization_id)).first()
        }
    things = {"files", "jobs", "job_events", "job_checkpoints", "adapters", "webhook_endpoints"}
    assert held >= things | {"evaluations", "evaluation_samples", "sweeps", "model_aliases", "model_alias_changes"}
    assert len(set(theirs)) == len(theirs)
