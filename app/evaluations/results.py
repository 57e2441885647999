"""What an evaluation has found: means with their intervals, each model against the first, and the judge's verdicts."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from app.core import statistics
from app.core.statistics import LEVEL, RESAMPLES, Interval
from app.models import EvaluationSample

Scores = dict[str, dict[str, dict[int, float]]]  # by grader, model and line


def of(samples: Sequence[EvaluationSample], *, models: Sequence[str], graders: Sequence[str], seed: int) -> dict[str, Any]:
    """Of all samples of an evaluation. A grader without a score for a model has null in place of its mean."""
    scores: Scores = {grader: {model: {} for model in models} for grader in graders}
    unscored = Counter[tuple[str, str]]()
    for sample in samples:
        for grader in graders:
            given = (sample.grades or {}).get(grader)
            if given is not None and given["score"] is not None:
                scores[grader][sample.model][sample.line] = given["score"]
            else:
                unscored[grader, sample.model] += 1
    by_model = defaultdict[str, list[EvaluationSample]](list)
    for sample in samples:
        by_model[sample.model].append(sample)
    return {
        "models": [
            _of_model(
                model,
                by_model[model],
                {grader: _mean(list(scores[grader][model].values()), unscored[grader, model], seed) for grader in graders},
            )
            for model in models
        ],
        "comparisons": [_compared(model, models[0], grader, scores[grader], seed) for model in models[1:] for grader in graders],
        "pairwise": [found for model in models[1:] if (found := _verdicts(model, models[0], by_model[model], seed))],
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL, "seed": seed},
    }


def scored(results: Mapping[str, Any]) -> bool:
    """Whether anything has a score or a verdict."""
    means = any(grade["rows"] for model in results["models"] for grade in model["grades"].values())
    return means or any(pair["rows"] for pair in results["pairwise"])


def _of_model(model: str, samples: Sequence[EvaluationSample], grades: Mapping[str, Any]) -> dict[str, Any]:
    answered = [sample for sample in samples if sample.error is None]
    return {
        "model": model,
        "answered": len(answered),
        "failed": len(samples) - len(answered),
        "cut_off": sum(sample.finish_reason == "length" for sample in answered),
        "prompt_tokens": sum(sample.prompt_tokens for sample in answered),
        "completion_tokens": sum(sample.completion_tokens for sample in answered),
        "grades": grades,
    }


def _mean(scores: Sequence[float], unscored: int, seed: int) -> dict[str, Any]:
    interval = statistics.bootstrap(scores, seed=seed) if scores else None
    return {**_shown(interval), "rows": len(scores), "unscored": unscored}


def _compared(model: str, against: str, grader: str, scores: Mapping[str, Mapping[int, float]], seed: int) -> dict[str, Any]:
    """On the rows that both have a score for."""
    ours, theirs = scores[model], scores[against]
    lines = sorted(ours.keys() & theirs.keys())
    told: dict[str, Any] = {"model": model, "against": against, "grader": grader, "rows": len(lines)}
    if not lines:
        return {**told, "difference": None, "low": None, "high": None, "better": 0, "worse": 0, "test": None, "p_value": None}
    found = statistics.paired([ours[line] for line in lines], [theirs[line] for line in lines], seed=seed)
    interval = found.difference
    counted = {"better": found.better, "worse": found.worse, "test": found.test, "p_value": found.p_value}
    return {**told, "difference": interval.mean, "low": interval.low, "high": interval.high, **counted}


def _verdicts(model: str, against: str, samples: Sequence[EvaluationSample], seed: int) -> dict[str, Any] | None:
    """None where nobody judged. A tie is half a win; a judge that changes its mind with the order makes a tie, and is counted."""
    judged = [sample.verdict for sample in samples if sample.verdict is not None]
    if not judged:
        return None
    outcomes = Counter(verdict["outcome"] for verdict in judged)
    decided = [verdict for verdict in judged if verdict["outcome"] is not None]
    worth = {"win": 1.0, "tie": 0.5, "loss": 0.0}
    rate = statistics.bootstrap([worth[verdict["outcome"]] for verdict in decided], seed=seed) if decided else None
    places = Counter(place for verdict in decided for place in verdict["preferred"])
    chosen = places["first"] + places["second"]
    return {
        "model": model,
        "against": against,
        "rows": len(decided),
        "wins": outcomes["win"],
        "losses": outcomes["loss"],
        "ties": outcomes["tie"],
        "changed_with_the_order": sum(_changed(verdict["preferred"]) for verdict in decided),
        "unreadable": outcomes[None],
        "win_rate": _shown(rate),
        "p_value": statistics.mcnemar_p(outcomes["win"], outcomes["loss"]),
        "position": {
            "first": places["first"],
            "second": places["second"],
            "tie": places["tie"],
            "first_share": places["first"] / chosen if chosen else None,
        },
    }


def outcome(preferred: Sequence[str | None]) -> str | None:
    """Of a model that stood first in the first order and second in the other. None where the judge could not be read."""
    if None in preferred:
        return None
    if tuple(preferred) == ("first", "second"):
        return "win"
    return "loss" if tuple(preferred) == ("second", "first") else "tie"


def _changed(preferred: Sequence[str]) -> bool:
    """Whether the judge preferred a place, and not an answer."""
    return tuple(preferred) in {("first", "first"), ("second", "second")}


def _shown(interval: Interval | None) -> dict[str, float | None]:
    return dict(asdict(interval)) if interval else {"mean": None, "low": None, "high": None}
