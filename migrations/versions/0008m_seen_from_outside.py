"""Relays and workers say that they live, jobs and deliveries remember their trace, and counting jobs reads an index.

The release before writes neither processes nor traces.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008m"
down_revision = "0008w"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "processes",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("queues", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("heartbeat_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("broker_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_processes")),
    )
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON processes TO tunesmith_system")
    op.add_column("jobs", sa.Column("trace", sa.Text(), nullable=True))
    op.add_column("webhook_deliveries", sa.Column("trace", sa.Text(), nullable=True))
    op.create_index("ix_jobs_counted", "jobs", ["state", "attempt", "failures"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_jobs_counted", table_name="jobs")
    op.drop_column("webhook_deliveries", "trace")
    op.drop_column("jobs", "trace")
    op.drop_table("processes")
