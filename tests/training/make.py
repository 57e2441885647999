"""Specs, chats and runs, as functions."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.core import catalog, events
from app.core import spec as specs
from app.core.chat import Chat, Message
from app.core.render import Renderer
from app.core.spec import LoraSpec, OptimizerSpec, TrainSpec
from app.core.tokens.tokenise import TokenisedSet, tokenise
from tests.make import TINY
from worker.model.base import LoadedBase
from worker.training import run as runs
from worker.training.loop import OnEvent, ShouldStop
from worker.training.run import Paths

CONTEXT = 128


def spec(*, lora: dict[str, Any] | None = None, optimizer: dict[str, Any] | None = None, **changes: Any) -> TrainSpec:
    """Six steps of four examples over twelve of them."""
    asked = {
        "base": TINY,
        "n_epochs": 2,
        "batch_size": 4,
        "seed": 1,
        "max_seq_length": CONTEXT,
        "micro_batch_tokens": 160,
        "checkpoint_every_steps": 2,
        "lora": LoraSpec(**{"rank": 4, "alpha": 8, **(lora or {})}),
        "optimizer": OptimizerSpec(**{"learning_rate": 1e-2, **(optimizer or {})}),
    }
    return TrainSpec(**(asked | changes))


def chat(line: int, question: str, answer: str) -> Chat:
    return Chat((Message("user", question), Message("assistant", answer)), line)


def chats(count: int = 12) -> list[Chat]:
    """Of different lengths, so that packing has something to do."""
    return [chat(n + 1, "Count to " + str(n) + "." * (5 * n % 17), "-".join(map(str, range(n)))) for n in range(1, count + 1)]


def examples(renderer: Renderer, count: int = 12) -> TokenisedSet:
    return tokenise(chats(count), renderer, max_seq_length=CONTEXT)


def pairs(count: int = 12) -> list[Chat]:
    """The same answers, preferred to others of other lengths."""
    others = (Message("assistant", "I would rather not" + "!" * (7 * n % 11)) for n in range(count))
    return [replace(chat, rejected=other) for chat, other in zip(chats(count), others, strict=True)]


def preferences(renderer: Renderer, count: int = 12) -> TokenisedSet:
    return tokenise(pairs(count), renderer, max_seq_length=CONTEXT)


def rated(count: int = 12) -> list[Chat]:
    """The same answers, of which two in three were called good."""
    return [replace(chat, is_good=n % 3 > 0) for n, chat in enumerate(chats(count))]


def ratings(renderer: Renderer, count: int = 12) -> TokenisedSet:
    return tokenise(rated(count), renderer, max_seq_length=CONTEXT)


@dataclass
class Runner:
    """One run's folders; `go` may be called again, as a worker that takes the job over would."""

    base: LoadedBase
    folder: Path
    has_validation: bool = False
    said: list[events.Event] = field(default_factory=list)
    listener: OnEvent = lambda event: None
    examples: Callable[..., TokenisedSet] = examples
    start: Path | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.examples(self.base.renderer).write(self.folder / "training.safetensors")
        self.examples(self.base.renderer, 5).write(self.folder / "validation.safetensors")
        self.paths = Paths(
            dataset=self.folder / "training.safetensors",
            validation=self.folder / "validation.safetensors" if self.has_validation else None,
            start=self.start,
            output=self.folder / "adapter",
            checkpoints=self.folder / "checkpoints",
            cache=self.folder,
        )

    def go(
        self, asked: specs.TrainSpec, *, should_stop: ShouldStop = lambda: False, is_checkpointing: bool = False
    ) -> events.Finished | events.Stopped:
        def hear(event: events.Event) -> None:
            self.said.append(event)
            self.listener(event)

        return runs.run(
            asked,
            self.paths,
            catalog.load()[TINY],
            base_model=self.base,
            is_checkpointing=is_checkpointing,
            on_event=hear,
            should_stop=should_stop,
        )

    def stop_after(self, step: int) -> ShouldStop:
        return lambda: any(isinstance(event, events.Stepped) and event.step == step for event in self.said)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.said if isinstance(event, kind)]

    @property
    def kept(self) -> list[int]:
        """Steps of the checkpoints that are there."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.paths.checkpoints.iterdir())

    @property
    def weights(self) -> bytes:
        return (self.folder / "adapter" / "adapter_model.safetensors").read_bytes()


def overfitting(tiny: LoadedBase, folder: Path) -> Runner:
    """A run whose first evaluation is its best: other answers are asked for than are trained on."""
    runner = Runner(tiny, folder, has_validation=True)
    assert runner.paths.validation is not None
    answers = [chat(line, "Count to 3.", answer) for line, answer in enumerate(("abc", "xyz"), 1)]
    tokenise(answers, tiny.renderer, max_seq_length=64).write(runner.paths.validation)
    return runner
