"""Webhook endpoints that are deleted go bit by bit, and what is listed, counted and bounded reads an index.

The release before shows such an endpoint until this one's relay has removed it, as one that is disabled.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008x"
down_revision = "0008m"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("webhook_endpoints", sa.Column("deleted_at", sa.TIMESTAMP(timezone=True), nullable=True))
    op.create_index(
        "ix_webhook_deliveries_of_organization",
        "webhook_deliveries",
        ["organization_id"],
        unique=False,
        postgresql_where="lease_expires_at IS NOT NULL",
    )
    op.create_index("ix_webhook_deliveries_listed", "webhook_deliveries", ["endpoint_id", "id"], unique=False)
    op.create_index(
        op.f("ix_webhook_deliveries_endpoint_id_created_at"), "webhook_deliveries", ["endpoint_id", "created_at"], unique=False
    )
    op.create_index("ix_uploads_pending", "uploads", ["project_id"], unique=False, postgresql_where="status = 'pending'")


def downgrade() -> None:
    op.drop_index("ix_uploads_pending", table_name="uploads")
    for name in (op.f("ix_webhook_deliveries_endpoint_id_created_at"), "ix_webhook_deliveries_listed"):
        op.drop_index(name, table_name="webhook_deliveries")
    op.drop_index("ix_webhook_deliveries_of_organization", table_name="webhook_deliveries")
    op.drop_column("webhook_endpoints", "deleted_at")
