"""A short trial: every crash point is hit once, and processes are struck on top of that, while customers work."""

import random
import time
from pathlib import Path

import pytest

from app.core import crash
from bench.chaos import faults, house, trial
from bench.chaos.__main__ import strike_all
from bench.chaos.checks import CHECKS
from bench.chaos.house import House, Stuck
from bench.chaos.ledger import Ledger
from bench.chaos.trial import Outcome
from tests.embedded.patience import PATIENCE_SECONDS

FAULTS, SEED = 3, 11
PAUSE_SECONDS = 1.0  # of customers: their own work takes what else the service would have
POINTS_SECONDS = 1200.0  # a limit: three minutes do where nothing else runs

LIMITS = {
    faults: ("RECOVERY_SECONDS",),
    house: ("UP_SECONDS", "STOP_SECONDS", "EVENTUALLY_SECONDS"),
    trial: ("REST_SECONDS",),
}

pytestmark = pytest.mark.timeout(2400)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, bases_dir: Path) -> Outcome:
    folder = tmp_path_factory.mktemp("chaos")
    armed = folder / "armed"
    armed.mkdir()

    def strike(at: House, ledger: Ledger) -> None:
        for name in crash.POINTS:
            (armed / name).touch()
        strike_all(at, ledger, cycles=FAULTS, seed=SEED)
        rng, give_up_at = random.Random(SEED), time.monotonic() + POINTS_SECONDS
        while left := sorted(point.name for point in armed.iterdir()):
            if time.monotonic() > give_up_at:
                raise Stuck(f"nobody came to {left}")
            if "attempt_released" in left:  # it waits for an attempt that breaks off
                faults.killed("trainer", at, rng)
            time.sleep(1)
        for name in crash.POINTS:
            ledger.note("hit", point=name)

    with pytest.MonkeyPatch.context() as unhurried:  # what a service promises on a machine of its own
        for room, names in LIMITS.items():
            for name in names:
                unhurried.setattr(room, name, getattr(room, name) + PATIENCE_SECONDS)
        return trial.run(folder / "data", bases_dir, seed=SEED, strike=strike, crash_at=armed, pause_seconds=PAUSE_SECONDS)


@pytest.mark.parametrize("point", crash.POINTS)
def test_a_process_has_died_at_each_point(outcome: Outcome, point: str) -> None:
    assert point in {entry["point"] for entry in outcome.ledger.all("hit")}


@pytest.mark.parametrize("invariant", CHECKS)
def test_what_must_hold_has_held(outcome: Outcome, invariant: str) -> None:
    assert outcome.broken[invariant] == []


def test_customers_were_busy_meanwhile(outcome: Outcome) -> None:
    assert all(outcome.ledger.all(kind) for kind in ("file", "job", "chat", "webhook", "followed"))


def test_attempts_have_gone_on_where_others_broke_off(outcome: Outcome) -> None:
    """Else it was never asked from where."""
    assert outcome.checks.lost_steps()
