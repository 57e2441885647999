"""Aliases of models, with a history that nobody rewrites."""

import sqlalchemy as sa
from alembic import op

revision = "0007g"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
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
    _access()


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
