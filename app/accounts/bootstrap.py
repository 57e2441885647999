"""The first organization of an installation, with the key that everything else starts from."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import orm, select

from app import db
from app.accounts import keys, people, users
from app.core.settings import Settings
from app.models import ApiKey, Project, User

OPERATOR = "operator@localhost"


def ensure_first_key(settings: Settings) -> str | None:
    """Create organization, project and key on an empty database and return the key; None if there is one already."""
    with system_session(settings) as session:
        if session.scalar(select(ApiKey.id).limit(1)) is not None:
            return None
        _, project = people.create_organization(session, name="Default", slug="default")
        return _key_of(session, project, settings)


def sign_in_link(settings: Settings, *, email: str | None = None) -> str:
    """The path of a page that signs this user in once; without an address the operator. Whoever may read the database's secrets
    may have it. Raises NotFound, or Conflict for one who is disabled."""
    with system_session(settings) as session:
        user = _operator(session) if email is None else people.find_user(session, email)
        return f"/sign-in/{users.make_link(session, user, pepper=settings.key_pepper.get_secret_value().encode())}"


def _operator(session: orm.Session) -> User:
    """The first one; made with the first link, since an earlier release had no users."""
    found = session.scalar(select(User).where(User.is_operator).order_by(User.created_at).limit(1))
    if found is None:
        project = session.scalars(select(Project).order_by(Project.created_at).limit(1)).one()
        mine = {"organization_id": project.organization_id, "project_id": project.id}
        found = users.create(session, **mine, email=OPERATOR, name="Operator", is_operator=True)
        session.flush()
    return found


def another_key(settings: Settings) -> str:
    """One more key for the first project, for whoever lost the first: only its hash was kept."""
    with system_session(settings) as session:
        return _key_of(session, session.scalars(select(Project).order_by(Project.created_at).limit(1)).one(), settings)


def _key_of(session: orm.Session, project: Project, settings: Settings) -> str:
    return keys.create(
        session,
        organization_id=project.organization_id,
        project_id=project.id,
        name="bootstrap",
        pepper=settings.key_pepper.get_secret_value().encode(),
    )


@contextmanager
def system_session(settings: Settings) -> Iterator[orm.Session]:
    sessions = db.open_sessions(settings.database.system_url, pool_size=1)
    try:
        with sessions.begin() as session:
            yield session
    finally:
        sessions.kw["bind"].dispose()
