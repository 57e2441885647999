"""Organizations and whoever signs in to them, as the operator sees them: all of the installation."""

import re
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, orm, select
from sqlalchemy.exc import IntegrityError

from app.accounts import users
from app.core import ids
from app.core.errors import BadRequest, Conflict, NotFound
from app.models import Organization, Project, User

_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True)
class Member:
    """A user, and where they are at home."""

    email: str
    name: str
    organization: str
    is_operator: bool
    is_disabled: bool
    created_at: datetime


def create_organization(session: orm.Session, *, name: str, slug: str) -> tuple[Organization, Project]:
    """An organization and its first project. Raises BadRequest, or Conflict for a slug that is taken."""
    if not _SLUG.fullmatch(slug):
        message = f"{slug[:64]!r} cannot be part of models' names; use 1 to 32 of a to z, digits and -, a letter or digit first"
        raise BadRequest(message, param="slug")
    organization = Organization(id=ids.new("org-"), name=name, slug=slug)
    project = Project(id=ids.new("proj_"), organization_id=organization.id, name="Default project")
    try:
        with session.begin_nested():
            session.add(organization)
            session.flush()  # the project's foreign key needs the row
            session.add(project)
    except IntegrityError as error:
        raise Conflict(f"there is an organization {slug} already", param="slug") from error
    return organization, project


def add_user(session: orm.Session, *, organization: str, email: str, name: str) -> User:
    """To the first project of the organization with this slug. Raises NotFound, BadRequest, or Conflict for a known address."""
    first = select(Project).join(Organization).where(Organization.slug == organization).order_by(Project.created_at).limit(1)
    project = session.scalar(first)
    if project is None:
        message = f"there is no organization {organization[:64]!r}; `tunesmith organizations list` has them"
        raise NotFound(message, param="organization")
    try:
        with session.begin_nested():
            return users.create(session, organization_id=project.organization_id, project_id=project.id, email=email, name=name)
    except IntegrityError as error:
        raise Conflict(f"{email} is a user already; `tunesmith sign-in --email {email}` prints a link", param="email") from error


def find_user(session: orm.Session, email: str) -> User:
    """Raises NotFound."""
    found = session.scalar(select(User).where(User.email == email.lower()))
    if found is None:
        raise NotFound(f"nobody here has the address {email[:100]!r}; `tunesmith users list` has them", param="email")
    return found


def disable_user(session: orm.Session, email: str) -> User:
    """Signed out everywhere within a request, and let in by neither password nor link. Their organization's API keys go on
    working. Raises NotFound; Conflict for an operator, without whom nobody would see the service."""
    user = find_user(session, email)
    if user.is_operator:
        raise Conflict(f"{user.email} is the operator, and is not shut out; `tunesmith sign-in` prints a link", param="email")
    user.disabled_at = user.disabled_at or func.clock_timestamp()
    users.sign_out_everywhere(session, user)
    return user


def enable_user(session: orm.Session, email: str) -> User:
    """Let in again, by the password that they had. Raises NotFound."""
    user = find_user(session, email)
    user.disabled_at = None
    users.sign_out_everywhere(session, user)  # also a browser that was signing in while they were shut out
    return user


def list_organizations(session: orm.Session) -> list[tuple[Organization, int]]:
    """The oldest first, each with how many users it has."""
    counted = select(Organization, func.count(User.id)).outerjoin(User, User.organization_id == Organization.id)
    rows = session.execute(counted.group_by(Organization.id).order_by(Organization.created_at))
    return [(organization, number) for organization, number in rows]


def list_members(session: orm.Session) -> list[Member]:
    """The oldest first."""
    rows = session.execute(
        select(User, Organization.slug).join(Organization, Organization.id == User.organization_id).order_by(User.created_at)
    )
    return [
        Member(user.email, user.name, slug, user.is_operator, user.disabled_at is not None, user.created_at)
        for user, slug in rows
    ]
