"""TRL's SFTTrainer as oracle: the same rows give the same loss and gradient, padded and packed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tests.training import make
from tests.training.test_trainee import excite, gradient_of
from worker.model.base import LoadedBase
from worker.training.data import micro_batches
from worker.training.trainee import adapted

ROWS = 8


def rows(base: LoadedBase) -> list[dict[str, list[int]]]:
    """Those of make.examples, with -100 where nothing is to be learnt."""
    told = [base.renderer.example(chat.messages) for chat in make.chats(ROWS)]
    labels = [[t if flag else -100 for t, flag in zip(x.tokens, x.is_trained, strict=True)] for x in told]
    return [{"input_ids": x.tokens, "labels": y} for x, y in zip(told, labels, strict=True)]


def trainer_of(model: Any, base: LoadedBase, folder: Path, *, packing: bool) -> SFTTrainer:
    settings = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        max_length=2048 if packing else 512,
        packing=packing,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base.renderer.tokenizer, pad_token="<|im_end|>", eos_token="<|im_end|>")
    return SFTTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows(base)), processing_class=tokenizer)


@pytest.mark.filterwarnings("ignore")  # TRL, datasets and PEFT warn of each other
@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_gradient_are_those_of_trl(exact: LoadedBase, tmp_path: Path, packing: bool) -> None:
    with adapted(exact, make.spec()) as trainee:
        excite(trainee)
        trainer = trainer_of(trainee.model, exact, tmp_path, packing=packing)
        for parameter in trainee.parameters:
            parameter.data = parameter.data.float()  # TRL has rounded the adapters of 4-bit bases to bf16
        (inputs,) = trainer.get_train_dataloader()
        theirs = trainer.compute_loss(trainee.model, inputs)
        their_gradients = torch.autograd.grad(theirs, trainee.parameters)
        ours, our_gradient = gradient_of(trainee, micro_batches(make.examples(exact.renderer), range(ROWS), max_tokens=10_000))

    their_gradient = torch.cat([gradient.flatten() for gradient in their_gradients])
    assert ours == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert torch.nn.functional.cosine_similarity(our_gradient, their_gradient, dim=0) > 0.9999
    assert float(our_gradient.norm() / their_gradient.norm()) == pytest.approx(1, rel=1e-4)
