"""What each grader gives for an answer, and what it refuses."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from app.core.graders import formula, grade, judging, process, template
from app.core.graders.grade import Grade, SchemaRefused
from app.core.graders.process import Order
from app.core.graders.spec import AnyGrader, Grader, ScoreModel
from app.core.graders.template import NotInAnswer, Sample, Unfillable

ITEM = {"reference": "Paris", "n": 3, "tags": ["a", {"b": "c"}], "none": None}
one_of: TypeAdapter[AnyGrader] = TypeAdapter(Grader)


def made(type_: str, **more: Any) -> AnyGrader:
    return one_of.validate_python({"type": type_, "name": "g", **more})


def graded(answer: str, type_: str, **more: Any) -> Grade:
    return grade.grade(made(type_, **more), ITEM, Sample(answer))  # type: ignore[arg-type]


def refusal(type_: str, **more: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        made(type_, **more)
    return str(caught.value)


@pytest.mark.parametrize(
    ("operation", "answer", "score"),
    [
        ("eq", "Paris", 1),
        ("eq", "paris", 0),
        ("ne", "Rome", 1),
        ("ne", "Paris", 0),
        ("like", "It is Paris.", 1),
        ("like", "It is PARIS.", 0),
        ("ilike", "It is PARIS.", 1),
        ("ilike", "It is Rome.", 0),
    ],
)
def test_string_check(operation: str, answer: str, score: float) -> None:
    texts = {"input": "{{sample.output_text}}", "reference": "{{ item.reference }}"}

    assert graded(answer, "string_check", operation=operation, **texts) == Grade(score=score)


@pytest.mark.parametrize(
    ("written", "filled"),
    [
        ("{{item.reference}}!", "Paris!"),
        ("{{ item.n }} {{item.none}}", "3 null"),
        ("{{item.tags[1].b}}{{item.tags.0}}", "ca"),
        ("{{sample.output_json.x}} {{sample.output_text}}", '1 {"x": 1}'),
        ("{ {item.n}} {{{item.n}}}", "{ {item.n}} {3}"),
        ("{{item.tags}}", '["a", {"b": "c"}]'),
    ],
)
def test_a_placeholder_is_replaced_by_its_value(written: str, filled: str) -> None:
    assert template.fill(template.check(written), ITEM, Sample('{"x": 1}')) == filled


def test_what_was_filled_in_is_not_read_as_a_template() -> None:
    assert template.fill("{{item.a}}", {"a": "{{item.b}}", "b": "secret"}) == "{{item.b}}"


@pytest.mark.parametrize(
    "written", ["{{x}}", "{{item}}", "{{sample.choices}}", "{{item.a()}}", "{{7*7}}", "{{item.__class__ }} {{}}"]
)
def test_a_placeholder_that_names_nothing_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="must"):
        template.check(written)


def test_a_field_that_the_row_lacks_is_the_rows_fault_and_one_that_the_answer_lacks_is_the_answers() -> None:
    with pytest.raises(Unfillable) as caught:
        template.fill("{{item.gone}}", ITEM, Sample(""))
    assert not isinstance(caught.value, NotInAnswer)
    for answer in ("no JSON", "{}", "NaN"):
        with pytest.raises(NotInAnswer):
            template.fill("{{sample.output_json.x}}", ITEM, Sample(answer))
    texts = {"reference": "1", "operation": "eq"}
    assert graded("{}", "string_check", input="{{sample.output_json.x}}", **texts).score == 0
    assert graded("", "string_check", input="{{item.gone}}", **texts).score is None


def test_a_filled_text_has_an_end() -> None:
    with pytest.raises(Unfillable, match="longer"):
        template.fill("{{item.a}}" * 400, {"a": "x" * 1000})


@pytest.mark.parametrize(
    ("pattern", "more", "score"), [("ar", {}, 1), ("ar", {"full": True}, 0), ("PAR", {"ignore_case": True}, 1)]
)
def test_regex(pattern: str, more: dict[str, Any], score: float) -> None:
    assert graded("Paris", "regex", pattern=pattern, **more).score == score


def test_a_pattern_that_hangs_other_engines_takes_no_time() -> None:
    """Python's own would need 2 to the power of 5,000 steps."""
    answer = "a" * 5000 + "!"

    assert graded(answer, "regex", pattern="^(a+)+$").score == 0
    schema = {"type": "string", "pattern": "^(a+)+$"}
    assert graded(f'"{answer}"', "json_schema", json_schema=schema).score == 0


def test_a_pattern_that_re2_does_not_know_is_refused_with_its_reason() -> None:
    assert "invalid perl operator" in refusal("regex", pattern="(?=a)")
    assert "RE2" in refusal("regex", pattern="((a{1000}){1000}){1000}")


@pytest.mark.parametrize(("answer", "score"), [('{"n": 1}', 1), ('{"n": "1"}', 0), ("no JSON", 0), ("{", 0)])
def test_json_schema(answer: str, score: float) -> None:
    schema = {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}

    assert graded(answer, "json_schema", json_schema=schema) == Grade(score=score)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://127.0.0.1:1/schema"},
        {"$ref": "file:///etc/passwd"},
        {"type": 7},
        {"pattern": "(a"},
        {"pattern": "((a{1000}){1000}){1000}"},
    ],
)
def test_a_schema_that_cannot_be_used_is_told_before_it_is(schema: dict[str, Any]) -> None:
    with pytest.raises(SchemaRefused, match="json_schema of 'g'"):
        grade.check([made("json_schema", json_schema=schema)])


def test_a_schema_without_bounds_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"not": deep}

    assert "32 levels" in refusal("json_schema", json_schema=deep)
    assert "bytes" in refusal("json_schema", json_schema={"const": "x" * 300_000})
    assert "unicode" in refusal("json_schema", json_schema={"const": "\ud800"})
    assert "NUL" in refusal("json_schema", json_schema={"const": "a\x00"})
    assert "finite" in refusal("json_schema", json_schema={"const": float("nan")})


def test_what_is_not_offered_is_named_with_its_reason() -> None:
    assert "runs no programs" in refusal("python", source="")
    assert "'label_model' is not" in refusal("label_model")
    texts = {"input": "a", "reference": "b"}
    assert "WordNet" in refusal("text_similarity", evaluation_metric="meteor", **texts)
    assert "embedding model" in refusal("text_similarity", evaluation_metric="cosine", **texts)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("0.5 * a + 0.5 * b", 0.75),
        ("a ^ 2", 0.25),
        ("max(a, b) - min(a, b, 2)", 0.5),
        ("-a + +b", 0.5),
        ("floor(a) + ceil(a) + abs(-a)", 1.5),
        ("sqrt(4 * a / 2) + log(exp(b))", 2),
    ],
)
def test_a_formula(written: str, value: float) -> None:
    formula.check(written, {"a", "b"})

    assert formula.evaluate(written, {"a": 0.5, "b": 1.0}) == pytest.approx(value)


@pytest.mark.parametrize(
    "written",
    [
        "c",
        "a.real",
        "a[0]",
        "__import__('os')",
        "a if b else a",
        "'x' * 9",
        "a +",
        "",
        "abs(a, b)",
        "max()",
        "max(*a)",
        "a" * 501,
        "True",
    ],
)
def test_what_is_no_formula_over_its_graders_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="must"):
        formula.check(written, {"a", "b"})


@pytest.mark.parametrize("written", ["1 / (a - a)", "9 ^ 9 ^ 9 ^ 9", "sqrt(-1)", "exp(10000)", "1e308 * 10"])
def test_arithmetic_without_a_value_is_an_error_and_not_a_score(written: str) -> None:
    formula.check(written, {"a"})
    with pytest.raises(ValueError):
        formula.evaluate(written, {"a": 0.5})


def test_a_multi_has_the_score_of_its_formula_or_the_reason_of_its_part() -> None:
    texts = {"input": "{{sample.output_text}}", "reference": "{{item.r}}"}
    exact = {"type": "string_check", "name": "e", "operation": "eq", **texts}
    multi = made(
        "multi", graders={"exact": exact, "close": exact | {"operation": "ilike"}}, calculate_output="(exact + close) / 2"
    )
    order = Order.model_validate(
        {"graders": [multi], "answers": [{"item": {"r": "Paris"}, "output_text": "PARIS"}, {"item": {"x": 1}, "output_text": ""}]}
    )
    told = process.run(order, cpu_seconds=20)

    right, lacking = (grade.combine([multi], grades)[0] for grades in told.grades)
    assert right == Grade(score=0.5)
    assert (lacking.score, lacking.error) == (None, "invalid_variable_error")


# Judges

ASKED = [{"role": "user", "content": "{{sample.output_text}}?"}]
JUDGE = ScoreModel.model_validate({"type": "score_model", "name": "j", "model": "m", "range": [1, 5], "input": ASKED})


@pytest.mark.parametrize("text", ['{"result": 4}', 'I think so: {"result": 4.0}.', " 4 ", '{"why": "x"} {"result": 4}'])
def test_a_judges_number_is_found(text: str) -> None:
    assert judging.score_in(text, JUDGE) == 4


@pytest.mark.parametrize(
    "text", ["", "four", '{"result": "4"}', '{"result": 6}', "6", '{"result": true}', '{"score": 3}', "4 of 5", "nan"]
)
def test_what_is_no_number_of_the_range_is_no_score(text: str) -> None:
    with pytest.raises(judging.Unreadable):
        judging.score_in(text, JUDGE)


def test_a_judge_is_told_how_to_answer() -> None:
    (message,) = judging.score_messages(JUDGE, ITEM, Sample("Paris"))

    assert message["content"].startswith("Paris?\n\n")
    assert "from 1 to 5" in message["content"]


def test_a_comparison_shows_both_answers_in_their_places() -> None:
    (message,) = judging.compare_messages([{"role": "user", "content": "Capital?"}], "{Rome}", "{Paris}", None)

    assert message["content"].index("Answer A:\n{Rome}") < message["content"].index("Answer B:\n{Paris}")


@pytest.mark.parametrize(("text", "verdict"), [('{"result": "A"}', "first"), ("B.", "second"), ('so {"result": "tie"}', "tie")])
def test_a_verdict_is_found(text: str, verdict: str) -> None:
    assert judging.verdict_in(text) == verdict


@pytest.mark.parametrize("text", ["", "A good answer", '{"result": "C"}', '{"result": 1}'])
def test_what_is_no_verdict_is_none(text: str) -> None:
    with pytest.raises(judging.Unreadable):
        judging.verdict_in(text)
