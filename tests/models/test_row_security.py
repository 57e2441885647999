"""The second wall: even a query that forgot its organization shows nobody else's rows."""

import pytest
from sqlalchemy import func, orm, select, text
from sqlalchemy.exc import ProgrammingError

from app import db
from app.accounts.caller import Caller
from app.models import Job, OutboxMessage, Table
from tests import make
from tests.conftest import make_organization

Sessions = orm.sessionmaker[orm.Session]
TENANT_TABLES = [table for table in Table.metadata.sorted_tables if "organization_id" in table.columns]


def test_the_api_sees_its_organizations_rows_and_no_others(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller
) -> None:
    stranger = make_organization(system_sessions)
    with system_sessions.begin() as session:
        mine, theirs = (make.queued_job(session, caller) for caller in (organization, stranger))
    with api_sessions.begin() as session:
        db.use_organization(session, organization.organization_id)
        assert session.scalars(select(Job.id)).all() == [mine.id]
        changed = session.execute(text("UPDATE jobs SET suffix = 'stolen' WHERE id = :id"), {"id": theirs.id})
        assert changed.rowcount == 0  # type: ignore[attr-defined]  # a cursor result, whatever the stub says


def test_without_an_organization_the_api_sees_nothing(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller
) -> None:
    with system_sessions.begin() as session:
        make.queued_job(session, organization)
    for _ in range(2):  # the second time on a connection that once had one
        with api_sessions.begin() as session:
            for table in TENANT_TABLES:
                if table.name == "queue_shares":  # it is told places, and never shares
                    assert not session.scalar(text("SELECT has_table_privilege('queue_shares', 'SELECT')"))
                    continue
                assert session.scalar(select(func.count()).select_from(table)) == 0, table.name
        with api_sessions.begin() as session:
            db.use_organization(session, organization.organization_id)
            session.execute(select(Job.id))


def test_a_row_for_somebody_else_cannot_be_written(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller
) -> None:
    stranger = make_organization(system_sessions)
    with pytest.raises(ProgrammingError, match="row-level security"), api_sessions.begin() as session:
        db.use_organization(session, organization.organization_id)
        make.uploaded_file(session, stranger)


def test_the_api_may_ask_the_relay_but_not_read_what_others_asked(api_sessions: Sessions) -> None:
    with pytest.raises(ProgrammingError, match="permission denied"), api_sessions.begin() as session:
        session.execute(select(OutboxMessage.id))


def test_every_tenant_table_is_secured(system_sessions: Sessions) -> None:
    with system_sessions.begin() as session:
        rows = session.execute(text("SELECT relname FROM pg_class WHERE relrowsecurity AND relforcerowsecurity"))
        secured = {row.relname for row in rows}

    assert {table.name for table in TENANT_TABLES} | {"organizations", "projects"} == secured
