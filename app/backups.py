"""Objects are deleted after the rows that named them, and while a backup is made not at all: it copies rows first, and then what
they name. An advisory lock says that one is made; it ends with the connection of whoever makes it."""

from sqlalchemy import func, orm, select

LOCK = 7_301_950


def is_under_way(session: orm.Session) -> bool:
    """Asked before objects are deleted. A backup that begins later has no rows that name them: they are gone by then."""
    return not session.scalar(select(func.pg_try_advisory_xact_lock_shared(LOCK)))
