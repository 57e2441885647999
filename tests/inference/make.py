"""What inference tests need to exist, as functions."""

import asyncio
import contextlib
import itertools
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from app.core import ids
from app.core.engine import AdapterRef, Chunk, GenerateRequest, Sampling
from app.core.render import Renderer
from app.core.spec import LoraSpec, OptimizerSpec, TrainSpec
from app.core.storage import Storage
from worker.inference import cache, native
from worker.inference.driver import EngineDriver
from worker.inference.pages import Pages
from worker.inference.scheduler import Scheduler
from worker.inference.sequence import Choice, Slice
from worker.inference.sequence import Sequence as Running
from worker.inference.vocabulary import Vocabulary
from worker.model import adapter
from worker.model.base import LoadedBase

PROMPTS = ([72, 101, 108, 108, 111], [65], [84, 104, 101, 32] * 9, [49, 32, 43, 32, 50])


def request(prompt: Sequence[int] = PROMPTS[0], ref: AdapterRef | None = None, **sampling: Any) -> GenerateRequest:
    asked = Sampling(**{"max_tokens": 24, "temperature": 0, **sampling})
    return GenerateRequest(request_id=ids.new("req_"), prompt=tuple(prompt), sampling=asked, adapter=ref)


def vocabulary(renderer: Renderer, *, stop_ids: Collection[int] | None = None, size: int | None = None) -> Vocabulary:
    """A base's own, or one with other ends of a turn."""
    ends = renderer.stop_ids if stop_ids is None else stop_ids
    return Vocabulary(renderer.tokenizer, size=size or renderer.tokenizer.get_vocab_size(), stop_ids=ends)


def peft_model(base: LoadedBase, *, rank: int, seed: int, targets: Collection[str] | None = None) -> PeftModel:
    """As far from the base as a well-trained adapter: B is not zero."""
    torch.manual_seed(seed)
    names = list(targets or {name.rpartition(".")[2] for name in base.linear_shapes})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5 by an old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(base.model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return model.eval()


def publish(storage: Storage, base: LoadedBase, model: PeftModel, directory: Path) -> AdapterRef:
    config = model.peft_config["default"]
    lora = LoraSpec(rank=config.r, alpha=config.lora_alpha, target_modules=tuple(sorted(config.target_modules)))
    spec = TrainSpec(
        base=base.entry.id,
        n_epochs=1,
        batch_size=1,
        seed=0,
        max_seq_length=64,
        micro_batch_tokens=64,
        checkpoint_every_steps=1,
        lora=lora,
        quantization=base.quantization,
        optimizer=OptimizerSpec(learning_rate=1e-3),
    )
    written = adapter.write(
        directory, model, base=base.entry, spec=spec, renderer=base.renderer, dataset_sha256="", step=1, metrics={}
    )
    prefix = f"adapters/{ids.new('adapter_')}"
    for path in directory.iterdir():
        storage.put_file(f"{prefix}/{path.name}", path)
    return AdapterRef(id=directory.name, digest=written.digest, prefix=prefix, base=base.entry.id)


def greedy(model: Any, prompt: Sequence[int], stop_ids: Collection[int], max_tokens: int) -> list[int]:
    """The most likely tokens by plain forwards over the whole text: slow, and nothing in it to get wrong."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(max_tokens):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
            if tokens[-1] in stop_ids:
                break
    return tokens[len(prompt) :]


def page_bytes(base: LoadedBase) -> int:
    """Of an engine that serves it."""
    return cache.page_bytes(base.model.config, size=native.PAGE_TOKENS, dtype=torch.float32)


async def answer(driver: EngineDriver, wanted: GenerateRequest) -> list[Chunk]:
    """All of an answer, the lease taken and given back as the server does it."""
    async with driver.holding(wanted) as leases, contextlib.aclosing(driver.stream(wanted, leases)) as chunks:
        return [chunk async for chunk in chunks]


def text_of(chunks: Sequence[Chunk]) -> str:
    assert all(chunk.error is None for chunk in chunks)
    return "".join(chunk.text for chunk in chunks)


def scheduler(**changes: Any) -> Scheduler:
    """One with room for whatever a test does not ask about."""
    asked = {"max_batch": 4, "max_waiting": 8, "max_waiting_of_tenant": 99, "step_tokens": 16, **changes}
    return Scheduler(asked.pop("pages", None) or Pages(count=256, size=4), **asked)


def words(model: Any, renderer: Renderer, prompt: Sequence[int], max_tokens: int = 24) -> str:
    """What `greedy` finds, as text."""
    return renderer.decode(greedy(model, prompt, renderer.stop_ids, max_tokens))


async def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for another thread."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


class Words(str):
    """Weights for who needs none."""

    __slots__ = ()
    size_bytes = 1


class SayingRunner:
    """Says `tokens` to everyone, over and over, and remembers what it was asked."""

    def __init__(self, tokens: Sequence[int] = (97,)) -> None:
        self._tokens = itertools.cycle(tokens)
        self.steps: list[list[tuple[str, int]]] = []

    def run(self, slices: Sequence[Slice]) -> list[tuple[Running, Choice | None]]:
        self.steps.append([(part.sequence.request_id, part.count) for part in slices])
        return [(part.sequence, Choice(next(self._tokens))) for part in slices if part.is_last]
