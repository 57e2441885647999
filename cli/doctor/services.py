"""The servers of a service: whether Postgres, the broker and the bucket answer with the settings' credentials."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cli.doctor.finding import Finding, failed, ok, skipped, warning

if TYPE_CHECKING:
    from app.core.catalog import Base
    from app.core.settings import Settings

CONNECT_SECONDS = 3
ANSWER_SECONDS = 8.0  # for the whole check, name resolution and a server that accepts and says nothing included
REDIS_SCHEMES = frozenset({"redis", "rediss"})


def are_named(settings: "Settings") -> bool:
    return not settings.model_fields_set.isdisjoint({"database", "broker_url", "storage"})


def examine(settings: "Settings", *, all_of_them: bool) -> Iterator[Finding]:
    """Those that the settings name, or all, with the defaults of the rest. At once: each may take until its time-out."""
    running = list[_Check]()
    for role in ("api", "system", "owner"):
        if all_of_them or f"{role}_url" in settings.database.model_fields_set:
            url = getattr(settings.database, f"{role}_url").get_secret_value()
            variable = f"TUNESMITH_DATABASE__{role.upper()}_URL"
            running.append(_Check(f"database {role}", variable, partial(_database, url=url, variable=variable)))
    if all_of_them or "broker_url" in settings.model_fields_set:
        running.append(_Check("broker", "TUNESMITH_BROKER_URL", partial(_broker, url=settings.broker_url)))
    if all_of_them or "storage" in settings.model_fields_set:
        running.append(_Check("bucket", "TUNESMITH_STORAGE__…", partial(_bucket, settings=settings)))
    give_up_at = time.monotonic() + ANSWER_SECONDS
    yield from (check.finding(give_up_at) for check in running)


class _Check:
    """One check in a thread of its own, which is left behind when it does not come back."""

    def __init__(self, name: str, variable: str, check: Callable[[str], Finding]) -> None:
        self._name, self._variable, self._check = name, variable, check
        self._found: Finding | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def finding(self, give_up_at: float) -> Finding:
        self._thread.join(max(0.0, give_up_at - time.monotonic()))
        remedy = "see that the address is right, and that a firewall lets this machine through"
        return self._found or failed(self._name, f"no answer within {ANSWER_SECONDS:.0f} s", remedy)

    def _run(self) -> None:
        try:
            self._found = self._check(self._name)
        except Exception as error:  # a wrong URL fails in as many ways as there are libraries
            self._found = failed(self._name, f"{type(error).__name__}: {error}", f"correct {self._variable}")


def _database(name: str, url: str, variable: str) -> Finding:
    try:
        import psycopg
        from sqlalchemy import make_url
    except ImportError as error:
        return skipped(name, str(error), "pip install 'tunesmith[api]'")
    parsed = make_url(url)
    where = f"{parsed.username}@{parsed.host}:{parsed.port or 5432}/{parsed.database}"
    conninfo = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
    started = time.perf_counter()
    try:
        with psycopg.connect(conninfo, connect_timeout=CONNECT_SECONDS) as connection:
            facts = connection.execute(
                "SELECT current_setting('server_version'), rolsuper FROM pg_roles WHERE rolname = current_user"
            )
            version, is_superuser = facts.fetchone() or ("?", False)
    except psycopg.Error as error:
        return failed(name, f"{where}: {error}", f"start Postgres, or correct {variable}; `tunesmith migrate` makes the tables")
    found = f"{where}: PostgreSQL {version}, {_milliseconds(started)}"
    if is_superuser:
        return warning(
            name, f"{found}, as a superuser, whom row-level security does not bind", f"name an ordinary role in {variable}"
        )
    return ok(name, found)


def _broker(name: str, url: str) -> Finding:
    parts = urlsplit(url)
    where = f"{parts.scheme}://{parts.hostname}:{parts.port or 6379}{parts.path}"
    if parts.scheme not in REDIS_SCHEMES:
        return skipped(name, f"{where}: only Redis and Valkey can be asked", "celery -A worker.celery inspect ping")
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError:
        return skipped(name, f"{where}: the client is not installed; the API needs none", "pip install 'tunesmith[worker]'")
    started = time.perf_counter()
    options = {"socket_connect_timeout": CONNECT_SECONDS, "socket_timeout": CONNECT_SECONDS}
    try:
        with redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **options) as client:
            client.ping()
    except redis.RedisError as error:
        return failed(name, f"{where}: {error}", "start Valkey or Redis, or correct TUNESMITH_BROKER_URL")
    return ok(name, f"{where}: answers, {_milliseconds(started)}")


def _bucket(name: str, settings: "Settings") -> Finding:
    from app.core.errors import Unavailable
    from app.core.storage import open_storage

    where = f"{settings.storage.bucket} at {settings.storage.endpoint_url or 'AWS'}"
    started = time.perf_counter()
    try:
        open_storage(settings.storage, for_requests=True).check()  # who asks will not wait for minutes
    except Unavailable as error:
        remedy = "start the S3 server, or correct TUNESMITH_STORAGE__…; `tunesmith migrate` makes the bucket"
        if not settings.storage.endpoint_url or not settings.storage.access_key:
            variables = "TUNESMITH_STORAGE__ENDPOINT_URL, TUNESMITH_STORAGE__ACCESS_KEY and TUNESMITH_STORAGE__SECRET_KEY"
            remedy = f"set {variables}, or for AWS itself give its own credentials; `tunesmith migrate` makes the bucket"
        return failed(name, f"{where}: {error.__cause__ or error}", remedy)
    return ok(name, f"{where}: answers, {_milliseconds(started)}")


def hub(needed: "Base | None", *, is_online: bool) -> Finding:
    """Where bases of `hub` sources come from. Without it, one that is `needed` and not here yet cannot be served."""
    import httpx

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    has_token = os.environ.get("HF_TOKEN") or os.environ.get("HF_TOKEN_PATH")
    token = "a token is set" if has_token else "no HF_TOKEN: gated bases are refused"
    if not is_online:
        return skipped("hub", f"not asked; {token}", "tunesmith doctor --online")
    started = time.perf_counter()
    try:
        answer = httpx.get(f"{endpoint}/api/models", params={"limit": 1}, timeout=CONNECT_SECONDS)
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        remedy = "allow it through the firewall, or name a mirror: HF_ENDPOINT=…; bases from wheels and folders need no hub"
        if needed is not None:
            return failed("hub", f"{endpoint} does not answer, and {needed.id} is yet to be fetched from it: {error}", remedy)
        return warning("hub", f"{endpoint} does not answer: {error}", remedy)
    return ok("hub", f"{endpoint} answers, {_milliseconds(started)}; {token}")


def _milliseconds(started: float) -> str:
    return f"{(time.perf_counter() - started) * 1000:.0f} ms"
