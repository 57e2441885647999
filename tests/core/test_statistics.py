"""Statistics against numbers worked out by hand."""

import pytest

from app.core import statistics


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (8, 2, 2 * (45 + 10 + 1) / 1024), (2, 8, 112 / 1024), (4, 4, 1.0)],
)
def test_mcnemar(gained: int, lost: int, p: float) -> None:
    assert statistics.mcnemar_p(gained, lost) == pytest.approx(p)


def test_an_interval_of_many_is_that_of_the_normal_distribution() -> None:
    """300 of 1,000: 0.3 ± 1.96 · √(0.3 · 0.7 / 1000)."""
    found = statistics.bootstrap([1] * 300 + [0] * 700, seed=1)

    assert found.mean == 0.3
    assert (found.low, found.high) == (pytest.approx(0.3 - 0.0284, abs=0.002), pytest.approx(0.3 + 0.0284, abs=0.002))


def test_of_two_rows_every_resample_is_known() -> None:
    """0, ½, ½, 1 with equal chance: the middle 95 % reaches from 0 to 1."""
    found = statistics.bootstrap([0, 1], seed=1)

    assert (found.mean, found.low, found.high) == (0.5, 0, 1)
    assert statistics.bootstrap([0.7] * 5, seed=1).low == pytest.approx(0.7)


def test_a_seed_gives_the_same_again_and_however_much_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [n % 7 / 7 for n in range(50)]
    first = statistics.bootstrap(scores, seed=3)
    assert statistics.bootstrap(scores, seed=3) == first != statistics.bootstrap(scores, seed=4)
    monkeypatch.setattr(statistics, "_AT_ONCE", 1000)

    assert statistics.bootstrap(scores, seed=3) == first


def test_scores_of_0_and_1_are_compared_by_mcnemar_on_the_same_rows() -> None:
    found = statistics.paired([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 0], seed=1)

    assert (found.test, found.better, found.worse) == ("mcnemar", 5, 0)
    assert found.p_value == pytest.approx(2 / 32)
    assert found.difference.mean == pytest.approx(5 / 7)


def test_other_scores_are_compared_by_their_differences() -> None:
    """Each row gains exactly 0.1, so that no resample could say otherwise, whatever the rows' own spread."""
    theirs = [n / 100 for n in range(100)]
    found = statistics.paired([score + 0.1 for score in theirs], theirs, seed=1)

    assert (found.test, found.better, found.worse) == ("paired_bootstrap", 100, 0)
    assert (found.difference.low, found.difference.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert found.p_value == pytest.approx(2 / 10_001)
    assert statistics.paired([0.2, 0.4], [0.4, 0.2], seed=1).p_value == 1


def test_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="nothing"):
        statistics.bootstrap([], seed=1)
