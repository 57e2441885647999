"""The public API as customers' commands speak to it. Why not with the SDK: docs/decisions/0029-the-command-speaks-http.md."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import httpx

from cli import account
from cli.account import Account
from cli.failure import Failed

ATTEMPTS, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 3, 0.5, 30.0
WORTH_REPEATING = {408, 429, 500, 502, 503, 504}
CONNECT_SECONDS, SILENT_SECONDS = 10.0, 60.0  # a stream is kept alive every 15
WORK = httpx.Timeout(600.0, connect=CONNECT_SECONDS)  # a large upload is put together in minutes
PAGE = 100


class Refused(Failed):
    """The service answered that it will not."""

    def __init__(self, message: str, status: int, pause_seconds: float | None) -> None:
        super().__init__(message)
        self.status, self.pause_seconds = status, pause_seconds

    @property
    def is_passing(self) -> bool:
        return self.pause_seconds is not None


class Unreachable(Failed):
    """Nobody answered, or the answer broke off."""


@dataclass(frozen=True)
class Message:
    """A server-sent event."""

    id: str | None
    data: str


class Api:
    """Of one account. Everything raises Failed in words for people: Refused or Unreachable."""

    def __init__(self, account: Account, *, attempts: int = ATTEMPTS, seconds: float = SILENT_SECONDS) -> None:
        self.account, self._attempts = account, attempts
        try:
            self._http = httpx.Client(
                base_url=account.base_url,
                headers={"Authorization": f"Bearer {account.api_key}"},
                timeout=httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
                verify=account.base_url.startswith("https:"),  # certificates take longer to read than most requests
            )
        except (httpx.InvalidURL, UnicodeError) as error:
            raise Failed(f"{account.base_url!r} (from {account.source}) is no address: {error}") from error

    def __enter__(self) -> "Api":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> Any:
        return self._answer("GET", path, params=params)

    def post(self, path: str, body: object = None, **more: Any) -> Any:
        """Whatever dies in between, it is done once: each repetition carries the same key."""
        return self._answer("POST", path, json=body, headers={"Idempotency-Key": uuid4().hex}, timeout=WORK, **more)

    def delete(self, path: str) -> Any:
        return self._answer("DELETE", path)

    def page_through(self, path: str, most: int, **params: Any) -> list[dict[str, Any]]:
        """The first `most` of a list, over as many pages as it takes."""
        found: list[dict[str, Any]] = []
        while len(found) < most:
            page = self.get(path, limit=min(PAGE, most - len(found)), **params)
            found += page["data"]
            if not page["has_more"]:
                break
            params["after"] = page["last_id"]
        return found

    @contextmanager
    def stream(self, method: str, path: str, **request: Any) -> Iterator[Iterator[Message]]:
        """Server-sent events as they come. A stream is not repeated: who reads knows from where to go on."""
        try:
            with self._http.stream(method, path, **request) as answer:
                if not answer.is_success:
                    answer.read()
                    raise self._refusal(answer)
                yield _messages(answer.iter_lines())
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _answer(self, method: str, path: str, **request: Any) -> Any:
        for attempt in range(1, self._attempts + 1):
            try:
                return self._once(method, path, **request)
            except (Unreachable, Refused) as why:
                if attempt == self._attempts or (isinstance(why, Refused) and not why.is_passing):
                    raise
                asked = why.pause_seconds if isinstance(why, Refused) else None
            time.sleep(min(asked or FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), LONGEST_PAUSE_SECONDS))
        raise AssertionError("the last attempt returns or raises")

    def _once(self, method: str, path: str, **request: Any) -> Any:
        try:
            answer = self._http.request(method, path, **request)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if not answer.is_success:
            raise self._refusal(answer)
        try:
            return answer.json()
        except ValueError:
            raise Failed(f"{answer.url} does not answer as Tunesmith does: is that its address? {self._whence}") from None

    def _refusal(self, answer: httpx.Response) -> Refused:
        try:
            message = str(answer.json()["error"]["message"])
        except (ValueError, LookupError, TypeError):
            message = f"{answer.request.method} {answer.url} was answered with {answer.status_code}, and not by Tunesmith"
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            message += f"; {self._whence}; `tunesmith login` takes another key"
        if answer.is_server_error and (request_id := answer.headers.get("x-request-id")):
            message += f" (request {request_id})"
        is_passing = answer.status_code in WORTH_REPEATING and answer.headers.get("x-should-retry") != "false"
        pause = answer.headers.get("retry-after", "")
        return Refused(message, answer.status_code, (float(pause) if pause.isdecimal() else 0.0) if is_passing else None)

    def _unreachable(self, error: httpx.TransportError) -> Unreachable:
        why = str(error) or type(error).__name__
        return Unreachable(f"{self.account.base_url} does not answer ({why}); {self._whence}; is it up?")

    @property
    def _whence(self) -> str:
        return f"address and key are from {self.account.source}"


def connect(data_dir: Path | None) -> Api:
    """With the account that holds here. Raises Failed."""
    return Api(account.find(data_dir))


def _messages(lines: Iterator[str]) -> Iterator[Message]:
    id_: str | None = None
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "id":
            id_ = value
        elif name == "data":
            yield Message(id_, value)
