from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, false, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Created, Id, Owned, Table


class Organization(Created, Table):
    """A customer. `slug` appears in the names of its models. Of two that wait, one of `weight` 2 gets twice the workers' time."""

    __tablename__ = "organizations"
    __table_args__ = (CheckConstraint("weight > 0 AND weight < 'Infinity'", name="weight"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str]
    slug: Mapped[str] = mapped_column(unique=True)
    weight: Mapped[float] = mapped_column(server_default=text("1"))


class Project(Created, Table):
    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    organization_id: Mapped[str] = mapped_column(Id, ForeignKey("organizations.id"), index=True)
    name: Mapped[str]


class ApiKey(Owned, Table):
    """Only a keyed hash of the secret is kept, and enough of its beginning to recognise it."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str]
    hash: Mapped[str] = mapped_column(unique=True)
    shown_prefix: Mapped[str]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class User(Owned, Table):
    """Whoever uses the dashboard. One without a password comes by a link. An operator sees the whole installation.

    `failures` are wrong passwords since the last right one; until `not_before` none is looked at.
    """

    __tablename__ = "users"
    __table_args__ = (CheckConstraint("email = lower(email)", name="email_lower"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    password_hash: Mapped[str | None]
    is_operator: Mapped[bool] = mapped_column(server_default=false())
    failures: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    not_before: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    disabled_at: Mapped[datetime | None]


class _Lets(Owned):
    """What lets a user in until `expires_at`. Of the secret a keyed hash is kept."""

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    user_id: Mapped[str] = mapped_column(Id, ForeignKey("users.id", ondelete="CASCADE"), index=True)
    hash: Mapped[str] = mapped_column(unique=True)
    expires_at: Mapped[datetime]


class SignIn(_Lets, Table):
    """A browser that is signed in, by its cookie. Without the row it is signed out."""

    __tablename__ = "sign_ins"

    by_link: Mapped[bool] = mapped_column(server_default=false())


class SignInLink(_Lets, Table):
    """Signs its user in once; then it is gone."""

    __tablename__ = "sign_in_links"
