"""Room for a few at once: nobody takes it all, and nobody waits for ever."""

import threading
import time

import pytest

from app import places
from app.core.errors import Unavailable
from app.places import Places


def test_one_of_an_organization_and_a_few_of_all_look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PATIENCE_SECONDS", 0.01)
    room = Places("dry runs", code="dry_run_busy")

    def is_taken(organization: str) -> bool:
        try:
            with room.take(organization):
                return False
        except Unavailable as busy:
            assert (busy.status, busy.code) == (503, "dry_run_busy")
            return True

    with room.take("a"):
        assert is_taken("a") and not is_taken("b")
        with room.take("b"):
            assert is_taken("c")
        assert not is_taken("c")
    assert not is_taken("a")


def test_who_waits_gets_the_place_that_is_left_and_no_more_than_a_few_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PATIENCE_SECONDS", 60)
    room, done = Places("dry runs", code="dry_run_busy"), list[str]()

    def look(organization: str) -> None:
        with room.take(organization):
            done.append(organization)

    with room.take("a"), room.take("b"):
        waiting = [threading.Thread(target=look, args=(f"w{number}",)) for number in range(places.MOST_WAITING)]
        for thread in waiting:
            thread.start()
        while room._waiting < places.MOST_WAITING:
            time.sleep(0.001)
        with pytest.raises(Unavailable):
            look("late")
    for thread in waiting:
        thread.join()

    assert sorted(done) == ["w0", "w1", "w2", "w3"]
