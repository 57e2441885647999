"""Who may see what: grants for the roles, row-level security for the tenants, and the one door for key lookup.

`tunesmith_owner` runs migrations and owns the tables; `tunesmith_api` sees one organization's rows a transaction;
`tunesmith_system` (workers, relay) sees all. The roles themselves are made by whoever sets up the server.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TENANT_TABLES = {
    "organizations": "id",
    "projects": "organization_id",
    "api_keys": "organization_id",
    "files": "organization_id",
    "jobs": "organization_id",
    "job_events": "organization_id",
    "job_checkpoints": "organization_id",
    "adapters": "organization_id",
    "webhook_endpoints": "organization_id",
    "webhook_deliveries": "organization_id",
    "usage_records": "organization_id",
}


def upgrade() -> None:
    op.execute("GRANT USAGE ON SCHEMA public TO tunesmith_api, tunesmith_system")
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO tunesmith_system")
    op.execute("REVOKE INSERT, UPDATE, DELETE ON alembic_version FROM tunesmith_system")
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON engines TO tunesmith_api")
    op.execute("GRANT INSERT ON outbox TO tunesmith_api")  # it may ask, not read what others asked
    for table, column in TENANT_TABLES.items():
        op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO tunesmith_api")
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY system ON {table} TO tunesmith_system USING (true) WITH CHECK (true)")
        # nullif: a pooled connection answers '' for a setting that an earlier transaction made local
        mine = f"{column} = nullif(current_setting('app.org', true), '')"
        op.execute(f"CREATE POLICY tenant ON {table} TO tunesmith_api USING ({mine}) WITH CHECK ({mine})")
    op.execute("REVOKE UPDATE, DELETE ON usage_records FROM tunesmith_api, tunesmith_system")  # append-only
    _key_lookup()


def _key_lookup() -> None:
    """A request has no organization before its key is known, so its hash is looked up with the owner's eyes."""
    op.execute("CREATE POLICY key_lookup ON api_keys FOR SELECT TO tunesmith_owner USING (true)")
    op.execute("CREATE POLICY key_lookup ON organizations FOR SELECT TO tunesmith_owner USING (true)")
    op.execute("""
        CREATE FUNCTION find_api_key(key_hash text)
        RETURNS TABLE (key_id text, organization_id text, project_id text, organization_slug text)
        LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
            SELECT k.id, k.organization_id, k.project_id, o.slug
            FROM api_keys k JOIN organizations o ON o.id = k.organization_id
            WHERE k.hash = key_hash AND k.revoked_at IS NULL
              AND (k.expires_at IS NULL OR k.expires_at > clock_timestamp())
        $$""")
    op.execute("REVOKE ALL ON FUNCTION find_api_key(text) FROM public")
    op.execute("GRANT EXECUTE ON FUNCTION find_api_key(text) TO tunesmith_api, tunesmith_system")


def downgrade() -> None:
    op.execute("DROP FUNCTION find_api_key(text)")
    op.execute("DROP POLICY key_lookup ON organizations")
    op.execute("DROP POLICY key_lookup ON api_keys")
    for table in TENANT_TABLES:
        op.execute(f"DROP POLICY tenant ON {table}")
        op.execute(f"DROP POLICY system ON {table}")
        op.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    op.execute("REVOKE ALL ON ALL TABLES IN SCHEMA public FROM tunesmith_api, tunesmith_system")
    op.execute("REVOKE USAGE ON SCHEMA public FROM tunesmith_api, tunesmith_system")
