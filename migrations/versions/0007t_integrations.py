"""What a job reports to, and how far each tracker has been told."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007t"
down_revision = "0007q"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("integrations", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.create_table(
        "job_followers",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("job_id", sa.Text(collation="C"), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("run", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("claims", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=True),
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("project_id", sa.Text(collation="C"), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_followers_job_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_followers")),
        sa.UniqueConstraint("job_id", "type", name=op.f("uq_job_followers_job_id_type")),
    )
    op.create_index(
        "ix_job_followers_due",
        "job_followers",
        ["type", "next_attempt_at"],
        unique=False,
        postgresql_where="next_attempt_at IS NOT NULL",
    )
    op.create_index(op.f("ix_job_followers_organization_id"), "job_followers", ["organization_id"], unique=False)
    mine = "organization_id = nullif(current_setting('app.org', true), '')"
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON job_followers TO tunesmith_api, tunesmith_system")
    op.execute("ALTER TABLE job_followers ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE job_followers FORCE ROW LEVEL SECURITY")
    op.execute("CREATE POLICY system ON job_followers TO tunesmith_system USING (true) WITH CHECK (true)")
    op.execute(f"CREATE POLICY tenant ON job_followers TO tunesmith_api USING ({mine}) WITH CHECK ({mine})")


def downgrade() -> None:
    op.drop_table("job_followers")
    op.drop_column("jobs", "integrations")
