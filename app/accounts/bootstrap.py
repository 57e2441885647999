"""The first organization of an installation, with the key that everything else starts from."""

from sqlalchemy import orm, select

from app import db
from app.accounts import keys
from app.core import ids
from app.core.settings import Settings
from app.models import ApiKey, Organization, Project


def ensure_first_key(settings: Settings) -> str | None:
    """Create organization, project and key on an empty database and return the key; None if there is one already."""
    sessions = db.open_sessions(settings.database.system_url, pool_size=1)
    try:
        with sessions.begin() as session:
            if session.scalar(select(ApiKey.id).limit(1)) is not None:
                return None
            organization, project = create_organization(session, name="Default", slug="default")
            return keys.create(
                session,
                organization_id=organization.id,
                project_id=project.id,
                name="bootstrap",
                pepper=settings.key_pepper.get_secret_value().encode(),
            )
    finally:
        sessions.kw["bind"].dispose()


def create_organization(session: orm.Session, *, name: str, slug: str) -> tuple[Organization, Project]:
    """An organization and its first project."""
    organization = Organization(id=ids.new("org-"), name=name, slug=slug)
    project = Project(id=ids.new("proj_"), organization_id=organization.id, name="Default project")
    session.add(organization)
    session.flush()  # the project's foreign key needs the row
    session.add(project)
    return organization, project
