"""Jobs that continue a model, and the validation loss of what a job has published."""

import sqlalchemy as sa
from alembic import op

revision = "0007c"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("continue_from", sa.Text(collation="C"), nullable=True))
    op.add_column("jobs", sa.Column("valid_loss", sa.Float(), nullable=True))
    op.create_index("ix_jobs_continue_from", "jobs", ["continue_from"], postgresql_where="continue_from IS NOT NULL")


def downgrade() -> None:
    op.drop_index("ix_jobs_continue_from", table_name="jobs")
    op.drop_column("jobs", "valid_loss")
    op.drop_column("jobs", "continue_from")
