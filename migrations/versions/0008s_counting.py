"""Counting deliveries that were given up reads an index, and that of jobs no longer holds a count that falls.

Processes always know since when they hear of the broker. The release before has none.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008s"
down_revision = "0008x"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_webhook_deliveries_exhausted",
        "webhook_deliveries",
        ["id"],
        unique=False,
        postgresql_where=sa.text("next_attempt_at IS NULL AND delivered_at IS NULL"),
    )
    op.drop_index("ix_jobs_counted", table_name="jobs")
    op.create_index("ix_jobs_counted", "jobs", ["state", "attempt"], unique=False)
    op.execute("DELETE FROM processes WHERE broker_at IS NULL")
    op.alter_column("processes", "broker_at", nullable=False)


def downgrade() -> None:
    op.drop_index("ix_jobs_counted", table_name="jobs")
    op.create_index("ix_jobs_counted", "jobs", ["state", "attempt", "failures"], unique=False)
    op.alter_column("processes", "broker_at", nullable=True)
    op.drop_index("ix_webhook_deliveries_exhausted", table_name="webhook_deliveries")
