"""Measures against sacrebleu 2.6.0, nltk 3.10.4 and rouge-score 0.1.2, whose numbers for these pairs are written here."""

import pytest

from app.core.graders import similarity

MAT = ("The cat sat on the mat.", "The cat is on the mat.")
FOX = ("the quick brown fox jumps", "a quick brown dog jumped over")
SHORT = ("It is Paris, of course.", "Paris.")


@pytest.mark.parametrize(
    ("metric", "pair", "value"),
    [
        ("bleu", MAT, 0.488923),  # sacrebleu.sentence_bleu
        ("bleu", FOX, 0.174917),
        ("bleu", SHORT, 0.078098),
        ("gleu", MAT, 0.590909),  # nltk's sentence_gleu, on the same tokens
        ("gleu", FOX, 0.166667),
        ("rouge_1", MAT, 0.833333),  # rouge-score, F1, without stemming
        ("rouge_2", MAT, 0.6),
        ("rouge_3", MAT, 0.25),
        ("rouge_4", MAT, 0.0),
        ("rouge_5", MAT, 0.0),
        ("rouge_l", MAT, 0.833333),
        ("rouge_1", FOX, 0.363636),
        ("rouge_2", FOX, 0.222222),
        ("rouge_l", FOX, 0.363636),
        ("rouge_l", SHORT, 0.333333),
    ],
)
def test_a_measure_is_that_of_its_package(metric: str, pair: tuple[str, str], value: float) -> None:
    assert similarity.METRICS[metric](*pair) == pytest.approx(value, abs=1e-6)


def test_fuzzy_match_counts_what_is_put_in_and_taken_out() -> None:
    assert similarity.fuzzy_match("abcd", "abed") == pytest.approx(1 - 2 / 8)


def test_every_measure_knows_other_scripts() -> None:
    """rouge-score finds no word in either."""
    for pair in (("東京は日本の首都です", "東京は日本の首都です"), ("Größe zwölf über fünf ist", "größe zwölf über fünf ist")):
        assert similarity.rouge_l(*pair) == 1
        assert similarity.METRICS["rouge_5"](*pair) == 1
    assert similarity.METRICS["rouge_1"]("東京", "京都") == 0.5


@pytest.mark.parametrize("metric", similarity.METRICS)
def test_equal_texts_are_alike_and_strange_ones_are_not(metric: str) -> None:
    measure, text = similarity.METRICS[metric], "one two three four five six"

    assert measure(text, text) == pytest.approx(1)
    assert measure("", text) == measure(text, "") == 0
    assert measure("xyz", "abc") == 0
