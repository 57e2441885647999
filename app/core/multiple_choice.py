"""Questions with lettered choices, as MMLU has them: how one is put, and how the letter is read from an answer."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

MOST_CHOICES = len(ascii_uppercase)
ANSWER_TOKENS = 16
HOW = "Answer with the letter of the right choice only."

# a letter that begins the answer and stands alone, or one that the answer says is its answer
_FIRST = re.compile(r"\W*([A-Za-z])(?=\W*$|[).:,\]*]|\n)")
_NAMED = re.compile(r"\b(?i:answer|choice|option)(?i:\s+is)?\W{1,4}([A-Z])\b(?!')")


def question_text(question: str, choices: Sequence[str]) -> str:
    lettered = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    return f"{question}\n\n{lettered}\n\n{HOW}"


def letter_of(answer: int | str) -> str:
    """A row's answer, which is an index from 0 or a letter, as a letter."""
    return ascii_uppercase[answer] if isinstance(answer, int) else answer.strip().upper()


def letter_in(text: str) -> str | None:
    """`B`, `(B)`, `B. Paris`, `The answer is B`; None where no letter is named."""
    if found := _FIRST.match(text):
        return found[1].upper()
    named = _NAMED.findall(text)
    return named[-1] if named else None
