#!/usr/bin/env bash
# Runs once, when the Postgres container makes its data directory: the three roles and the database they share.
set -euo pipefail
export SECRETS_DIR=${SECRETS_DIR:-/run/secrets}
# read by psql itself, so that no password is on a command line; a statement that fails is not logged, as it would carry one
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" <<'SQL'
\set owner `cat "$SECRETS_DIR/owner_password"`
\set api `cat "$SECRETS_DIR/api_password"`
\set system `cat "$SECRETS_DIR/system_password"`
SET log_min_error_statement = panic;
CREATE ROLE tunesmith_owner  LOGIN PASSWORD :'owner';
CREATE ROLE tunesmith_api    LOGIN PASSWORD :'api';
CREATE ROLE tunesmith_system LOGIN PASSWORD :'system';
CREATE DATABASE tunesmith OWNER tunesmith_owner;
REVOKE ALL ON DATABASE tunesmith FROM PUBLIC;
GRANT CONNECT ON DATABASE tunesmith TO tunesmith_api, tunesmith_system;
SQL
