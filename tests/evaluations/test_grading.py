"""Grading as workers do it: many answers in one process, and what one of them may cost."""

import pytest

from app.core.graders import process
from app.core.graders.process import Answered
from app.core.graders.spec import JsonSchema, ScoreModel
from app.evaluations import grading

ANY_LIST = JsonSchema(type="json_schema", name="s", json_schema={"type": "array"})


def test_an_answer_that_takes_too_much_costs_its_own_score_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MEMORY_BYTES", 192 * 2**20)
    huge = "x" * 80_000_000
    answers = [Answered(item={}, output_text=text) for text in ("[1]", huge, "{}")]
    told = grading.by_rule([ANY_LIST], answers, cpu_seconds=20)

    assert [grades["0"].score for grades in told.grades] == [1, None, 0]
    assert told.grades[1]["0"].message == "grading took more than 192 MiB of memory"


def test_judges_alone_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MEMORY_BYTES", 1)  # none could start
    judge = ScoreModel.model_validate(
        {"type": "score_model", "name": "j", "model": "m", "input": [{"role": "user", "content": "x"}]}
    )

    assert grading.by_rule([judge], [Answered(item={}, output_text="")], cpu_seconds=1).grades == [{}]
