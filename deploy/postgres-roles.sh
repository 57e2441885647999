#!/usr/bin/env bash
# Runs once, when the Postgres container makes its data directory: the three roles and the database they share.
set -euo pipefail
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" \
     --set owner="$OWNER_PASSWORD" --set api="$API_PASSWORD" --set system="$SYSTEM_PASSWORD" <<'SQL'
CREATE ROLE tunesmith_owner  LOGIN PASSWORD :'owner';
CREATE ROLE tunesmith_api    LOGIN PASSWORD :'api';
CREATE ROLE tunesmith_system LOGIN PASSWORD :'system';
CREATE DATABASE tunesmith OWNER tunesmith_owner;
REVOKE ALL ON DATABASE tunesmith FROM PUBLIC;
GRANT CONNECT ON DATABASE tunesmith TO tunesmith_api, tunesmith_system;
SQL
