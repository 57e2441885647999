import pytest

from app.core import multiple_choice


def test_a_question_is_put_with_lettered_choices() -> None:
    text = multiple_choice.question_text("Capital of France?", ["Rome", "Paris"])

    assert text == "Capital of France?\n\nA. Rome\nB. Paris\n\nAnswer with the letter of the right choice only."


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (B)", "B"),
        ("**B**", "B"),
        ("B. Paris", "B"),
        ("B) Paris", "B"),
        ("B\n\nBecause it is", "B"),
        ("The answer is B.", "B"),
        ("The right answer is: (B)", "B"),
        ("Answer: B", "B"),
        ("Answer: A? No, the answer is B", "B"),
        ("A good question. Answer: B", "B"),
        ("A good question.", None),
        ("I do not know", None),
        ("Paris", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer(text: str, letter: str | None) -> None:
    assert multiple_choice.letter_in(text) == letter


def test_a_rows_answer_is_an_index_or_a_letter() -> None:
    assert [multiple_choice.letter_of(answer) for answer in (0, 25, "a", " B ")] == ["A", "Z", "A", "B"]
