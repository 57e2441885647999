"""What was worked out from files is kept, and a job keeps the report on its data."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003c"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("data_report", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.create_table(
        "derived",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("file_sha256", sa.Text(), nullable=False),
        sa.Column("storage_key", sa.Text(), nullable=True),
        sa.Column("sha256", sa.Text(), nullable=True),
        sa.Column("facts", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("last_used_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_derived")),
    )
    op.create_index("uq_derived_key", "derived", ["organization_id", "key"], unique=True, postgresql_where="facts IS NOT NULL")
    op.create_index("ix_derived_file", "derived", ["organization_id", "file_sha256"], unique=False)
    op.create_index("ix_derived_last_used_at", "derived", ["last_used_at"], unique=False)
    op.create_index("ix_derived_abandoned", "derived", ["created_at"], unique=False, postgresql_where="facts IS NULL")
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON derived TO tunesmith_system")
    op.execute("GRANT SELECT, DELETE ON derived TO tunesmith_api")  # what a deleted file leaves behind goes with it
    op.execute("ALTER TABLE derived ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE derived FORCE ROW LEVEL SECURITY")
    op.execute("CREATE POLICY system ON derived TO tunesmith_system USING (true) WITH CHECK (true)")
    mine = "organization_id = nullif(current_setting('app.org', true), '')"
    op.execute(f"CREATE POLICY tenant ON derived TO tunesmith_api USING ({mine}) WITH CHECK ({mine})")


def downgrade() -> None:
    op.drop_table("derived")
    op.drop_column("jobs", "data_report")
