"""The graders' endpoints, as the unmodified SDK calls them."""

from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning.alpha import GraderRunResponse

from tests import make as rows
from tests.evaluations.make import EXACT, ScriptedRunner

ITEM = {"reference": "Paris"}


def multi(part: Any, formula: str) -> dict[str, Any]:
    return {"type": "multi", "name": "m", "graders": {"e": part}, "calculate_output": formula}


def run(client: OpenAI, grader: Any, sample: str, item: Any = ITEM) -> GraderRunResponse:
    return client.fine_tuning.alpha.graders.run(grader=grader, model_sample=sample, item=item)


def test_a_grader_runs_and_its_answer_has_all_that_the_sdk_expects(client: OpenAI) -> None:
    answer = run(client, EXACT, "Paris")

    assert (answer.reward, answer.sub_rewards, answer.metadata.scores) == (1.0, {}, {"exact": 1.0})
    assert (answer.metadata.name, answer.metadata.type) == ("exact", "string_check")
    assert not any(value is True for value in answer.metadata.errors.model_dump().values())
    strict = GraderRunResponse.model_validate(answer.model_dump(by_alias=True))  # the SDK's own type, without its lenience
    assert strict.metadata.execution_time > 0
    assert run(client, EXACT, "Rome").reward == 0


def test_a_multi_tells_the_rewards_of_its_parts(client: OpenAI) -> None:
    close = {"type": "text_similarity", "name": "c", "input": "{{sample.output_text}}", "reference": "{{item.reference}}"}
    graders = {"exact": EXACT, "close": close | {"evaluation_metric": "fuzzy_match"}}
    both = {"type": "multi", "name": "both", "graders": graders, "calculate_output": "0.5 * exact + 0.5 * close"}
    answer = run(client, both, "Parts")

    assert answer.sub_rewards == {"exact": 0.0, "close": pytest.approx(0.8)}
    assert answer.reward == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("grader", "flag"),
    [
        (EXACT | {"reference": "{{item.gone}}"}, "invalid_variable_error"),
        (EXACT | {"input": "{{sample.output_json.x}}"}, "sample_parse_error"),
        (multi(EXACT, "1 / e"), "formula_parse_error"),
    ],
)
def test_what_goes_wrong_is_flagged_and_explained(client: OpenAI, grader: Any, flag: str) -> None:
    answer = run(client, grader, "Rome")

    assert [name for name, value in answer.metadata.errors.model_dump(by_alias=True).items() if value] == [flag]
    assert answer.reward == 0
    assert (answer.model_extra or {})["messages"]


def test_a_grader_is_validated_as_it_was_understood(client: OpenAI) -> None:
    answer = client.fine_tuning.alpha.graders.validate(grader=EXACT)  # type: ignore[arg-type]

    assert answer.grader is not None
    assert answer.grader.model_dump() == EXACT


@pytest.mark.parametrize("verb", ["run", "validate"])
@pytest.mark.parametrize(
    ("grader", "param", "words"),
    [
        ({"type": "python", "name": "p", "source": "x"}, "grader", "runs no programs"),
        ({"name": "p"}, "grader", "an object with a type"),
        (EXACT | {"name": ""}, "grader.name", "1 or more characters"),
        ({"type": "regex", "name": "r", "pattern": "("}, "grader.pattern", "RE2"),
        ({"type": "json_schema", "name": "s", "json_schema": {"$ref": "http://127.0.0.1/x"}}, "grader", "json_schema of 's'"),
        (multi(EXACT, "f"), "grader.calculate_output", "not 'f'"),
        (
            multi({"type": "multi"}, "e"),
            "grader.graders.e",
            "'multi' is not",
        ),
    ],
)
def test_a_grader_that_cannot_be_used_is_refused_by_both(
    http: httpx.Client, verb: str, grader: dict[str, Any], param: str, words: str
) -> None:
    body = {"grader": grader} | ({"model_sample": "x"} if verb == "run" else {})
    answer = http.post(f"/v1/fine_tuning/alpha/graders/{verb}", json=body)
    error = rows.require_envelope(answer.status_code, answer.json())

    assert (answer.status_code, error["param"]) == (400, param), error
    assert words in str(error["message"]), error


def judge(model: str = rows.TINY) -> dict[str, Any]:
    return {"type": "score_model", "name": "j", "model": model, "input": [{"role": "user", "content": "{{sample.output_text}}?"}]}


def test_a_judge_of_ones_own_is_asked_through_the_gateway(client: OpenAI, model: ScriptedRunner) -> None:
    model.says = lambda _prompt, _adapter: '{"result": 0.75}'
    answer = run(client, judge(), "Paris")

    assert (answer.reward, answer.metadata.sampled_model_name) == (0.75, rows.TINY)
    assert "Paris?" in model.asked[0]
    used = answer.api_model_grader_token_usage_per_model[rows.TINY]
    assert used == answer.metadata.token_usage and isinstance(used, int) and used > 20


def test_a_judge_that_babbles_or_is_away_is_flagged(client: OpenAI, model: ScriptedRunner) -> None:
    model.says = lambda _prompt, _adapter: "well"
    babbled = run(client, judge(), "Paris")
    away = run(client, judge("qwen2.5-7b-instruct"), "Paris")

    assert babbled.metadata.errors.api_model_grader_parse_error and babbled.reward == 0
    assert away.metadata.errors.api_model_grader_server_error
    assert "no engine serves" in str(away.metadata.errors.api_model_grader_server_error_details)


def test_a_judge_that_does_not_exist_is_not_found(client: OpenAI, stranger: OpenAI, tuned: str) -> None:
    for asker, name in ((client, "gpt-99"), (stranger, tuned)):
        with pytest.raises(openai.NotFoundError) as refusal:
            run(asker, judge(name), "x")
        assert refusal.value.param == "grader.model"
