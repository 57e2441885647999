"""How alike two texts are, from 0 to 1: the measures of the OpenAI API that need neither a model nor a dictionary.

Written out because the usual packages see only words of a–z (rouge-score) or bring what nobody here uses (sacrebleu); on English
text the numbers are theirs, which tests/core/graders holds.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from rapidfuzz import fuzz
from rapidfuzz.distance import LCSseq

Words = Sequence[str]
MAX_ORDER = 4  # of BLEU and GLEU

_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and ideographs: written without spaces, so each is a word
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
_TOKEN = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s]")


def fuzzy_match(text: str, reference: str) -> float:
    """1 less the insertions and deletions between the two, as a part of their lengths: rapidfuzz's `ratio`."""
    return fuzz.ratio(text, reference) / 100


def bleu(text: str, reference: str) -> float:
    """Sentence BLEU (Papineni et al. 2002): up to 4-grams, or as long as the text is; none found at an order counts as a half,
    a quarter, … (NIST's smoothing, sacrebleu's `exp`). Case counts; punctuation marks are tokens."""
    ours, theirs = _TOKEN.findall(text), _TOKEN.findall(reference)
    logs, halvings = list[float](), 0
    for order in range(1, MAX_ORDER + 1):
        counted = _ngrams(ours, order)
        total, common = counted.total(), (counted & _ngrams(theirs, order)).total()
        if total == 0:
            break
        if common == 0 and order == 1:
            return 0.0
        halvings += common == 0
        logs.append(math.log((common or 0.5**halvings) / total))
    if not logs:
        return 0.0
    brevity = min(0.0, 1 - len(theirs) / len(ours))
    return math.exp(brevity + sum(logs) / len(logs))


def gleu(text: str, reference: str) -> float:
    """Google's sentence GLEU (Wu et al. 2016): common 1- to 4-grams over those of the longer side. Tokens as for BLEU."""
    ours, theirs = (
        sum((_ngrams(_TOKEN.findall(side), order) for order in range(1, MAX_ORDER + 1)), Counter()) for side in (text, reference)
    )
    larger = max(ours.total(), theirs.total())
    return (ours & theirs).total() / larger if larger else 0.0


def rouge_n(order: int) -> Callable[[str, str], float]:
    """ROUGE-N (Lin 2004), its F1: common n-grams of words, whatever their case."""

    def measure(text: str, reference: str) -> float:
        ours, theirs = (_ngrams(_words(side), order) for side in (text, reference))
        return _f1((ours & theirs).total(), ours.total(), theirs.total())

    return measure


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L (Lin 2004), its F1: the longest common subsequence of words."""
    ours, theirs = _words(text), _words(reference)
    return _f1(LCSseq.similarity(ours, theirs), len(ours), len(theirs))


METRICS: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    **{f"rouge_{order}": rouge_n(order) for order in range(1, 6)},
    "rouge_l": rouge_l,
}
NOT_OFFERED = {"cosine": "it needs an embedding model", "meteor": "it needs the WordNet dictionary"}


def _words(text: str) -> Words:
    return _WORD.findall(text.casefold())


def _ngrams(words: Words, order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0
