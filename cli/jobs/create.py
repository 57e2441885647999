"""The body of a job, from what was typed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.api import Api
from cli.failure import Failed
from cli.files.push import MIB, pushed, validated
from cli.files.report import lines_of
from cli.table import columns


def body_of(
    *, written: Path | None, options: Mapping[str, Any], settings: Sequence[str], metadata: Sequence[str]
) -> dict[str, Any]:
    """What `written` holds, with the options by their dotted names over it, and `--set` over these. Raises Failed."""
    body = _read(written) if written else {}
    pairs = [*((name, value) for name, value in options.items() if value is not None), *map(_parsed, settings)]
    for name, value in pairs:
        _put(body, name.split("."), value, name)
    if metadata:
        body["metadata"] = dict(body.get("metadata") or {}) | dict(_split(pair, "--metadata") for pair in metadata)
    return body


def file_id(api: Api, given: str, *, part_mib: int) -> str:
    """Of a file that is there, or that is sent now. Raises Failed, with what is wrong with it."""
    path = Path(given)
    if not path.exists():
        if given.startswith("file-"):
            return given
        raise Failed(
            f"there is no file {given} here, and it is no id: those begin with file-; `tunesmith files list` shows yours"
        )
    file = validated(api, pushed(api, path, purpose="fine-tune", part_bytes=part_mib * MIB))
    if file["status"] == "error":
        print("\n".join(lines_of(path, file["report"])))
        raise Failed(f"{path} is not valid, and no job was made; it is there as {file['id']}")
    return str(file["id"])


def dry_run_lines(told: Mapping[str, Any]) -> Iterator[str]:
    """What would come of the job."""
    yield f"{told['model']} on {told['training_file']}: " + ("it can be made" if told["ok"] else "it would be refused")
    yield from (f"  problem: {problem['message']} ({problem['code']})" for problem in told["problems"])
    yield from (f"  warning: {warning}" for warning in told["warnings"])
    rows = [*_planned(told["plan"]), *_chosen(told["auto"] or {}), *_expected(told)]
    yield from (f"  {line}" for line in (columns(rows) if rows else ()))


def _planned(plan: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if plan is None:
        return
    left_out, validation = plan["dropped_examples"], plan["validation_examples"]
    yield "examples", f"{plan['examples']} ({left_out} rows left out), {validation} for validation"
    yield "tokens", f"{plan['tokens_per_epoch']:,} an epoch, {plan['trained_tokens_per_epoch']:,} of them trained on"
    yield "steps", f"{plan['total_steps']:,}"
    yield "memory", f"{plan['predicted_peak_bytes'] / 1024**3:.2f} GiB at the peak, in tier {plan['tier']}"


def _chosen(auto: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, chosen in auto.items():
        yield name, f"{chosen['value']}: {chosen['reason']}"


def _expected(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if time := told["time"]:
        yield "time", f"{time['seconds']:,.0f} s at {time['tokens_per_second']:,.0f} tokens/s"
    if price := told["price"]:
        yield "price", f"{price['amount']} {price['currency']} for {price['tokens']:,} tokens"
    if place := told["queue"]:
        yield "queue", f"place {place['position']} of {place['name']}"


def _read(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Failed(f"{path}: {error}") from error
    if not isinstance(body, dict):
        raise Failed(f"{path} holds no JSON object; `tunesmith import-config` writes one")
    return body


def _parsed(setting: str) -> tuple[str, Any]:
    name, value = _split(setting, "--set")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a word, such as cosine


def _split(pair: str, option: str) -> tuple[str, str]:
    name, is_pair, value = pair.partition("=")
    if not is_pair or not name:
        raise Failed(f"{option} {pair}: write NAME=VALUE")
    return name, value


def _put(body: dict[str, Any], path: Sequence[str], value: Any, name: str) -> None:
    *parents, last = path
    at = body
    for parent in parents:
        at = at.setdefault(parent, {})
        if not isinstance(at, dict):
            raise Failed(f"{name}: {parent} is no object in which to set {last}")
    at[last] = value
