"""Answers of requests that came with an Idempotency-Key. The release before ignores the header, and this table."""

import sqlalchemy as sa
from alembic import op

revision = "0008i"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "idempotent_answers",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("request_sha256", sa.Text(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("media_type", sa.Text(), nullable=True),
        sa.Column("body", sa.Text(), nullable=True),
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("project_id", sa.Text(collation="C"), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_idempotent_answers")),
        sa.UniqueConstraint("project_id", "key", name=op.f("uq_idempotent_answers_project_id_key")),
    )
    op.create_index(op.f("ix_idempotent_answers_organization_id"), "idempotent_answers", ["organization_id"], unique=False)
    op.create_index("ix_idempotent_answers_created_at", "idempotent_answers", ["created_at"], unique=False)
    mine = "organization_id = nullif(current_setting('app.org', true), '')"
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON idempotent_answers TO tunesmith_api, tunesmith_system")
    op.execute("ALTER TABLE idempotent_answers ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE idempotent_answers FORCE ROW LEVEL SECURITY")
    op.execute("CREATE POLICY system ON idempotent_answers TO tunesmith_system USING (true) WITH CHECK (true)")
    op.execute(f"CREATE POLICY tenant ON idempotent_answers TO tunesmith_api USING ({mine}) WITH CHECK ({mine})")


def downgrade() -> None:
    op.drop_table("idempotent_answers")
