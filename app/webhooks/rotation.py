"""A new signing secret, and for a while the old one beside it, so that receivers can change theirs at leisure."""

from datetime import timedelta

from sqlalchemy import Case, case, func, orm, select, update

from app import idempotency
from app.models import WebhookEndpoint
from app.webhooks import signing

OVERLAP = timedelta(hours=24)


def rotate(endpoint: WebhookEndpoint, *, keeps_old: bool) -> None:
    """Of a locked endpoint. Ends the overlap of a rotation before."""
    endpoint.previous_secret = endpoint.secret if keeps_old else None
    endpoint.previous_secret_expires_at = func.clock_timestamp() + OVERLAP if keeps_old else None
    endpoint.secret, endpoint.updated_at = signing.new_secret(), func.clock_timestamp()


def is_just_now(session: orm.Session, endpoint: WebhookEndpoint) -> bool:
    """Whether the secret was rotated in the last minutes, and the one before it kept."""
    expires_at, since = endpoint.previous_secret_expires_at, func.clock_timestamp() - idempotency.RETRY_WINDOW
    return expires_at is not None and session.scalars(select(since < expires_at - OVERLAP)).one()


def valid_secrets() -> tuple[orm.InstrumentedAttribute[str], Case[str | None]]:
    """What to select of an endpoint to sign with: the second is null but for the overlap."""
    is_overlap = WebhookEndpoint.previous_secret_expires_at > func.statement_timestamp()
    return WebhookEndpoint.secret, case((is_overlap, WebhookEndpoint.previous_secret))


def forget_old(session: orm.Session) -> int:
    """Secrets that sign nothing any more. Returns how many they were."""
    is_over = WebhookEndpoint.previous_secret_expires_at <= func.clock_timestamp()
    forgetting = update(WebhookEndpoint).where(is_over).values(previous_secret=None, previous_secret_expires_at=None)
    return len(session.scalars(forgetting.returning(WebhookEndpoint.id)).all())
