"""Ask a base and a tuned model the demo's held-out questions, through the API, and print what the evaluation found.

python examples/evaluate.py DATA_DIR/credentials.json MODEL [MODEL …]     # the first model is the one to compare with
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

HELDOUT = Path(__file__).parents[1] / "cli" / "orders" / "heldout.jsonl"
ORDER = {
    "type": "object",
    "required": ["customer", "item", "quantity", "city", "express"],
    "properties": {
        "customer": {"type": "string"},
        "item": {"type": "string"},
        "quantity": {"type": "integer"},
        "city": {"type": "string"},
        "express": {"type": "boolean"},
    },
}
OUTPUT, REFERENCE = "{{sample.output_text}}", "{{item.reference}}"
GRADERS = [
    {"type": "string_check", "name": "exact", "input": OUTPUT, "reference": REFERENCE, "operation": "eq"},
    {"type": "json_schema", "name": "is an order", "json_schema": ORDER},
    {"type": "text_similarity", "name": "similar", "input": OUTPUT, "reference": REFERENCE, "evaluation_metric": "fuzzy_match"},
]


def main() -> int:
    credentials, models = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2:]
    with OpenAI(base_url=credentials["base_url"], api_key=credentials["api_key"]) as client:
        with HELDOUT.open("rb") as questions:
            file = client.files.create(file=questions, purpose="evals")
        body = {"file": file.id, "models": models, "graders": GRADERS, "sampling": {"max_tokens": 96}}
        started = time.monotonic()
        told: dict[str, Any] = client.post("/evaluations", cast_to=object, body=body)  # type: ignore[assignment]
        while told["status"] in ("queued", "running"):
            time.sleep(1)
            told = client.get(f"/evaluations/{told['id']}", cast_to=object)  # type: ignore[assignment]
    if told["status"] != "succeeded":
        print(told["error"])
        return 1
    _show(told["results"])
    print(f"{told['samples']} answers in {time.monotonic() - started:.0f} s")
    return 0


def _show(results: dict[str, Any]) -> None:
    print("| model | grader | mean | 95 % interval |\n|---|---|---|---|")
    for model in results["models"]:
        for name, grade in model["grades"].items():
            print(f"| `{model['model']}` | {name} | {grade['mean']:.3f} | {grade['low']:.3f} to {grade['high']:.3f} |")
    print("\n| grader | difference | 95 % interval | better, worse | test | p |\n|---|---|---|---|---|---|")
    for pair in results["comparisons"]:
        counts, interval = f"{pair['better']}, {pair['worse']}", f"{pair['low']:.3f} to {pair['high']:.3f}"
        print(f"| {pair['grader']} | {pair['difference']:.3f} | {interval} | {counts} | {pair['test']} | {pair['p_value']:.1g} |")


if __name__ == "__main__":
    sys.exit(main())
