"""Tell whoever listens of each new event of a job, by the job's id. A trigger, so that workers of the release before do too."""

from alembic import op

revision = "0008e"
down_revision = "0008i"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE FUNCTION tunesmith_tell_of_event() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_notify('tunesmith_events', NEW.job_id);  -- equal ones of a transaction are one
            RETURN NULL;
        END $$
    """)
    op.execute(
        "CREATE TRIGGER job_events_are_told AFTER INSERT ON job_events FOR EACH ROW EXECUTE FUNCTION tunesmith_tell_of_event()"
    )


def downgrade() -> None:
    op.execute("DROP TRIGGER job_events_are_told ON job_events")
    op.execute("DROP FUNCTION tunesmith_tell_of_event()")
