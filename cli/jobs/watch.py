"""Follow a job's events: as lines, as JSON, or as a picture that changes. Who follows changes nothing about the job."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from cli.api import Api, Refused, Unreachable
from cli.failure import Failed, say
from cli.output import clock_time

DONE = "[DONE]"
OVER = {"succeeded": 0, "failed": 1, "cancelled": 1}  # and the command's exit status
LOOK_SECONDS = 2.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0
SHARES = 20  # of a run's steps, each of which is a line

Event = dict[str, Any]
Job = dict[str, Any]


class Teller(Protocol):
    """Who is shown what goes on."""

    def look(self, job: Job) -> None: ...
    def tell(self, event: Event) -> None: ...
    def trouble(self, why: str) -> None: ...


def follow(api: Api, job_id: str, *, after: str | None, on_trouble: Callable[[Failed], None]) -> Iterator[Event]:
    """Every event behind `after`, once and in order, until the job is over: what breaks off is taken up at its last event.

    Raises Refused, where that is final.
    """
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            with _stream(api, job_id, after) as messages:
                for message in messages:
                    if message.data == DONE:
                        return
                    after, pause = message.id, FIRST_PAUSE_SECONDS
                    yield json.loads(message.data)
        except (Unreachable, Refused) as why:
            _require_passing(why)
            on_trouble(why)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def watch(api: Api, job: Job, teller: Teller, *, after: str | None = None) -> int:
    """Until the job is over. Returns the exit status. Ctrl-C leaves the job alone, and says how to go on watching."""
    try:
        last = _watched(api, job, teller, after)
    except KeyboardInterrupt:
        say(f"{job['id']} goes on; watch it again: tunesmith jobs watch {job['id']}")
        return 130
    if last["error"]:
        say(f"{job['id']} has failed: {last['error']['message']}")
    return OVER[last["status"]]


@dataclass(frozen=True)
class _End:
    """Of the events. `why`: None if the job is over."""

    why: BaseException | None


def _watched(api: Api, job: Job, teller: Teller, after: str | None) -> Job:
    """The job as it is in the end. Events come through a thread of their own, and in between the job is looked at."""
    news: SimpleQueue[Event | Failed | _End] = SimpleQueue()
    threading.Thread(target=_read, args=(api, job["id"], after, news), daemon=True).start()
    teller.look(job)
    is_over, looked_at = False, time.monotonic()
    while True:
        with suppress(Empty):
            is_over |= _heard(news.get(timeout=LOOK_SECONDS), teller)
        if is_over or time.monotonic() - looked_at >= LOOK_SECONDS:
            try:
                job = api.get(f"/fine_tuning/jobs/{job['id']}")
                if is_over or job["status"] not in OVER:  # how it ended is the last word, behind all events
                    teller.look(job)
            except (Unreachable, Refused) as why:
                _require_passing(why)
                teller.trouble(str(why))
            else:
                if is_over:
                    return job
            looked_at = time.monotonic()


def _heard(news: Event | Failed | _End, teller: Teller) -> bool:
    """Whether it was the last."""
    if isinstance(news, _End):
        if news.why:
            raise news.why
        return True
    if isinstance(news, Failed):
        teller.trouble(str(news))
    else:
        teller.tell(news)
    return False


def _require_passing(why: Failed) -> None:
    if isinstance(why, Refused) and not why.is_passing:
        raise why


def _read(api: Api, job_id: str, after: str | None, news: "SimpleQueue[Event | Failed | _End]") -> None:
    try:
        for event in follow(api, job_id, after=after, on_trouble=news.put):
            news.put(event)
        news.put(_End(None))
    except BaseException as why:  # whatever it is, it is the watcher's
        news.put(_End(why))


def _stream(api: Api, job_id: str, after: str | None) -> Any:
    headers = {"Last-Event-ID": after} if after else {}
    return api.stream("GET", f"/fine_tuning/jobs/{job_id}/events", params={"stream": "true"}, headers=headers)


class Silent:
    """For who only waits for the end."""

    def look(self, job: Job) -> None:
        pass

    def tell(self, event: Event) -> None:
        pass

    def trouble(self, why: str) -> None:
        say(f"{why} Going on as soon as it does.")


class Json(Silent):
    """An event a line, as the API has it."""

    def tell(self, event: Event) -> None:
        print(json.dumps(event, ensure_ascii=False), flush=True)


class Lines(Silent):
    """What is to be read later: every message, and some of the steps."""

    def __init__(self) -> None:
        self._standing = ""
        self._share = -1

    def look(self, job: Job) -> None:
        if (standing := standing_of(job)) != self._standing:
            self._standing = standing
            print(f"{job['id']}: {standing}", flush=True)

    def tell(self, event: Event) -> None:
        data = event["data"] or {}
        if "train_loss" in data:
            share = data["step"] * SHARES // data["total_steps"]
            if share == self._share:
                return
            self._share = share
        rate = f", {data['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in data else ""
        mark = "" if event["level"] == "info" else f"{event['level']}: "
        print(f"{clock_time(event['created_at'])}  {mark}{event['message']}{rate}", flush=True)


def standing_of(job: Job) -> str:
    """Its state, for people: where it waits, whom it waits for, what it has become."""
    if job["paused"]:
        return f"paused; tunesmith jobs resume {job['id']} lets it go on"
    if place := job["queue"]:
        start = f", starts about {clock_time(place['estimated_start'])}" if place["estimated_start"] else ""
        return f"{job['status']}, place {place['position']} of {place['name']}{start}"
    return f"{job['status']}: {job['fine_tuned_model']}" if job["fine_tuned_model"] else str(job["status"])
