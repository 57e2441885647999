"""What pages ask for first is found by an index, however many jobs there are and however long one is. Operators see how the
installation stands: engines tell of their adapters, and the relay writes down what it sees, which the API may not look at itself.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_jobs_listed", "jobs", ["organization_id", "project_id", "id"], unique=False)
    unfinished = sa.text("state IN ('validating_files', 'queued', 'running', 'evaluating', 'paused')")
    op.create_index("ix_jobs_unfinished", "jobs", ["organization_id", "id"], unique=False, postgresql_where=unfinished)
    ended = ["organization_id", "project_id", "finished_at"]
    op.create_index("ix_jobs_ended", "jobs", ended, unique=False, postgresql_include=["state", "trained_tokens"])
    messages = sa.text("type = 'message'")
    op.create_index("ix_job_events_messages", "job_events", ["job_id", "sequence"], unique=False, postgresql_where=messages)

    op.add_column("engines", sa.Column("adapters", JSONB(), server_default=sa.text("'{}'"), nullable=False))
    op.create_table(
        "snapshots",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("told", JSONB(), nullable=False),
        sa.Column("taken_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_snapshots")),
    )
    op.execute("GRANT SELECT, INSERT, UPDATE ON snapshots TO tunesmith_system")
    op.execute("GRANT SELECT ON snapshots TO tunesmith_api")


def downgrade() -> None:
    op.drop_table("snapshots")
    op.drop_column("engines", "adapters")
    op.drop_index("ix_job_events_messages", table_name="job_events")
    op.drop_index("ix_jobs_ended", table_name="jobs")
    op.drop_index("ix_jobs_unfinished", table_name="jobs")
    op.drop_index("ix_jobs_listed", table_name="jobs")
