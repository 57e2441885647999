"""Whether a checkpoint's training state is still in storage: see docs/decisions/0011."""

import sqlalchemy as sa
from alembic import op

revision = "0003c"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job_checkpoints", sa.Column("has_state", sa.Boolean(), server_default=sa.text("true"), nullable=False))


def downgrade() -> None:
    op.drop_column("job_checkpoints", "has_state")
