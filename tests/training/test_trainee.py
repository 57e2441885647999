"""The forward: packed documents, the CPU's repacking, precision, and a base that is left as it was (traps 1, 2, 3, 6, 9)."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.modules import has_avx512bf16
from torch import Tensor
from torch._dynamo.utils import counters

from app.core import catalog
from app.core.spec import TrainSpec
from tests.make import TINY
from tests.training import make
from worker.model import base as bases
from worker.model.base import LoadedBase
from worker.training import fused
from worker.training import loss as losses
from worker.training.data import MicroBatch, Totals, TrainData, micro_batches
from worker.training.evaluate import evaluate
from worker.training.optim import Optimizer
from worker.training.stock import StockDecoder
from worker.training.trainee import Trainee, adapted, meaningless, warm_up


@pytest.fixture
def trainee(exact: LoadedBase) -> Iterator[Trainee]:
    with adapted(exact, make.spec()) as trainee:
        excite(trainee)
        yield trainee


def excite(trainee: Trainee) -> None:
    """B of a fresh adapter is zero, and so would be the gradient of A."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainee.parameters:
            parameter.normal_(std=0.05)


def packed(base: LoadedBase, *, max_tokens: int) -> tuple[MicroBatch, ...]:
    return micro_batches(make.examples(base.renderer), range(8), max_tokens=max_tokens)


def hidden_of(trainee: Trainee, batch: MicroBatch) -> Tensor:
    tokens_T, positions_T = torch.from_numpy(batch.tokens_T), torch.from_numpy(batch.positions_T)
    every_T = torch.arange(len(tokens_T))
    return trainee.decoder.forward(every_T, tokens_T=tokens_T, positions_T=positions_T, lengths=batch.lengths)[0]


def gradient_of(trainee: Trainee, batches: tuple[MicroBatch, ...]) -> tuple[float, Tensor]:
    """Loss and gradient of one step, as the loop takes them."""
    totals = Totals.of(batches)
    for parameter in trainee.parameters:
        parameter.grad = torch.zeros_like(parameter)
    loss = sum(float(trainee.backward(batch, of=totals).loss_sum) for batch in batches) / totals.weight
    return loss, torch.cat([parameter.grad.flatten() for parameter in trainee.parameters])


def test_packed_documents_do_not_see_each_other(trainee: Trainee, exact: LoadedBase) -> None:
    (together,) = packed(exact, max_tokens=10_000)
    alone = [hidden_of(trainee, batch) for batch in packed(exact, max_tokens=1)]

    torch.testing.assert_close(hidden_of(trainee, together), torch.cat(alone), atol=1e-5, rtol=0)


def test_packed_documents_give_what_the_stock_model_gives_each(trainee: Trainee, exact: LoadedBase) -> None:
    """The oracle is transformers' own forward of one document, with its own attention and an explicit mask."""
    (together,) = packed(exact, max_tokens=10_000)
    found = hidden_of(trainee, together).split(list(together.lengths))
    model = exact.model
    model.config._attn_implementation = "eager"

    for hidden_TD, tokens_T in zip(found, torch.from_numpy(together.tokens_T).split(list(together.lengths)), strict=True):
        expected = model.get_decoder()(input_ids=tokens_T[None], attention_mask=torch.ones_like(tokens_T)[None]).last_hidden_state
        torch.testing.assert_close(hidden_TD, expected[0], atol=1e-5, rtol=0)


def test_the_step_s_loss_does_not_depend_on_how_it_is_cut_up(trainee: Trainee, exact: LoadedBase) -> None:
    whole_loss, whole = gradient_of(trainee, packed(exact, max_tokens=10_000))
    parts = packed(exact, max_tokens=1)
    parts_loss, gradient = gradient_of(trainee, parts)

    assert len(parts) == 8
    assert parts_loss == pytest.approx(whole_loss, rel=1e-5)
    torch.testing.assert_close(gradient, whole, atol=1e-6, rtol=1e-4)


def reference_loss(base: LoadedBase, spec: TrainSpec) -> Tensor:
    """A plain loop over the same step: one document at a time, full logits, -100 labels, cross-entropy as everybody writes it."""
    total, labelled = torch.zeros(()), 0
    for chat in make.chats(4):
        example = base.renderer.example(chat.messages)
        tokens_1T = torch.tensor([example.tokens])
        labels_T = torch.tensor([t if flag else -100 for t, flag in zip(example.tokens, example.is_trained, strict=True)])
        logits_TV = base.model(input_ids=tokens_1T, attention_mask=torch.ones_like(tokens_1T)).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits_TV[:-1], labels_T[1:], ignore_index=-100, reduction="sum")
        labelled += int((labels_T[1:] != -100).sum())
    return total / labelled


def test_loss_and_gradient_are_those_of_a_plain_loop(exact: LoadedBase) -> None:
    spec = make.spec(micro_batch_tokens=10_000)
    with adapted(exact, spec) as trainee:
        excite(trainee)
        (step,) = TrainData(make.examples(exact.renderer, 4), spec.model_copy(update={"n_epochs": 1})).steps_after(0)
        loss, gradient = gradient_of(trainee, step.micro_batches)
        exact.model.config._attn_implementation = "sdpa"
        expected = reference_loss(exact, spec)
        expected_gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, trainee.parameters)])

    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.nn.functional.cosine_similarity(gradient, expected_gradient, dim=0) > 0.9999
    assert float(gradient.norm() / expected_gradient.norm()) == pytest.approx(1, rel=1e-4)


def test_an_evaluation_computes_the_same_loss_without_its_gradient(
    trainee: Trainee, exact: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    (together,) = packed(exact, max_tokens=10_000)
    trained = float(trainee.backward(together, of=Totals.of([together])).loss_sum) / len(together.labelled_N)
    monkeypatch.setattr(losses, "cross_entropy_backward", None)
    evaluated = evaluate(trainee, [together], step=1, should_stop=lambda: False)

    assert evaluated is not None and evaluated.valid_loss == pytest.approx(trained, rel=1e-6)


@pytest.mark.skipif(not has_avx512bf16(), reason="only CPUs with AVX512-BF16 have the fast path that breaks training")
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered")  # what is shown here
@pytest.mark.parametrize("is_cured", [True, False])
def test_training_survives_an_evaluation(bases_dir: Path, is_cured: bool) -> None:
    base = bases.load(catalog.load()[TINY], bases_dir, device="cpu", for_training=True)
    for module in base.model.modules():
        if isinstance(module, Linear4bit) and not is_cured:
            module.support_avx512bf16_for_cpu = True
    with adapted(base, make.spec()) as plain:
        trainee = replace(plain, decoder=StockDecoder(base.model.get_decoder()))  # ours never enters bitsandbytes' forward
        excite(trainee)
        batches = packed(base, max_tokens=160)
        _, before = gradient_of(trainee, batches)
        evaluate(trainee, batches, step=1, should_stop=lambda: False)
        _, after = gradient_of(trainee, batches)

    assert torch.equal(before, after) == is_cured


def test_training_leaves_embeddings_head_and_norms_in_16_bits(tiny: LoadedBase) -> None:
    with adapted(tiny, make.spec()) as trainee:
        Optimizer(trainee.parameters, make.spec().optimizer)
        frozen = {parameter.dtype for parameter in trainee.model.parameters() if not parameter.requires_grad}
        trained = {parameter.dtype for parameter in trainee.parameters}

    assert (frozen, trained) == ({torch.uint8, torch.bfloat16}, {torch.float32})


def test_the_base_is_left_as_it_was(tiny: LoadedBase) -> None:
    tokens = torch.arange(30)[None]
    before, hooks = tiny.model(tokens).logits, sum(len(module._forward_hooks) for module in tiny.model.modules())
    kinds = ({}, {"dropout": 0.1}, {"use_dora": True})  # the last two by transformers' layers
    for lora, is_checkpointing in itertools.product(kinds, (False, True)):
        with adapted(tiny, make.spec(lora=lora, neftune_noise_alpha=5), is_checkpointing=is_checkpointing) as trainee:
            excite(trainee)
            gradient_of(trainee, packed(tiny, max_tokens=160))
    assert torch.equal(tiny.model(tokens).logits, before)
    assert sum(len(module._forward_hooks) for module in tiny.model.modules()) == hooks
    assert not any("lora" in name for name, _ in tiny.model.named_modules())


def test_the_adapter_is_drawn_from_the_seed(tiny: LoadedBase) -> None:
    drawn = []
    for seed in (1, 1, 2):
        with adapted(tiny, make.spec(seed=seed)) as trainee:
            drawn.append(torch.cat([parameter.detach().flatten() for parameter in trainee.parameters]))

    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_an_orthogonal_adapter_begins_at_the_base_with_neither_half_zero(tiny: LoadedBase) -> None:
    with adapted(tiny, make.spec(lora={"init_lora_weights": "orthogonal"})) as trainee:
        a_RI, b_OR = trainee.parameters[0], trainee.parameters[1]
        assert torch.linalg.matrix_rank(a_RI) == torch.linalg.matrix_rank(b_OR) == len(a_RI) // 2
        torch.testing.assert_close(b_OR @ a_RI, torch.zeros(len(b_OR), a_RI.shape[1]))


def test_lora_plus_trains_the_second_factor_faster(tiny: LoadedBase) -> None:
    with adapted(tiny, make.spec()) as trainee:
        names = [
            name
            for name, parameter in trainee.model.named_parameters()
            if any(parameter is one for one in trainee.fast_parameters)
        ]

    assert len(names) == 2 * 7
    assert all("lora_B" in name for name in names)


def test_only_the_asked_for_modules_are_trained(tiny: LoadedBase) -> None:
    with adapted(tiny, make.spec(lora={"target_modules": ("q_proj", "v_proj")})) as trainee:
        names = [name for name, parameter in trainee.model.named_parameters() if parameter.requires_grad]

    assert len(names) == 2 * 2 * 2
    assert all("q_proj.lora_" in name or "v_proj.lora_" in name for name in names)


@pytest.mark.usefixtures("compiled")
def test_after_warming_up_nothing_is_left_to_compile(tiny: LoadedBase) -> None:
    if not fused.can_compile():
        pytest.skip("no C++ compiler here: everything runs as it is written")
    warm_up(tiny)
    compiled = counters["stats"]["unique_graphs"]
    with adapted(tiny, make.spec(max_seq_length=700)) as trainee:
        for lengths in ((600, 90, 80, 7), (257,), (33, 32, 31)):
            for batch in (meaningless(lengths), meaningless(lengths[::-1])):
                trainee.backward(batch, of=Totals.of([batch]))

    assert counters["stats"]["unique_graphs"] == compiled
