"""Fair queues: weights, shares, what a job has taken; and the one door through which a customer sees its places in them.

An earlier release claims the oldest job first and charges nobody, which this one takes as it finds it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("organizations", sa.Column("weight", sa.Float(), server_default=sa.text("1"), nullable=False))
    op.create_check_constraint(op.f("ck_organizations_weight"), "organizations", "weight > 0 AND weight < 'Infinity'")
    op.add_column("jobs", sa.Column("claimed_at", sa.TIMESTAMP(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("charged_seconds", sa.Float(), nullable=True))
    op.add_column("jobs", sa.Column("worker_seconds", sa.Float(), server_default=sa.text("0"), nullable=False))
    op.add_column("jobs", sa.Column("total_tokens", sa.BigInteger(), nullable=True))
    op.create_index(
        "ix_jobs_in_turn",
        "jobs",
        ["queue", "organization_id", "queued_at", "id"],
        unique=False,
        postgresql_where="state = 'queued'",
    )
    op.drop_index("ix_jobs_claimable", table_name="jobs", postgresql_where="state = 'queued'")
    op.create_table(
        "queue_clocks",
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("virtual_seconds", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("released_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("queue", name=op.f("pk_queue_clocks")),
    )
    op.create_table(
        "queue_shares",
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("used_until", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["organization_id"], ["organizations.id"], name=op.f("fk_queue_shares_organization_id")),
        sa.PrimaryKeyConstraint("queue", "organization_id", name=op.f("pk_queue_shares")),
    )
    op.create_table(
        "throughputs",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("worker_seconds", sa.Float(), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_throughputs")),
    )
    op.create_index("ix_throughputs_queue_base", "throughputs", ["queue", "base", "id"], unique=False)
    _access()
    _places()


def _access() -> None:
    for table in ("queue_clocks", "queue_shares", "throughputs"):
        op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO tunesmith_system")
    op.execute("GRANT SELECT ON throughputs TO tunesmith_api")
    op.execute("ALTER TABLE queue_shares ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE queue_shares FORCE ROW LEVEL SECURITY")
    op.execute("CREATE POLICY system ON queue_shares TO tunesmith_system USING (true) WITH CHECK (true)")
    for table in ("jobs", "queue_shares"):  # of organizations the owner sees the rows already: see 0002
        op.execute(f"CREATE POLICY queue_places ON {table} FOR SELECT TO tunesmith_owner USING (true)")


def _places() -> None:
    """Functions with the owner's eyes, which see every organization's rows and tell of them only how many there are.

    queue_places gives the caller's own places, in the order in which app/jobs/turns.py would claim if no job came and each took what is
    expected of it. Its row without a job is the place of one that came now. Instants are null where nothing was measured to tell them by.
    """
    op.execute("""
        CREATE FUNCTION queue_places(queues text[])
        RETURNS TABLE (queue text, job_id text, place bigint, starts_at timestamptz, ends_at timestamptz)
        LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
            WITH mine AS (
                SELECT nullif(current_setting('app.org', true), '') AS organization_id
            ), speeds AS (
                SELECT t.queue, t.base, sum(t.tokens) / sum(t.worker_seconds) AS tokens_per_second
                FROM throughputs t WHERE t.queue = ANY (queues) GROUP BY t.queue, t.base
            ), waiting AS (
                SELECT j.queue, j.id, j.organization_id, j.queued_at, j.total_tokens / s.tokens_per_second AS seconds,
                    j.not_before > statement_timestamp() AS is_held  -- a broken attempt is waited out
                FROM jobs j LEFT JOIN speeds s ON s.queue = j.queue AND s.base = j.base
                WHERE j.queue = ANY (queues) AND j.state = 'queued' AND j.desired = 'run'
                UNION ALL
                SELECT q.queue, NULL, mine.organization_id, statement_timestamp(), NULL, false FROM unnest(queues) AS q (queue), mine
            ), running AS (
                SELECT j.queue, coalesce(
                    j.estimated_finish_at, j.claimed_at + make_interval(secs => j.total_tokens / s.tokens_per_second)
                ) AS ends_at
                FROM jobs j LEFT JOIN speeds s ON s.queue = j.queue AND s.base = j.base
                WHERE j.queue = ANY (queues) AND j.state = 'running'
            ), clocks AS (
                SELECT q.queue, coalesce(c.virtual_seconds, 0) AS virtual_seconds, c.released_at,
                    (SELECT count(*) FROM running r WHERE r.queue = q.queue) AS workers,
                    (SELECT CASE WHEN count(*) = count(r.ends_at)  -- greatest() would take an unknown end for now
                        THEN coalesce(sum(greatest(0, extract(epoch FROM r.ends_at - statement_timestamp()))), 0) END
                     FROM running r WHERE r.queue = q.queue) AS seconds_left,
                    (SELECT min(w.queued_at) FROM waiting w WHERE w.queue = q.queue AND NOT w.is_held) AS first_queued_at,
                    (SELECT coalesce(max(s.used_until), 0) FROM queue_shares s WHERE s.queue = q.queue) AS last_used_until
                FROM unnest(queues) AS q (queue) LEFT JOIN queue_clocks c ON c.queue = q.queue
            ), starts AS MATERIALIZED (  -- once a queue, and not once a job
                SELECT c.queue, greatest(1, c.workers) AS workers, c.seconds_left,
                    CASE WHEN c.workers = 0 AND coalesce(c.released_at <= c.first_queued_at, true)
                        THEN greatest(c.virtual_seconds, c.last_used_until) ELSE c.virtual_seconds END AS virtual_now
                FROM clocks c
            ), tagged AS (
                SELECT w.queue, w.id, w.organization_id, w.queued_at, w.seconds, w.is_held, s.workers, s.seconds_left,
                    greatest(s.virtual_now, coalesce(u.used_until, 0)) + coalesce(sum(coalesce(w.seconds, 600) / o.weight) OVER (
                        PARTITION BY w.queue, w.organization_id ORDER BY w.is_held, w.queued_at, w.id
                        ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
                    ), 0) AS turn_at
                FROM waiting w JOIN starts s ON s.queue = w.queue JOIN organizations o ON o.id = w.organization_id
                LEFT JOIN queue_shares u ON u.queue = w.queue AND u.organization_id = w.organization_id
            ), placed AS (
                SELECT t.*, row_number() OVER turns AS place,
                    CASE WHEN count(*) OVER ahead = count(t.seconds) OVER ahead THEN coalesce(sum(t.seconds) OVER ahead, 0) END AS seconds_ahead
                FROM tagged t
                WINDOW turns AS (PARTITION BY t.queue ORDER BY t.is_held, t.turn_at, t.queued_at, t.id),
                    ahead AS (turns ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
            ), told AS (
                SELECT p.*, statement_timestamp() + make_interval(secs => (p.seconds_left + p.seconds_ahead) / p.workers) AS starts_at
                FROM placed p JOIN mine ON mine.organization_id = p.organization_id
            )
            SELECT t.queue, t.id, t.place, t.starts_at, t.starts_at + make_interval(secs => t.seconds) FROM told t
        $$""")
    op.execute("""
        CREATE FUNCTION queue_loads()
        RETURNS TABLE (queue text, waiting bigint, running bigint)
        LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
            SELECT l.queue, sum(l.waiting), sum(l.running) FROM (
                SELECT j.queue, 1 AS waiting, 0 AS running FROM jobs j WHERE j.state = 'queued' AND j.desired = 'run'
                UNION ALL
                SELECT j.queue, 0, 1 FROM jobs j WHERE j.state = 'running'
            ) l GROUP BY l.queue
        $$""")
    for function in ("queue_places(text[])", "queue_loads()"):
        op.execute(f"REVOKE ALL ON FUNCTION {function} FROM public")
        op.execute(f"GRANT EXECUTE ON FUNCTION {function} TO tunesmith_api, tunesmith_system")


def downgrade() -> None:
    op.execute("DROP FUNCTION queue_loads()")
    op.execute("DROP FUNCTION queue_places(text[])")
    op.execute("DROP POLICY queue_places ON jobs")
    for table in ("throughputs", "queue_shares", "queue_clocks"):
        op.drop_table(table)
    op.create_index("ix_jobs_claimable", "jobs", ["queue", "not_before"], unique=False, postgresql_where="state = 'queued'")
    op.drop_index("ix_jobs_in_turn", table_name="jobs", postgresql_where="state = 'queued'")
    for column in ("total_tokens", "worker_seconds", "charged_seconds", "claimed_at"):
        op.drop_column("jobs", column)
    op.drop_constraint(op.f("ck_organizations_weight"), "organizations", type_="check")
    op.drop_column("organizations", "weight")
