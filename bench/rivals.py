"""What bench/serving.py measures against: transformers' `generate` and PEFT's batches with several adapters."""

import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from worker.inference import unpacked
from worker.model.base import LoadedBase

PEFT_ADAPTERS = 8


def random_adapter(model: PeftModel, *, seed: int) -> None:
    """As far from the base as training goes, and every time another one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator))


class Rivals:
    """Loaded at first use. Batches of equal prompts, greedy, none ending before its last token.

    They compute in whichever of 32 and 16 bits this machine generates faster in: `dtype`.
    """

    def __init__(self, load: Callable[[torch.dtype], LoadedBase]) -> None:
        self._load_in = load
        self._models = dict[str, Any]()

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        speeds = dict[torch.dtype, float]()
        for dtype in (torch.float32, torch.bfloat16):
            model = self._load_in(dtype).model.eval()
            for _ in range(2):  # the first run finds out what is fast, for products of sizes that it has not seen
                speeds[dtype] = self._timed(model, range(1, 17), rows=16, tokens=4)
        return max(speeds, key=lambda dtype: speeds[dtype])

    def _load(self) -> LoadedBase:
        return self._load_in(self.dtype)

    def generate(self, prompt: Sequence[int], *, rows: int, tokens: int) -> float:
        """Tokens a second on the NF4 base."""
        return self._timed(self._model("generate", lambda: self._load().model), prompt, rows=rows, tokens=tokens)

    def generate_unpacked(self, prompt: Sequence[int], *, rows: int, tokens: int) -> float:
        """The same on the plain matrices that our engine makes of it."""
        return self._timed(self._model("unpacked", self._unpacked), prompt, rows=rows, tokens=tokens)

    def peft(self, prompt: Sequence[int], *, rows: int, tokens: int) -> float:
        """Rows of eight adapters of rank 16, on the NF4 base."""
        names = [f"adapter-{row % PEFT_ADAPTERS}" for row in range(rows)]
        return self._timed(self._model("peft", self._tuned), prompt, rows=rows, tokens=tokens, adapter_names=names)

    def _model(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._models:
            self._models[name] = make().eval()
        return self._models[name]

    def _unpacked(self) -> Any:
        model = self._load().model
        unpacked.enable(model, dtype=model.dtype, max_bytes=1 << 40)
        return model

    def _tuned(self) -> PeftModel:
        base = self._load()
        config = LoraConfig(
            r=16,
            lora_alpha=32,
            task_type="CAUSAL_LM",
            target_modules=sorted({name.rpartition(".")[2] for name in base.linear_shapes}),
        )
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5 by an old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = get_peft_model(base.model, config, adapter_name="adapter-0")
            for number in range(1, PEFT_ADAPTERS):
                model.add_adapter(f"adapter-{number}", config)
        random_adapter(model, seed=1)
        return model

    @torch.inference_mode()
    def _timed(self, model: Any, prompt: Sequence[int], *, rows: int, tokens: int, **more: Any) -> float:
        ids_BT = torch.tensor([list(prompt)] * rows)
        began_at = time.perf_counter()
        told_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            **more,
        )
        assert told_BT.shape[1] == len(prompt) + tokens
        return rows * tokens / (time.perf_counter() - began_at)
