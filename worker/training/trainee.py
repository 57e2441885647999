"""The frozen base with an adapter to be trained on it, and its forward."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from app.core.spec import OptimizerSpec, PreferenceSpec, TrainSpec
from worker.model.adapter import AdapterWeights
from worker.model.base import LoadedBase
from worker.training import decoder, neftune, preference
from worker.training.data import MicroBatch, Totals
from worker.training.decoder import Decoder
from worker.training.failures import BaseUnsupported
from worker.training.loss import NO_TARGET, Measured, token_losses
from worker.training.stock import StockDecoder

_TOKENS, _LABELLED = 128, 64  # what numbers of them are rounded up to


@dataclass(frozen=True)
class Trainee:
    """`model` is PEFT's around the base's own. Without `preference` what is labelled is learnt.

    `start` is what the parameters were when answers began to be compared with those of a tuned model; empty where they are
    compared with those of the base.
    """

    model: Any
    base: LoadedBase
    decoder: Decoder | StockDecoder
    preference: PreferenceSpec | None = None
    noise_alpha: float = 0.0  # NEFTune's, while training
    start: tuple[Tensor, ...] = ()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def fast_parameters(self) -> list[nn.Parameter]:
        """Those that LoRA+ trains faster, as PEFT chooses them: B, and vectors."""
        named = self.model.named_parameters()
        return [one for name, one in named if one.requires_grad and ("lora_B" in name or one.ndim == 1)]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def loss(self, batch: MicroBatch, *, of: Totals) -> Measured:
        """Summed over the labelled positions of one micro-batch, its pairs or its rated answers: a part `of` all."""
        return self._measured(batch, of, has_backward=False)

    def backward(self, batch: MicroBatch, *, of: Totals) -> Measured:
        """The same loss; the gradient of its part of the mean `of` all is added to the parameters' own."""
        return self._measured(batch, of, has_backward=True)

    @torch.no_grad()
    def token_losses(self, batch: MicroBatch, *, of_base: bool = False) -> tuple[Tensor, Tensor]:
        """Of each labelled position, and of what comes after the last of them as padding: see `loss.token_losses`."""
        with self.model.disable_adapter() if of_base else nullcontext():
            head_VD, targets_N, hidden_ND, _ = self._forward(batch)
        return token_losses(hidden_ND, head_VD, targets_N)

    def kl(self, mismatched: Sequence[MicroBatch], *, should_stop: Callable[[], bool]) -> float | None:
        """By how many nats the adapter has made answers to other questions likelier, on average, and 0 where it has not: KTO's
        estimate of how far it is from the base, as TRL makes it. None when told to stop on the way.
        """
        gained, documents = torch.zeros((), device=self.device), 0
        for batch in mismatched:
            if should_stop():
                return None
            gained += (self._losses_of_reference(batch) - self.token_losses(batch)[0])[: len(batch.labelled_N)].sum()
            documents += len(batch.lengths)
        return max(float(gained) / documents, 0.0) if documents else 0.0  # in this order, so that a NaN stays one

    @torch.no_grad()
    def _measured(self, batch: MicroBatch, of: Totals, *, has_backward: bool) -> Measured:
        has_reference = self.preference is not None and self.preference.has_reference
        # what this forward has kept is free again before the next begins
        reference_N = self._losses_of_reference(batch) if has_reference else None
        head_VD, targets_N, hidden_ND, backward = self._forward(batch, noise_alpha=self.noise_alpha)
        d_hidden_ND = torch.empty_like(hidden_ND) if has_backward else None
        losses_N, is_first_N = token_losses(hidden_ND, head_VD, targets_N, d_hidden_ND=d_hidden_ND)
        if self.preference:
            measured, weights_N = preference.judge(self.preference, batch, of, losses_N, is_first_N, reference_N)
        else:
            measured, weights_N = Measured(losses_N.sum(), is_first_N.sum()), None
        if d_hidden_ND is not None:
            scale = 1 / of.weight
            backward(d_hidden_ND.mul_(scale) if weights_N is None else d_hidden_ND.mul_((weights_N * scale)[:, None]))
        return measured

    def _losses_of_reference(self, batch: MicroBatch) -> Tensor:
        """Of each labelled position, as the run found the model."""
        if not self.start:
            return self.token_losses(batch, of_base=True)[0]
        with self._at_start():
            return self.token_losses(batch)[0]

    @contextmanager
    def _at_start(self) -> Iterator[None]:
        """With the adapter that the run began with, and without dropout."""
        parameters, is_training = self.parameters, self.model.training
        trained = [parameter.data for parameter in parameters]
        self.model.eval()
        try:
            for parameter, at_start in zip(parameters, self.start, strict=True):
                parameter.data = at_start
            yield
        finally:
            for parameter, now in zip(parameters, trained, strict=True):
                parameter.data = now
            self.model.train(is_training)

    def _forward(self, batch: MicroBatch, *, noise_alpha: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], None]]:
        """Head, targets, hidden states and the way back from these.

        Sizes are rounded up, by one more document and by labels that do not count: a CPU's products are compiled for each size,
        and the heap fits what it held before.
        """
        head_VD = self.base.model.get_output_embeddings().weight
        padding, unused = -len(batch.tokens_T) % _TOKENS, -len(batch.labelled_N) % _LABELLED
        tokens_T, positions_T, labelled_N, targets_N = (
            torch.from_numpy(np.concatenate([array, more])).to(head_VD.device)
            for array, more in (
                (batch.tokens_T, np.zeros(padding, np.int64)),
                (batch.positions_T, np.arange(padding)),
                (batch.labelled_N, np.zeros(unused, np.int64)),
                (batch.targets_N, np.full(unused, NO_TARGET)),
            )
        )
        lengths = (*batch.lengths, padding) if padding else batch.lengths
        alpha = noise_alpha if self.model.training else 0.0
        with neftune.noised(self.base.model.get_input_embeddings(), lengths, alpha=alpha):
            hidden_ND, backward = self.decoder.forward(labelled_N, tokens_T=tokens_T, positions_T=positions_T, lengths=lengths)
        return head_VD, targets_N, hidden_ND, backward

    def started_from(self, weights: AdapterWeights) -> "Trainee":
        """The same with a tuned model's weights in place of fresh ones; where answers are compared, with that model's."""
        self.load(weights)
        if self.preference is None or not self.preference.has_reference:
            return self
        return replace(self, start=tuple(one.detach().clone() for one in self.parameters))

    @torch.no_grad()
    def load(self, weights: AdapterWeights) -> None:
        """Take over what `adapter.open` gives."""
        for name, (a_RI, b_OR) in weights.modules.items():
            layer = self.base.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(a_RI)
            layer.lora_B["default"].weight.copy_(b_OR)
        for name, dora in weights.dora.items():
            self.base.model.get_submodule(name).lora_magnitude_vector["default"].weight.copy_(dora.magnitude_O)


@contextmanager
def adapted(base: LoadedBase, spec: TrainSpec, *, is_checkpointing: bool = False) -> Iterator[Trainee]:
    """Put a fresh adapter, drawn from the spec's seed, on the base; afterwards the base is as it was, bit for bit.

    `is_checkpointing` saves memory and costs time: layers are computed once more in the backward, to the same bits.
    """
    if getattr(base.model.config, "final_logit_softcapping", None) is not None:
        raise BaseUnsupported("models that cap their logits cannot be trained here; choose another base")
    config = peft.LoraConfig(
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules=list(spec.lora.targets),
        use_rslora=spec.lora.use_rslora,
        use_dora=spec.lora.use_dora,
        init_lora_weights=True if spec.lora.init_lora_weights == "orthogonal" else spec.lora.init_lora_weights,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(spec.seed)
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers by a name that goes in its version 6
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        model = peft.get_peft_model(base.model, config)
    if spec.lora.init_lora_weights == "orthogonal":
        _draw_orthogonal(model)
    try:
        inner = base.model.get_decoder()
        is_known = not (spec.lora.dropout or spec.lora.use_dora) and decoder.knows(inner, longest=spec.max_seq_length)
        made: Decoder | StockDecoder = (Decoder if is_known else StockDecoder)(inner, is_checkpointing=is_checkpointing)
        yield Trainee(model, base, made, spec.preference, spec.neftune_noise_alpha)
    finally:
        model.unload()


@torch.no_grad()
def _draw_orthogonal(model: Any) -> None:
    """As PEFT's own: rows of one orthogonal matrix go to A and to B by turns, so that B A = 0.

    PEFT draws in the dtype of the base's weights, which are packed bytes here.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            a_RI, b_OR = (part["default"].weight for part in (module.lora_A, module.lora_B))
            rank = len(a_RI)
            turned_RR, _ = torch.linalg.qr(torch.randn(rank, rank))
            a_RI.copy_((torch.randn(a_RI.shape[1], rank // 2) @ turned_RR[0::2]).T / 10)
            b_OR.copy_(torch.randn(len(b_OR), rank // 2) @ turned_RR[1::2] / 10)


def warm_up(base: LoadedBase) -> None:
    """What is compiled at first use is compiled, or fetched from disk, before there is a job. The base is left as it was."""
    spec = TrainSpec(
        base=base.entry.id,
        n_epochs=1,
        batch_size=1,
        seed=0,
        max_seq_length=512,
        micro_batch_tokens=512,
        checkpoint_every_steps=1,
        optimizer=OptimizerSpec(learning_rate=1e-4),
    )
    with adapted(base, spec) as trainee:
        # one document of a length and several, first in the pack and later, in one block of attention's queries and in two
        for lengths in ((300, 40, 40), (60, 60)):
            batch = meaningless(lengths)
            trainee.backward(batch, of=Totals.of([batch]))
        batch = meaningless((100, 40, 40))
        trainee.loss(batch, of=Totals.of([batch]))  # as an evaluation does: without the logits' gradient


def meaningless(lengths: tuple[int, ...]) -> MicroBatch:
    """Documents of these lengths that say nothing, every token of them trained on."""
    total = sum(lengths)
    return MicroBatch(
        tokens_T=np.zeros(total, np.int64),
        positions_T=np.concatenate([np.arange(length) for length in lengths]),
        lengths=lengths,
        labelled_N=np.arange(total - 1),
        targets_N=np.zeros(total - 1, np.int64),
        is_answer_N=np.ones(total - 1, np.bool_),
    )
