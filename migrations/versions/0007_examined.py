"""What a job's run has come to: base against adapter, the examples looked at, and result files after the first.

The release before leaves them null, as in all jobs that ended before.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

COLUMNS = ("further_result_file_ids", "held_out", "examined")


def upgrade() -> None:
    for name in COLUMNS:
        op.add_column("jobs", sa.Column(name, postgresql.JSONB(astext_type=sa.Text()), nullable=True))


def downgrade() -> None:
    for name in reversed(COLUMNS):
        op.drop_column("jobs", name)
