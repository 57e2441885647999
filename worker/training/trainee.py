"""The frozen base with an adapter to be trained on it, and its forward."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

from app.core.spec import TrainSpec
from worker.model.adapter import targets_of
from worker.model.base import LoadedBase
from worker.training.attention import packed_attention
from worker.training.data import MicroBatch
from worker.training.failures import BaseUnsupported
from worker.training.loss import LabelledLoss, labelled_loss


@dataclass(frozen=True)
class Trainee:
    """`model` is PEFT's around the base's own."""

    model: Any
    base: LoadedBase

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def loss(self, batch: MicroBatch) -> LabelledLoss:
        """Summed over the labelled positions of one micro-batch.

        The decoder sees neither cache nor mask: given either, transformers would let packed documents see each other.
        LoRA is computed in the base's own 16 bits, from fp32 masters.
        """
        decoder, head_VD = self.base.model.get_decoder(), self.base.model.get_output_embeddings().weight
        device = head_VD.device
        with torch.autocast(device.type, torch.bfloat16, enabled=head_VD.dtype == torch.bfloat16):
            hidden_1TD = decoder(
                input_ids=torch.from_numpy(batch.tokens_T)[None].to(device),
                position_ids=torch.from_numpy(batch.positions_T)[None].to(device),
                use_cache=False,
                documents=batch.lengths,
            ).last_hidden_state
        hidden_ND = hidden_1TD[0, torch.from_numpy(batch.labelled_N).to(device)]
        return labelled_loss(hidden_ND, head_VD, torch.from_numpy(batch.targets_N).to(device))

    @torch.no_grad()
    def load(self, modules: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take over A and B of every adapted module, as `adapter.open` gives them."""
        for name, (a_RI, b_OR) in modules.items():
            layer = self.base.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(a_RI)
            layer.lora_B["default"].weight.copy_(b_OR)


@contextmanager
def adapted(base: LoadedBase, spec: TrainSpec) -> Iterator[Trainee]:
    """Put a fresh adapter, drawn from the spec's seed, on the base; afterwards the base is as it was, bit for bit."""
    if getattr(base.model.config, "final_logit_softcapping", None) is not None:
        raise BaseUnsupported("models that cap their logits cannot be trained here; choose another base")
    config = peft.LoraConfig(
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules=list(targets_of(spec.lora)),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(spec.seed)
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers by a name that goes in its version 6
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        model = peft.get_peft_model(base.model, config)
    try:
        with packed_attention(base.model):
            yield Trainee(model, base)
    finally:
        model.unload()
        base.model.__dict__.pop("peft_config", None)  # PEFT's mark: left there, it would take the next adapter for a second one
