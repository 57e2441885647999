from collections.abc import Iterator

import pytest
from sqlalchemy import delete, orm

from app.accounts.caller import Caller
from app.models import WebhookEndpoint
from tests.conftest import make_organization
from tests.webhooks.receiver import Receiver, running


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running() as made:
        yield made


@pytest.fixture
def organization(system_sessions: orm.sessionmaker[orm.Session]) -> Iterator[Caller]:
    """A fresh organization whose endpoints go with the test: the relay knows no tenants and would send what is left."""
    made = make_organization(system_sessions)
    yield made
    with system_sessions.begin() as session:
        session.execute(delete(WebhookEndpoint).where(WebhookEndpoint.organization_id == made.organization_id))
