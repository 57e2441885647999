"""Noise on embeddings: as long as the document allows, drawn anew for each step, and only while training."""

import math

import torch
from torch import nn

from app.core.spec import TrainSpec
from tests.training import make
from tests.training.test_trainee import excite, packed
from worker.model.base import LoadedBase
from worker.training import neftune
from worker.training.data import Totals
from worker.training.trainee import adapted


def test_each_document_gets_noise_by_its_own_length() -> None:
    embeddings, tokens = nn.Embedding(10, 16).requires_grad_(False), torch.arange(10)
    torch.manual_seed(3)
    with neftune.noised(embeddings, (2, 8), alpha=5.0):
        added = embeddings(tokens[None])[0] - embeddings.weight[tokens]
    for rows, length in ((added[:2], 2), (added[2:], 8)):
        bound = 5 / math.sqrt(length * 16)
        assert 0.8 * bound < float(rows.abs().max()) <= bound * 1.001
    assert torch.equal(embeddings(tokens), embeddings.weight)


def test_an_evaluation_hears_no_noise_and_a_seed_gives_the_same(tiny: LoadedBase) -> None:
    def losses(spec: TrainSpec, *, training: bool, seed: int) -> float:
        with adapted(tiny, spec) as trainee:
            excite(trainee)
            trainee.model.train(training)
            torch.manual_seed(seed)
            return sum(float(trainee.loss(batch, of=Totals.of([batch])).loss_sum) for batch in packed(tiny, max_tokens=160))

    plain, noisy = make.spec(), make.spec(neftune_noise_alpha=20)
    assert losses(noisy, training=False, seed=1) == losses(plain, training=False, seed=1)
    assert losses(noisy, training=True, seed=1) == losses(noisy, training=True, seed=1)
    assert len({losses(noisy, training=True, seed=seed) for seed in (1, 2)} | {losses(plain, training=True, seed=1)}) == 3
