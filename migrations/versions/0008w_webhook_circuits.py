"""Of webhook endpoints: how much they are told, the secret before, how they fail, and since when. Of deliveries: who sends them, and how it went.

The release before claims and settles without a lease of its own kind: what it has in flight is not counted for the endpoint.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008w"
down_revision = "0008u"
branch_labels = None
depends_on = None

INSTANTS = ("previous_secret_expires_at", "updated_at", "disabled_at", "failing_since", "not_before")
TEXTS = ("previous_secret", "disabled_reason")


def upgrade() -> None:
    for name in INSTANTS:
        op.add_column("webhook_endpoints", sa.Column(name, sa.TIMESTAMP(timezone=True), nullable=True))
    for name in TEXTS:
        op.add_column("webhook_endpoints", sa.Column(name, sa.Text(), nullable=True))
    op.add_column("webhook_endpoints", sa.Column("failures_in_a_row", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.add_column("webhook_deliveries", sa.Column("lease_expires_at", sa.TIMESTAMP(timezone=True), nullable=True))
    op.add_column("webhook_endpoints", sa.Column("wants_object", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    recent = sa.Column("recent_attempts", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False)
    op.add_column("webhook_deliveries", recent)
    _indexes()


def _indexes() -> None:
    """The first serves the release before too: it holds what waits, which is what that one sorts."""
    op.create_index(
        "ix_webhook_deliveries_waiting",
        "webhook_deliveries",
        ["endpoint_id", "next_attempt_at"],
        unique=False,
        postgresql_where="next_attempt_at IS NOT NULL",
    )
    op.create_index(
        "ix_webhook_deliveries_leased",
        "webhook_deliveries",
        ["endpoint_id"],
        unique=False,
        postgresql_where="lease_expires_at IS NOT NULL",
    )
    op.create_index(op.f("ix_webhook_deliveries_created_at"), "webhook_deliveries", ["created_at"], unique=False)
    op.drop_index("ix_webhook_deliveries_due", table_name="webhook_deliveries", postgresql_where="next_attempt_at IS NOT NULL")


def downgrade() -> None:
    op.create_index(
        "ix_webhook_deliveries_due",
        "webhook_deliveries",
        ["next_attempt_at"],
        unique=False,
        postgresql_where="next_attempt_at IS NOT NULL",
    )
    for index in (op.f("ix_webhook_deliveries_created_at"), "ix_webhook_deliveries_leased", "ix_webhook_deliveries_waiting"):
        op.drop_index(index, table_name="webhook_deliveries")
    for name in ("recent_attempts", "lease_expires_at"):
        op.drop_column("webhook_deliveries", name)
    for name in ("wants_object", "failures_in_a_row", *TEXTS, *INSTANTS):
        op.drop_column("webhook_endpoints", name)
