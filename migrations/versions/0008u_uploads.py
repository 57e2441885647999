"""Uploads in parts. The release before knows none, and sweeps none: they wait for this one's relay."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008u"
down_revision = "0008e"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "uploads",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("file_expires_after_seconds", sa.Integer(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("received_bytes", sa.BigInteger(), nullable=False),
        sa.Column("part_ids", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("file_id", sa.Text(collation="C"), nullable=True),
        sa.Column("tried_file_ids", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("expires_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("sweep_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("project_id", sa.Text(collation="C"), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.CheckConstraint("status IN ('pending', 'completed', 'cancelled', 'expired')", name=op.f("ck_uploads_status")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
    )
    op.create_index(op.f("ix_uploads_organization_id"), "uploads", ["organization_id"], unique=False)
    op.create_index(op.f("ix_uploads_sweep_at"), "uploads", ["sweep_at"], unique=False)
    op.create_table(
        "upload_parts",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("upload_id", sa.Text(collation="C"), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("storage_key", sa.Text(), nullable=False),
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("project_id", sa.Text(collation="C"), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.ForeignKeyConstraint(["upload_id"], ["uploads.id"], name=op.f("fk_upload_parts_upload_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload_parts")),
    )
    op.create_index(op.f("ix_upload_parts_organization_id"), "upload_parts", ["organization_id"], unique=False)
    op.create_index(op.f("ix_upload_parts_upload_id"), "upload_parts", ["upload_id"], unique=False)
    _access()


def _access() -> None:
    mine = "organization_id = nullif(current_setting('app.org', true), '')"
    for table in ("uploads", "upload_parts"):
        op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO tunesmith_api, tunesmith_system")
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY system ON {table} TO tunesmith_system USING (true) WITH CHECK (true)")
        op.execute(f"CREATE POLICY tenant ON {table} TO tunesmith_api USING ({mine}) WITH CHECK ({mine})")


def downgrade() -> None:
    op.drop_table("upload_parts")
    op.drop_table("uploads")
