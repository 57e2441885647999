"""Jobs that continue a model, the validation loss of what a job has published, and sweeps."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007c"
down_revision = "0007"
branch_labels = None
depends_on = None

REFERENCES = ("continue_from", "sweep_id")  # of jobs: few have any


def upgrade() -> None:
    for name in REFERENCES:
        op.add_column("jobs", sa.Column(name, sa.Text(collation="C"), nullable=True))
        op.create_index(f"ix_jobs_{name}", "jobs", [name], postgresql_where=f"{name} IS NOT NULL")
    op.add_column("jobs", sa.Column("valid_loss", sa.Float(), nullable=True))
    op.create_table(
        "sweeps",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("api_key_id", sa.Text(collation="C"), nullable=False),
        sa.Column("request", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("request_sha256", sa.Text(), nullable=False),
        sa.Column("trials", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("project_id", sa.Text(collation="C"), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sweeps")),
    )
    op.create_index("ix_sweeps_retried", "sweeps", ["api_key_id", "request_sha256"], unique=False)
    op.create_index(op.f("ix_sweeps_organization_id"), "sweeps", ["organization_id"], unique=False)
    _access()


def _access() -> None:
    mine = "organization_id = nullif(current_setting('app.org', true), '')"
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON sweeps TO tunesmith_api, tunesmith_system")
    op.execute("ALTER TABLE sweeps ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE sweeps FORCE ROW LEVEL SECURITY")
    op.execute("CREATE POLICY system ON sweeps TO tunesmith_system USING (true) WITH CHECK (true)")
    op.execute(f"CREATE POLICY tenant ON sweeps TO tunesmith_api USING ({mine}) WITH CHECK ({mine})")


def downgrade() -> None:
    op.drop_table("sweeps")
    op.drop_column("jobs", "valid_loss")
    for name in reversed(REFERENCES):
        op.drop_index(f"ix_jobs_{name}", table_name="jobs")
        op.drop_column("jobs", name)
