"""The database, and the three roles that connect to it. Operators and tests come through here as well."""

from dataclasses import asdict, dataclass

import psycopg
from psycopg import sql

DATABASE = "tunesmith"


@dataclass(frozen=True)
class Passwords:
    owner: str
    api: str
    system: str


def ensure_database(superuser: psycopg.Connection, passwords: Passwords, *, database: str = DATABASE) -> None:
    """Make the roles and an empty database that `tunesmith_owner` owns; what exists already gets these passwords.

    `superuser` must be in autocommit mode, as Postgres makes no database in a transaction. Migrations grant the rest.
    """
    for role, password in asdict(passwords).items():
        _ensure_role(superuser, f"tunesmith_{role}", password)
    name = sql.Identifier(database)
    if not _exists(superuser, "SELECT FROM pg_database WHERE datname = %s", database):
        superuser.execute(sql.SQL("CREATE DATABASE {} OWNER tunesmith_owner").format(name))
    superuser.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(name))
    superuser.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO tunesmith_api, tunesmith_system").format(name))


def _ensure_role(superuser: psycopg.Connection, role: str, password: str) -> None:
    if not _exists(superuser, "SELECT FROM pg_roles WHERE rolname = %s", role):
        superuser.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    # hashed here, so that a failing statement cannot carry the password into the server's log
    verifier = superuser.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()
    superuser.execute(
        sql.SQL("ALTER ROLE {} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD {}").format(
            sql.Identifier(role), sql.Literal(verifier)
        )
    )


def _exists(superuser: psycopg.Connection, query: "psycopg.abc.QueryNoTemplate", name: str) -> bool:
    return superuser.execute(query, (name,)).fetchone() is not None
