from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, text
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
