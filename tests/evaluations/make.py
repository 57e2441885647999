"""What tests of evaluations need to exist, as functions."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from openai import OpenAI
from tokenizers import Tokenizer

from tests import make
from tests.embedded.patience import PATIENCE_SECONDS
from worker.inference.sequence import Choice, Slice
from worker.inference.sequence import Sequence as Running
from worker.services import Services
from worker.tasks import evaluate, validate

Says = Callable[[str, object | None], str]  # (the prompt as text, the adapter's id or None) to the answer

EXACT = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.reference}}",
    "operation": "eq",
}


class ScriptedRunner:
    """A model that says what a function tells it to, one token a step, and remembers what it was asked."""

    def __init__(self, tokenizer: Tokenizer, stop_id: int) -> None:
        self._tokenizer, self._stop_id = tokenizer, stop_id
        self._left: dict[str, list[int]] = {}
        self.says: Says = lambda _prompt, _adapter: ""
        self.asked: list[str] = []

    def run(self, slices: Sequence[Slice]) -> list[tuple[Running, Choice | None]]:
        return [(part.sequence, Choice(self._next(part.sequence))) for part in slices if part.is_last]

    def _next(self, sequence: Running) -> int:
        if sequence.request_id not in self._left:
            prompt = self._tokenizer.decode(sequence.tokens, skip_special_tokens=False)
            self.asked.append(prompt)
            said = self._tokenizer.encode(
                self.says(prompt, next((adapter for adapter, _ in sequence.adapters), None)), add_special_tokens=False
            ).ids
            self._left[sequence.request_id] = [*said, self._stop_id]
        return self._left[sequence.request_id].pop(0)


def lines(*rows: object) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def sums(count: int) -> bytes:
    """Chats whose references are numbers."""
    return "\n".join(make.chat_line(f"{n} + 1?", str(n + 1)) for n in range(count)).encode()


def upload(client: OpenAI, services: Services, body: bytes) -> str:
    """A validated evaluation file."""
    file = client.files.create(file=("rows.jsonl", body), purpose="evals")
    while validate.validate_next(services):
        pass
    return file.id


def create(client: OpenAI, file: str, *models: str, **more: Any) -> dict[str, Any]:
    return client.post("/evaluations", cast_to=dict, body={"file": file, "models": list(models or (make.TINY,)), **more})  # type: ignore[type-var]


def get(client: OpenAI, evaluation_id: str) -> dict[str, Any]:
    return client.get(f"/evaluations/{evaluation_id}", cast_to=dict)  # type: ignore[type-var]


def samples(client: OpenAI, evaluation_id: str) -> list[dict[str, Any]]:
    return list(client.get(f"/evaluations/{evaluation_id}/results?limit=100", cast_to=dict)["data"])  # type: ignore[type-var]


def finish(client: OpenAI, services: Services, made: dict[str, Any]) -> dict[str, Any]:
    """Let a worker work until it is over."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (now := get(client, made["id"]))["status"] in ("queued", "running"):
        assert time.monotonic() < deadline, now
        if not evaluate.evaluate_next(services):
            time.sleep(0.05)
    return now
