"""Every training option, in a run of the tiny base: docs/options.md has the table that bench/options.py makes of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from app.core import catalog
from app.core.events import Finished, Stepped, Stopped
from app.core.spec import QUANTIZATIONS, USUAL, QuantizationSpec, TrainSpec
from tests.make import TINY
from tests.training import make
from tests.training.make import Runner
from worker.inference import lora
from worker.inference.lora_layers import LoraLayers
from worker.model import adapter
from worker.model import base as bases
from worker.model.base import LoadedBase

STOP_AFTER = 3  # between two checkpoints
PROBE = tuple(range(20, 60))


@dataclass(frozen=True)
class Case:
    """An option's value. `spec` is what a TrainSpec says, `quick` whether the written-out decoder computes it."""

    option: str
    spec: dict[str, Any] = field(default_factory=dict)
    quick: bool = True

    def asked(self) -> TrainSpec:
        return make.spec(**self.spec)


CASES = (
    Case("as it is without options"),
    Case("rank 8, alpha 32", {"lora": {"rank": 8, "alpha": 32}}),
    Case("target_modules q_proj, v_proj", {"lora": {"target_modules": ("q_proj", "v_proj")}}),
    Case("dropout 0.1", {"lora": {"dropout": 0.1}}, quick=False),
    Case("use_rslora", {"lora": {"use_rslora": True}}),
    Case("use_dora", {"lora": {"use_dora": True}}, quick=False),
    Case(
        "use_dora with rsLoRA and LoRA+",
        {"lora": {"use_dora": True, "use_rslora": True}, "optimizer": {"lora_plus_ratio": 4}},
        quick=False,
    ),
    Case("neftune_noise_alpha 5", {"neftune_noise_alpha": 5}),
    Case("init_lora_weights gaussian", {"lora": {"init_lora_weights": "gaussian"}}),
    Case("init_lora_weights orthogonal", {"lora": {"init_lora_weights": "orthogonal"}}),
    Case("init_lora_weights false", {"lora": {"init_lora_weights": False}}),
    Case("lora_plus_ratio 16", {"optimizer": {"lora_plus_ratio": 16, "learning_rate": 2e-3}}),
    Case("optimizer adamw_32bit", {"optimizer": {"kind": "adamw_32bit"}}),
    Case("scheduler linear", {"optimizer": {"scheduler": "linear"}}),
    Case("scheduler constant, no warm-up", {"optimizer": {"scheduler": "constant", "warmup_ratio": 0}}),
    Case("scheduler cosine, to a tenth", {"optimizer": {"min_rate_ratio": 0.1}}),
    Case("weight_decay 0.1", {"optimizer": {"weight_decay": 0.1}}),
    Case("max_grad_norm 0.1", {"optimizer": {"max_grad_norm": 0.1}}),
    *(Case(f"quantization {name}", {"quantization": held}) for name, held in QUANTIZATIONS.items() if name != USUAL),
    *(
        Case(f"quantization {name}, use_dora", {"quantization": QUANTIZATIONS[name], "lora": {"use_dora": True}}, quick=False)
        for name in ("fp4", "int8", "none")
    ),
)


def load(cache_dir: Path, held: QuantizationSpec, dtype: torch.dtype) -> LoadedBase:
    """The tiny base, to be trained on."""
    return bases.load(catalog.load()[TINY], cache_dir, quantization=held, device="cpu", dtype=dtype, for_training=True)


def trained(base: LoadedBase, asked: TrainSpec, folder: Path) -> Runner:
    """A run from its first step to its last."""
    runner = Runner(base, folder)
    ended = runner.go(asked)
    assert isinstance(ended, Finished)
    return runner


def resumed(base: LoadedBase, asked: TrainSpec, folder: Path) -> Runner:
    """The same run, stopped on the way and gone on with, as another process would."""
    runner = Runner(base, folder)
    stopped = runner.go(asked, should_stop=runner.stop_after(STOP_AFTER))
    torch.manual_seed(99)
    ended = runner.go(asked)
    assert stopped == Stopped(step=STOP_AFTER) and isinstance(ended, Finished)
    return runner


def is_learning(runner: Runner) -> bool:
    losses = [event.train_loss for event in runner.of(Stepped)]
    return losses[-1] < losses[0]


@torch.inference_mode()
def served(base: LoadedBase, directory: Path) -> Tensor:
    """Logits of the probe, the adapter applied as an engine does it. The base gets hooks that nothing else wants."""
    weights = adapter.open(directory, base=base, max_rank=128)
    made = lora.prepare(weights, dtype=torch.float32)
    layers = LoraLayers(base.model.eval(), torch.device("cpu"), dtype=torch.float32)
    layers.use([(((made, 1.0),), len(PROBE))])
    logits: Tensor = base.model(torch.tensor([PROBE]), use_cache=False).logits
    return logits


@torch.inference_mode()
def of_peft(base: LoadedBase, directory: Path) -> Tensor:
    """The same, by PEFT from the same directory."""
    model = peft.PeftModel.from_pretrained(base.model, str(directory)).eval()
    try:
        logits: Tensor = model(torch.tensor([PROBE]), use_cache=False).logits
    finally:
        model.delete_adapter("default")
        model.unload()
    return logits


@torch.inference_mode()
def of_base(base: LoadedBase) -> Tensor:
    logits: Tensor = base.model(torch.tensor([PROBE]), use_cache=False).logits
    return logits
