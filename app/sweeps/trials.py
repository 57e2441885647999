"""From a sweep's body to those of its jobs: a value from values."""

import itertools
import json
import math
import random
import secrets
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from app import handlers
from app.core.errors import AppError, BadRequest
from app.jobs.schemas import JobCreate
from app.sweeps.schemas import MAX_COMBINATIONS, MAX_JOBS, SweepCreate, ValidLossMetric

_ONE_FOR_ALL = ("suffix", "metadata", "dry_run", "integrations", "grid", "random", "metric")
_OF_SWEEP = SweepCreate.model_fields.keys() - JobCreate.model_fields.keys()
_LONGEST_SUFFIX = 64 - len("-64")


@dataclass(frozen=True)
class Trial:
    """`values` are those of the grid, by its names."""

    number: int
    values: Mapping[str, Any]
    job: JobCreate


def expand(request: SweepCreate) -> list[Trial]:
    """In the order of the grid, the last name's values the fastest. Where none is asked for, all share one seed, and so see the
    same rows in the same order. Raises BadRequest.
    """
    for path, values in request.grid.items():
        _require_variable(path, values)
    shared = said(request)
    if shared.get("seed") is None and "seed" not in request.grid:
        shared["seed"] = secrets.randbelow(2**31)
    combinations = _combinations(request)
    trials = [_trial(shared, number, values) for number, values in enumerate(combinations, 1)]
    _require_validation(trials)
    if isinstance(request.metric, ValidLossMetric):
        _require_comparable(trials)
    return trials


def said(model: BaseModel) -> dict[str, Any]:
    """The body again, with what was said in it and no defaults."""
    told = {name: getattr(model, name) for name in model.model_fields_set - _OF_SWEEP}
    return {name: said(value) if isinstance(value, BaseModel) else value for name, value in told.items()}


def _require_variable(path: str, values: Sequence[Any]) -> None:
    root = path.partition(".")[0]
    if root in _ONE_FOR_ALL or root not in JobCreate.model_fields:
        names = ", ".join(name for name in JobCreate.model_fields if name not in _ONE_FOR_ALL)
        raise BadRequest(f"grid.{path} is nothing that jobs of a sweep can differ in; use names in {names}", param=f"grid.{path}")
    if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
        raise BadRequest(f"grid.{path} holds a value twice; name each value once", param=f"grid.{path}")


def _combinations(request: SweepCreate) -> list[dict[str, Any]]:
    names, columns = list(request.grid), list(request.grid.values())
    total, drawn = math.prod(len(column) for column in columns), request.random
    if drawn is None:
        if total > MAX_JOBS:
            message = f"the grid has {total} combinations, and a sweep at most {MAX_JOBS} jobs; send random too, or fewer values"
            raise BadRequest(message, param="grid")
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*columns)]
    if not drawn.trials <= total <= MAX_COMBINATIONS:
        allowed = f"random draws {drawn.trials} different ones of at most {MAX_COMBINATIONS}"
        raise BadRequest(f"the grid has {total} combinations, and {allowed}", param="random.trials")
    chosen = sorted(random.Random(drawn.seed).sample(range(total), drawn.trials))
    return [_combination(request.grid, place) for place in chosen]


def _combination(grid: Mapping[str, Sequence[Any]], place: int) -> dict[str, Any]:
    """That of this place in the order of the grid."""
    values = dict[str, Any]()
    for name, column in reversed(list(grid.items())):
        place, digit = divmod(place, len(column))
        values[name] = column[digit]
    return {name: values[name] for name in grid}


def _trial(shared: Mapping[str, Any], number: int, values: Mapping[str, Any]) -> Trial:
    body = deepcopy(dict(shared))
    for path, value in values.items():
        _put(body, path, value)
    body["suffix"] = f"{(body.get('suffix') or 'sweep')[:_LONGEST_SUFFIX]}-{number}"
    try:
        return Trial(number, values, JobCreate.model_validate(body))
    except ValidationError as error:
        raise refusal(handlers.first_problem(error.errors()), number, values) from None
    except AppError as error:
        raise refusal(error, number, values) from None


def refusal(error: AppError, number: int, values: Mapping[str, Any]) -> AppError:
    """What is wrong with a job, with the job that it is wrong with."""
    message = f"trial {number}, {json.dumps(values)[:500]}: {error}"
    return type(error)(message, param=error.param, code=error.code)


def _put(body: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    place = body
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise BadRequest(f"grid.{path}: {parent} has no parts to set", param=f"grid.{path}")
    place[last] = deepcopy(value)


def _require_validation(trials: Sequence[Trial]) -> None:
    for trial in trials:
        if trial.job.validation_file is None and trial.job.training.validation_split is None:
            message = "a sweep compares by validation; send a validation_file or training.validation_split"
            raise BadRequest(message, param="validation_file")


def _require_comparable(trials: Sequence[Trial]) -> None:
    """The same loss, over the same rows, in the same tokens."""
    first, *others = (_decides_validation(trial.job) for trial in trials)
    for facts in others:
        for name in first:
            if facts.get(name) != first[name]:
                message = (
                    f"validation losses of jobs that differ in {name} are not to be compared; use a metric of type evaluation"
                )
                raise BadRequest(message, param="grid")


def _decides_validation(job: JobCreate) -> dict[str, Any]:
    requested = job.requested()
    of_method = requested.model_dump(exclude={"hyperparameters", "adapter", "quantization", "training", "continue_from"})
    told = {"model": job.model, "validation_file": job.validation_file, **of_method}
    told |= {f"training.{name}": getattr(job.training, name) for name in ("max_seq_length", "long_rows", "validation_split")}
    if job.training.validation_split is not None:
        told |= {"training_file": job.training_file, "seed": job.seed}
    if requested.method != "supervised":  # answers are compared with those of what is continued
        told |= {"continue_from": job.continue_from}
    return told
