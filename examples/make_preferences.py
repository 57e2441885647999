"""Write pairs out of the demo's orders: the right JSON is preferred to one in which a single value is wrong.

    python examples/make_preferences.py FOLDER          # for DPO: train.jsonl (96 pairs), heldout.jsonl (48), spec.json
    python examples/make_preferences.py FOLDER orpo     # the same pairs for ORPO
    python examples/make_preferences.py FOLDER kto      # for KTO: the same answers, each by itself and rated

spec.json is for `python -m worker.training`: docs/methods.md shows what it prints.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

Message = dict[str, str]

ORDERS = Path(__file__).parent.parent / "cli" / "orders"
PAIRS = {"train": 96, "heldout": 48}
SPEC = {
    "base": "smollm2-135m-instruct",
    "n_epochs": 2,
    "seed": 7,
    "max_seq_length": 512,
    "micro_batch_tokens": 2048,
    "checkpoint_every_steps": 12,
}
# by method: rows in a batch, and the rate that `auto` gives this base
BATCHES = {"dpo": 8, "orpo": 8, "kto": 16}
RATES = {"dpo": 1e-4, "orpo": 1e-3, "kto": 1e-4}


def main() -> None:
    folder, method = Path(sys.argv[1]), sys.argv[2] if sys.argv[2:] else "dpo"
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in PAIRS.items():
        chats = [json.loads(line)["messages"] for line in (ORDERS / f"{name}.jsonl").read_text().splitlines()[:count]]
        rng = random.Random(name)
        pairs = [(chat, answered(wrong(json.loads(chat[-1]["content"]), rng))) for chat in chats]
        rows = [row for chat, other in pairs for row in (rated(chat, other) if method == "kto" else [compared(chat, other)])]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_method = {
        "batch_size": BATCHES[method],
        "optimizer": {"learning_rate": RATES[method]},
        "preference": {"method": method, "beta": 0.1},
    }
    (folder / "spec.json").write_text(json.dumps(SPEC | of_method))


def compared(chat: list[Message], other: Message) -> dict[str, Any]:
    return {"input": {"messages": chat[:-1]}, "preferred_output": chat[-1:], "non_preferred_output": [other]}


def rated(chat: list[Message], other: Message) -> list[dict[str, Any]]:
    return [{"messages": chat, "label": True}, {"messages": [*chat[:-1], other], "label": False}]


def answered(order: dict[str, Any]) -> Message:
    return {"role": "assistant", "content": json.dumps(order, separators=(",", ":"), ensure_ascii=False)}


def wrong(order: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The order with one value changed."""
    changes = {
        "customer": order["city"],
        "item": order["item"] + "s",
        "quantity": order["quantity"] + rng.choice([1, 10]),
        "city": order["customer"],
        "express": not order["express"],
    }
    field = rng.choice(list(changes))
    return order | {field: changes[field]}


if __name__ == "__main__":
    main()
