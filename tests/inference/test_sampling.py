"""A row's choice is its own: its logits, its temperature, its seed."""

import json
from collections import Counter

import pytest
import torch

from app.core.engine import Chunk
from tests.inference import make
from worker.inference import sampling
from worker.inference.sequence import Choice, Sequence
from worker.model.base import LoadedBase


def sequence(base: LoadedBase, **sampling: object) -> Sequence:
    return Sequence(
        make.request(**sampling), vocabulary=make.vocabulary(base.renderer, stop_ids=()), max_tokens=9, emit=lambda chunk: None
    )


def choose(logits_BV: torch.Tensor, sequences: list[Sequence]) -> list[int | None]:
    """The tokens alone."""
    return [choice and choice.token for choice in sampling.choose(logits_BV, sequences)]


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


def test_penalties_and_bias_are_added_to_the_logits(oracle: LoadedBase) -> None:
    """Token 5 has been said three times, token 6 once."""
    one = sequence(oracle, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={7: 1.5})
    for token in (5, 5, 5, 6):
        one.accept(Choice(token))
    adjusted_V = sampling._adjusted(torch.zeros(1000), one)

    assert {token: float(adjusted_V[token]) for token in (5, 6, 7, 8)} == {5: -1.75, 6: -0.75, 7: 1.5, 8: 0.0}
    assert choose(torch.zeros((1, 1000)), [one]) == [7]


def test_a_penalty_counts_what_was_said_and_not_the_prompt(oracle: LoadedBase) -> None:
    asked = Sequence(
        make.request([9, 9, 9], frequency_penalty=2.0),
        vocabulary=make.vocabulary(oracle.renderer, stop_ids=()),
        max_tokens=9,
        emit=lambda chunk: None,
    )
    logits_V = torch.zeros(1000)
    logits_V[9] = 1.0

    assert choose(logits_V[None], [asked]) == [9]
    asked.accept(Choice(9))
    assert choose(logits_V[None], [asked]) != [9]


def test_top_k_keeps_the_likeliest(oracle: LoadedBase) -> None:
    logits_V = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    one = sequence(oracle, temperature=1.0, top_k=2, seed=1)

    assert {choose(logits_V[None], [one])[0] for _ in range(300)} == {1, 3}


def test_logprobs_are_the_models_own(oracle: LoadedBase) -> None:
    """Bias and temperature choose the token; what is told of it they do not change."""
    logits_BV = logits(1)
    one = sequence(oracle, top_logprobs=3, temperature=0.5, logit_bias={11: 100})
    (choice,) = sampling.choose(logits_BV, [one])
    expected_V = torch.log_softmax(logits_BV[0], -1)
    likeliest = expected_V.argsort(descending=True)[:3].tolist()

    assert choice is not None and choice.token == 11
    assert choice.logprob == pytest.approx(float(expected_V[11]))
    assert choice.top == tuple((token, pytest.approx(float(expected_V[token]))) for token in likeliest)
    assert sampling.choose(logits_BV, [sequence(oracle, top_logprobs=0)])[0] == (
        likeliest[0],
        pytest.approx(float(expected_V[likeliest[0]])),
        (),
    )
    assert sampling.choose(logits_BV, [sequence(oracle)])[0] == (likeliest[0], 0.0, ())


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_whatever_the_model_wants_the_answer_meets_its_schema(oracle: LoadedBase, temperature: float) -> None:
    """Of noise: twenty answers, beside a row that is held to nothing."""
    vocabulary, told = make.vocabulary(oracle.renderer), list[str]()
    for seed in range(20):
        chunks = list[Chunk]()
        asked = make.request(json_schema=SCHEMA, temperature=temperature, seed=seed)
        held = Sequence(asked, vocabulary=vocabulary, max_tokens=200, emit=chunks.append)
        noise = torch.Generator().manual_seed(seed)
        while not held.is_over:
            logits_BV = torch.randn((2, vocabulary.size), generator=noise) * 3
            free, choice = sampling.choose(logits_BV, [sequence(oracle), held])
            assert free is not None and free.token == int(logits_BV[0].argmax())
            assert choice is not None
            held.accept(choice)
        assert held.finish_reason == "stop"
        told.append("".join(chunk.text for chunk in chunks))

    for text in told:
        answer = json.loads(text)
        assert set(answer) == {"name", "count"} and 1 <= answer["count"] <= 99 and len(answer["name"]) <= 8
    assert len(set(told)) > 10


def test_a_token_is_spelled_in_bytes(oracle: LoadedBase) -> None:
    vocabulary = make.vocabulary(oracle.renderer)
    ids = oracle.renderer.tokenizer.encode("Grüße", add_special_tokens=False).ids

    assert b"".join(vocabulary.spell(token) for token in ids) == "Grüße".encode()
    assert vocabulary.spell(min(oracle.renderer.stop_ids)).decode() == oracle.renderer.tokenizer.id_to_token(
        min(oracle.renderer.stop_ids)
    )
