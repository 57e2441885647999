"""`tunesmith organizations` and `tunesmith users`: who has a place in the service, and who signs in to the dashboard."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from cli.failure import Failed
from cli.options import AsJson
from cli.output import listed, local_time, show
from cli.running import Looked, settings_of_service
from cli.sign_in import link_for

if TYPE_CHECKING:
    from sqlalchemy import orm

    from app.core.settings import Settings

organizations = typer.Typer(no_args_is_help=True, help="Add and list organizations: each sees only what is its own.")
users = typer.Typer(no_args_is_help=True, help="Add, list and shut out people who sign in to the dashboard.")

Name = Annotated[str, Argument(metavar="NAME", help="As people call it.")]
Slug = Annotated[str, Option("--slug", metavar="SLUG", help="Part of its models' names: a to z, digits, -.")]
Email = Annotated[str, Argument(metavar="EMAIL", help="Whom the link is for; they may set a password with it.")]
Somebody = Annotated[str, Argument(metavar="EMAIL", help="Whom; `users list` has them.")]
At = Annotated[str, Option("--organization", metavar="SLUG", help="Whose jobs, files and models they see.")]
Called = Annotated[str | None, Option("--name", metavar="NAME", help="As the dashboard calls them; else their address.")]


@organizations.command("add")
def add_organization(name: Name, slug: Slug, data_dir: Looked = None, as_json: AsJson = False) -> None:
    """Make an organization. `tunesmith users add` brings in its first user, who makes its API keys in the dashboard."""
    from app.accounts import people

    with _opened(data_dir) as (_, session):
        organization, _ = people.create_organization(session, name=name, slug=slug)
        made = {"id": organization.id, "name": name, "slug": slug}
    show(made, f"{slug}: add its first user with `tunesmith users add EMAIL --organization {slug}`", as_json=as_json)


@organizations.command("list")
def list_organizations(data_dir: Looked = None, as_json: AsJson = False) -> None:
    """List all organizations of the service."""
    from app.accounts import people

    with _opened(data_dir) as (_, session):
        found: list[dict[str, Any]] = [
            {"id": one.id, "name": one.name, "slug": one.slug, "users": number, "created_at": int(one.created_at.timestamp())}
            for one, number in people.list_organizations(session)
        ]
    rows = [(one["slug"], one["name"], str(one["users"]), local_time(one["created_at"])) for one in found]
    show(found, listed(("SLUG", "NAME", "USERS", "CREATED"), rows), as_json=as_json)


@users.command("add")
def add_user(
    email: Email, organization: At = "default", name: Called = None, data_dir: Looked = None, as_json: AsJson = False
) -> None:
    """Let somebody in, and print a link that signs them in once, within a day."""
    from app.accounts import people

    with _opened(data_dir) as (settings, session):
        people.add_user(session, organization=organization, email=email, name=name or email)
    link = link_for(settings, data_dir, email)
    show({"email": email, "organization": organization, "link": link}, link, as_json=as_json)


@users.command("list")
def list_users(data_dir: Looked = None, as_json: AsJson = False) -> None:
    """List everybody who can sign in."""
    from app.accounts import people

    with _opened(data_dir) as (_, session):
        found: list[dict[str, Any]] = [
            {
                "email": one.email,
                "name": one.name,
                "organization": one.organization,
                "is_operator": one.is_operator,
                "is_disabled": one.is_disabled,
                "created_at": int(one.created_at.timestamp()),
            }
            for one in people.list_members(session)
        ]
    rows = [(one["email"], one["name"], one["organization"], _standing(one), local_time(one["created_at"])) for one in found]
    show(found, listed(("EMAIL", "NAME", "ORGANIZATION", "IS", "CREATED"), rows), as_json=as_json)


@users.command("disable")
def disable_user(email: Somebody, data_dir: Looked = None, as_json: AsJson = False) -> None:
    """Sign somebody out everywhere, and let them in no more. API keys are their organization's, and go on working."""
    from app.accounts import people

    with _opened(data_dir) as (_, session):
        told = {"email": people.disable_user(session, email).email, "is_disabled": True}
    show(told, f"{told['email']} is signed out; revoke the API keys that they know in the dashboard", as_json=as_json)


@users.command("enable")
def enable_user(email: Somebody, data_dir: Looked = None, as_json: AsJson = False) -> None:
    """Let somebody in again who was disabled."""
    from app.accounts import people

    with _opened(data_dir) as (_, session):
        told = {"email": people.enable_user(session, email).email, "is_disabled": False}
    show(told, f"{told['email']} may sign in, by the password that they had or by a link", as_json=as_json)


def _standing(one: dict[str, Any]) -> str:
    return "disabled" if one["is_disabled"] else "operator" if one["is_operator"] else "user"


@contextmanager
def _opened(data_dir: Looked) -> "Iterator[tuple[Settings, orm.Session]]":
    """The service's database, committed at the end. Raises Failed for what was refused."""
    from app.accounts.bootstrap import system_session
    from app.core.errors import AppError
    from cli.doctor import configuration

    settings = settings_of_service(configuration.require(), data_dir)
    try:
        with system_session(settings) as session:
            yield settings, session
    except AppError as error:
        raise Failed(error) from error
