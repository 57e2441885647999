"""Who signs in to the dashboard. The release before has none, and takes API keys only."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008s"
branch_labels = None
depends_on = None

TABLES = ("users", "sign_ins", "sign_in_links")


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("email", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("password_hash", sa.Text(), nullable=True),
        sa.Column("is_operator", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("not_before", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("disabled_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("project_id", sa.Text(collation="C"), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.CheckConstraint("email = lower(email)", name=op.f("ck_users_email_lower")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("email", name=op.f("uq_users_email")),
    )
    for table in TABLES[1:]:
        op.create_table(
            table,
            sa.Column("id", sa.Text(collation="C"), nullable=False),
            sa.Column("user_id", sa.Text(collation="C"), nullable=False),
            sa.Column("hash", sa.Text(), nullable=False),
            sa.Column("expires_at", sa.TIMESTAMP(timezone=True), nullable=False),
            sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
            sa.Column("project_id", sa.Text(collation="C"), nullable=False),
            sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
            sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f(f"fk_{table}_user_id"), ondelete="CASCADE"),
            sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{table}")),
            sa.UniqueConstraint("hash", name=op.f(f"uq_{table}_hash")),
        )
        op.create_index(op.f(f"ix_{table}_user_id"), table, ["user_id"], unique=False)
    op.add_column("sign_ins", sa.Column("by_link", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    mine = "organization_id = nullif(current_setting('app.org', true), '')"
    for table in TABLES:
        op.create_index(op.f(f"ix_{table}_organization_id"), table, ["organization_id"], unique=False)
        op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO tunesmith_api, tunesmith_system")
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY system ON {table} TO tunesmith_system USING (true) WITH CHECK (true)")
        op.execute(f"CREATE POLICY tenant ON {table} TO tunesmith_api USING ({mine}) WITH CHECK ({mine})")
        op.execute(f"CREATE POLICY who_is_it ON {table} TO tunesmith_owner USING (true)")
    _doors()


def _doors() -> None:
    """Nobody has an organization before it is known who they are: as with API keys, the owner's eyes look that up."""
    shown = """
        RETURNS TABLE (user_id text, name text, email text, is_operator boolean,
                       organization_id text, project_id text, organization_slug text)
        LANGUAGE sql {volatility} SECURITY DEFINER SET search_path = public, pg_temp AS $$"""
    whose = """
        SELECT u.id, u.name, u.email, u.is_operator, u.organization_id, u.project_id, o.slug
        FROM {of} JOIN organizations o ON o.id = u.organization_id WHERE u.disabled_at IS NULL"""
    found = whose.format(of="users u")
    by_cookie = whose.format(of="sign_ins s JOIN users u ON u.id = s.user_id")
    by_link = whose.format(of="taken t JOIN users u ON u.id = t.user_id")
    doors = {
        "find_user": f"{found} AND u.email = lower(wanted)",
        "find_sign_in": f"{by_cookie} AND s.hash = wanted AND s.expires_at > clock_timestamp()",
        "find_sign_in_link": (
            f"{whose.format(of='sign_in_links s JOIN users u ON u.id = s.user_id')}"
            " AND s.hash = wanted AND s.expires_at > clock_timestamp()"
        ),
        "take_sign_in_link": (
            "WITH taken AS (DELETE FROM sign_in_links WHERE hash = wanted AND expires_at > clock_timestamp()"  # noqa: S608
            f" RETURNING user_id) {by_link}"
        ),
    }
    for name, query in doors.items():
        volatility = "VOLATILE" if name.startswith("take") else "STABLE"
        op.execute(f"CREATE FUNCTION {name}(wanted text) {shown.format(volatility=volatility)} {query} $$")
        op.execute(f"REVOKE ALL ON FUNCTION {name}(text) FROM public")
        op.execute(f"GRANT EXECUTE ON FUNCTION {name}(text) TO tunesmith_api, tunesmith_system")


def downgrade() -> None:
    for name in ("find_user", "find_sign_in", "find_sign_in_link", "take_sign_in_link"):
        op.execute(f"DROP FUNCTION {name}(text)")
    for table in reversed(TABLES):
        op.drop_table(table)
