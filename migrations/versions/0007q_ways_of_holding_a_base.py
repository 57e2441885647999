"""Beside each adapter the digest of the base it was trained on, and of each engine how it holds its base."""

import sqlalchemy as sa
from alembic import op

revision = "0007q"
down_revision = "0007c"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # none: of an adapter from before, which had a base in NF4 with double quantization: there was no other
    op.add_column("adapters", sa.Column("base_digest", sa.Text(), nullable=True))
    op.add_column("engines", sa.Column("quantization", sa.Text(), server_default=sa.text("'nf4'"), nullable=False))


def downgrade() -> None:
    op.drop_column("engines", "quantization")
    op.drop_column("adapters", "base_digest")
