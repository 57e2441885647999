from datetime import datetime

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Created, Id, Owned, Table


class Organization(Created, Table):
    """A customer. `slug` appears in the names of its models."""

    __tablename__ = "organizations"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str]
    slug: Mapped[str] = mapped_column(unique=True)


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
