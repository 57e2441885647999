"""When a job will be done, as its worker tells it."""

import random

import pytest

from app.core.events import Stepped
from worker import heart
from worker.heart import _Pace


def test_the_time_left_is_within_a_fifth_after_a_tenth_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of very different lengths, a checkpoint every twenty: what counts is tokens."""
    clock, rng, pace = [0.0], random.Random(4), _Pace()
    monkeypatch.setattr(heart.time, "monotonic", lambda: clock[0])
    sizes = [rng.randint(200, 4000) for _ in range(200)]
    seconds = [size / 1000 * rng.uniform(0.9, 1.1) + (3 if number % 20 == 19 else 0) for number, size in enumerate(sizes)]
    clock[0] += 9  # getting ready is no pace

    for number, (size, took) in enumerate(zip(sizes, seconds, strict=True)):
        clock[0] += took
        pace.note(stepped(number + 1, tokens=size, left=sum(sizes[number + 1 :])))
        if 20 <= number < 190:
            assert pace.seconds_left == pytest.approx(sum(seconds[number + 1 :]), rel=0.2)


def test_nothing_is_told_before_there_is_a_pace() -> None:
    pace = _Pace()
    pace.note(stepped(1, tokens=10, left=90))

    assert pace.seconds_left is None


def stepped(step: int, *, tokens: int, left: int) -> Stepped:
    return Stepped(
        step=step,
        total_steps=200,
        train_loss=1.0,
        train_mean_token_accuracy=0.5,
        learning_rate=1e-4,
        grad_norm=1.0,
        tokens=tokens,
        labelled_tokens=tokens,
        tokens_left=left,
        tokens_per_second=1.0,
    )
