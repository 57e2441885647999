"""Where attempts die, so that a job which dies three times at the same step is seen to be poison.

The release before counts broken attempts only, and leaves these as they are.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007g"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("attempt_step", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("died_at_step", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("deaths", sa.Integer(), server_default=sa.text("0"), nullable=False))


def downgrade() -> None:
    for column in ("deaths", "died_at_step", "attempt_step"):
        op.drop_column("jobs", column)
