"""A row's choice is its own: its logits, its temperature, its seed."""

from collections import Counter

import pytest
import torch

from tests.inference import make
from worker.inference.sampling import choose
from worker.inference.sequence import Sequence
from worker.model.base import LoadedBase


def sequence(base: LoadedBase, **sampling: object) -> Sequence:
    return Sequence(
        make.request(**sampling), tokenizer=base.renderer.tokenizer, stop_ids=(), max_tokens=9, emit=lambda chunk: None
    )


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, 1000), generator=torch.Generator().manual_seed(seed)) * 3


def test_temperature_zero_takes_the_most_likely_token_beside_rows_that_draw(oracle: LoadedBase) -> None:
    logits_BV = logits(3)
    chosen = choose(logits_BV, [sequence(oracle), sequence(oracle, temperature=1.5), sequence(oracle)])

    assert [chosen[0], chosen[2]] == [int(logits_BV[0].argmax()), int(logits_BV[2].argmax())]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_seed_gives_the_same_tokens_whoever_stands_beside(oracle: LoadedBase, top_p: float) -> None:
    asked = {"temperature": 1.0, "top_p": top_p, "seed": 7}
    alone, accompanied = sequence(oracle, **asked), sequence(oracle, **asked)
    neighbours = [sequence(oracle, temperature=1.0), sequence(oracle)]
    steps = [logits(3, seed) for seed in range(20)]

    said_alone = [choose(step[1:2], [alone])[0] for step in steps]
    said_beside = [choose(step, [neighbours[0], accompanied, neighbours[1]])[1] for step in steps]
    assert said_alone == said_beside
    assert len(set(said_alone)) > 10


def test_without_a_seed_two_requests_differ(oracle: LoadedBase) -> None:
    one, other = sequence(oracle, temperature=2.0), sequence(oracle, temperature=2.0)

    assert [choose(logits(1), [one]) for _ in range(20)] != [choose(logits(1), [other]) for _ in range(20)]


def test_draws_follow_the_distribution(oracle: LoadedBase) -> None:
    probabilities_V = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    one = sequence(oracle, temperature=1.0, seed=1)
    counts = Counter(choose(probabilities_V.log()[None], [one])[0] for _ in range(4000))

    assert counts[4] == 0
    assert all(abs(counts[token] / 4000 - float(probabilities_V[token])) < 0.03 for token in range(4))


def test_top_p_keeps_the_fewest_tokens_that_reach_it(oracle: LoadedBase) -> None:
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    one = sequence(oracle, temperature=1.0, top_p=0.7, seed=1)

    assert {choose(logits_V[None], [one])[0] for _ in range(300)} == {0, 1}


def test_a_flat_distribution_reaches_beyond_the_most_likely_few(oracle: LoadedBase) -> None:
    one = sequence(oracle, temperature=1.0, top_p=0.9, seed=1)
    drawn = {choose(torch.zeros((1, 1000)), [one])[0] for _ in range(2000)}

    assert 800 < len(drawn) <= 900


def test_a_row_that_is_not_finite_has_no_token(oracle: LoadedBase) -> None:
    logits_BV = logits(3)
    logits_BV[1, 5] = float("nan")

    chosen = choose(logits_BV, [sequence(oracle), sequence(oracle), sequence(oracle, temperature=1.0)])
    assert [token is None for token in chosen] == [False, True, False]
