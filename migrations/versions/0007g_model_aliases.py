"""Aliases of models, with a history that nobody rewrites; quality gates, behind which a model is not live yet.

The release before knows neither: its models are all live, and a job with a gate cannot succeed in its hands.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007g"
down_revision = "0007t"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _gates()
    _aliases()
    _access()


def _gates() -> None:
    op.add_column("adapters", sa.Column("is_live", sa.Boolean(), server_default=sa.text("true"), nullable=False))
    op.add_column("jobs", sa.Column("quality_gate", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.add_column("jobs", sa.Column("alias", sa.Text(), nullable=True))
    gate_first = "state <> 'succeeded' OR quality_gate IS NULL OR quality_gate ->> 'stage' = 'passed'"
    op.create_check_constraint(op.f("ck_jobs_gate_first"), "jobs", gate_first)
    op.create_index("ix_jobs_evaluating", "jobs", ["id"], unique=False, postgresql_where="state = 'evaluating'")
    op.add_column("evaluations", sa.Column("job_id", sa.Text(collation="C"), nullable=True))
    op.create_index("ix_evaluations_job_id", "evaluations", ["job_id"], unique=False, postgresql_where="job_id IS NOT NULL")


def _aliases() -> None:
    op.create_table(
        "model_aliases",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("name", sa.Text(collation="C"), nullable=False),
        sa.Column("model", sa.Text(collation="C"), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("previous_version", sa.Integer(), nullable=True),
        sa.Column("moved_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("project_id", sa.Text(collation="C"), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_aliases")),
        sa.UniqueConstraint("project_id", "name", name=op.f("uq_model_aliases_project_id_name")),
    )
    op.create_index(op.f("ix_model_aliases_organization_id"), "model_aliases", ["organization_id"], unique=False)
    op.create_table(
        "model_alias_changes",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("name", sa.Text(collation="C"), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(collation="C"), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("previous_version", sa.Integer(), nullable=True),
        sa.Column("api_key_id", sa.Text(collation="C"), nullable=False),
        sa.Column("job_id", sa.Text(collation="C"), nullable=True),
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("project_id", sa.Text(collation="C"), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_alias_changes")),
        sa.UniqueConstraint("project_id", "name", "sequence", name=op.f("uq_model_alias_changes_project_id_name_sequence")),
    )
    op.create_index(op.f("ix_model_alias_changes_organization_id"), "model_alias_changes", ["organization_id"], unique=False)


def _access() -> None:
    mine = "organization_id = nullif(current_setting('app.org', true), '')"
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON model_aliases TO tunesmith_api, tunesmith_system")
    op.execute("GRANT SELECT, INSERT ON model_alias_changes TO tunesmith_api, tunesmith_system")  # append-only
    for table in ("model_aliases", "model_alias_changes"):
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY system ON {table} TO tunesmith_system USING (true) WITH CHECK (true)")
        op.execute(f"CREATE POLICY tenant ON {table} TO tunesmith_api USING ({mine}) WITH CHECK ({mine})")


def downgrade() -> None:
    op.drop_table("model_alias_changes")
    op.drop_table("model_aliases")
    op.drop_index("ix_evaluations_job_id", table_name="evaluations", postgresql_where="job_id IS NOT NULL")
    op.drop_column("evaluations", "job_id")
    op.drop_index("ix_jobs_evaluating", table_name="jobs", postgresql_where="state = 'evaluating'")
    op.drop_constraint(op.f("ck_jobs_gate_first"), "jobs", type_="check")
    for table, column in (("jobs", "alias"), ("jobs", "quality_gate"), ("adapters", "is_live")):
        op.drop_column(table, column)
