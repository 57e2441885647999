"""Every route that names a thing, asked for somebody else's thing: it does not exist, and nothing changes."""

import httpx
import pytest
from fastapi.routing import APIRoute
from openai import OpenAI
from sqlalchemy import orm, select

from app.accounts.caller import Caller
from app.adapters import routes as adapters
from app.files import routes as files
from app.jobs import routes as jobs
from app.models import Adapter, File, Job, Table, WebhookEndpoint
from app.webhooks import routes as webhooks
from tests import make

ROUTES = [
    (method, route.path)
    for room in (files, jobs, adapters, webhooks)
    for route in room.router.routes
    if isinstance(route, APIRoute) and "{" in route.path
    for method in sorted(route.methods)
]


@pytest.fixture
def theirs(client: OpenAI, system_sessions: orm.sessionmaker[orm.Session], organization: Caller) -> dict[str, str]:
    """One of each thing, of an organization that does not ask."""
    endpoint = client.webhooks.create(name="a", url="http://127.0.0.1:9/", event_types=["fine_tuning.job.failed"])
    with system_sessions.begin() as session:
        job = make.queued_job(session, organization)
        make.complete(session, make.claim(session, job))
        assert job.fine_tuned_model is not None
        return {
            "file_id": job.training_file_id,
            "job_id": job.id,
            "model:path": job.fine_tuned_model,
            "endpoint_id": endpoint.id,
        }


def snapshot(session: orm.Session, caller: Caller) -> list[object]:
    tables: list[type[Table]] = [File, Job, Adapter, WebhookEndpoint]
    rows = []
    for table in tables:
        found = session.execute(select(table.__table__).where(table.__table__.c.organization_id == caller.organization_id))
        rows += sorted(map(str, found))
    return list(rows)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_anothers_id_is_not_found(
    api_url: str,
    stranger: OpenAI,
    theirs: dict[str, str],
    method: str,
    path: str,
    system_sessions: orm.sessionmaker[orm.Session],
    organization: Caller,
) -> None:
    for name, value in theirs.items():
        path = path.replace(f"{{{name}}}", value)
    assert "{" not in path
    with system_sessions() as session:
        before = snapshot(session, organization)
    body = {"json": {"name": "stolen"}} if method == "POST" else {}
    answer = httpx.request(method, api_url + path, headers={"Authorization": f"Bearer {stranger.api_key}"}, **body)  # type: ignore[arg-type]

    assert answer.status_code == 404, answer.text
    with system_sessions() as session:
        assert snapshot(session, organization) == before
