"""Rows that say the same, found by hashes and judged by what they really share."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from app.core.data_report import Comparison
from app.core.render import SPEAKERS, Example
from app.core.tokens import duplicates
from app.core.tokens.token_file import TokenReader, TokenWriter

VOCAB = 50_000
Row = list[int]


def random_rows(count: int, *, length: int = 60, seed: int = 1) -> list[Row]:
    return np.random.default_rng(seed).integers(1000, VOCAB, (count, length)).tolist()  # type: ignore[no-any-return]


def edited(row: Row, changes: int, *, seed: int = 2) -> Row:
    rng, changed = np.random.default_rng(seed), list(row)
    for place in rng.choice(len(row), changes, replace=False):
        changed[place] = int(rng.integers(VOCAB, 2 * VOCAB))
    return changed


def example(row: Row, *, system: Row = (), is_trained: bool = True) -> Example:  # type: ignore[assignment]
    """A system message, then a question and an answer that share the row."""
    half = len(row) // 2
    speakers = [SPEAKERS.index(name) for name in ("system", "user", "assistant")]
    numbers = np.repeat(speakers, [len(system), half, len(row) - half]).tolist()
    flags = [is_trained and number == speakers[2] for number in numbers]
    return Example([*system, *row], flags, bytes(numbers))


def compare(folder: Path, *files: Sequence[Example]) -> Comparison:
    """Line n + 1 is example n."""
    with ExitStack() as stack:
        readers = []
        for number, examples in enumerate(files):
            path = folder / f"{number}.safetensors"
            with TokenWriter(path) as writer:
                writer.append(examples, range(1, len(examples) + 1))
                writer.finish({})
            readers.append(stack.enter_context(TokenReader(path)))
        return duplicates.compare(*readers, folder=folder)


def jaccard(one: Row, two: Row) -> float:
    sets = [{tuple(row[i : i + 3]) for i in range(len(row) - 2)} for row in (one, two)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_rows_that_are_the_same_are_named_with_the_first_of_them(tmp_path: Path) -> None:
    rows = random_rows(6)
    found = compare(tmp_path, [example(row) for row in (*rows, rows[2], rows[0], rows[2])]).training

    assert found.exact.count == 3
    assert [(match.line, match.of_line) for match in found.exact.listed] == [(7, 3), (8, 1), (9, 3)]
    assert found.near.count == 0


def test_the_same_words_with_another_weight_are_near_and_not_the_same(tmp_path: Path) -> None:
    (row,) = random_rows(1)
    found = compare(tmp_path, [example(row), example(row, is_trained=False)]).training

    assert (found.exact.count, found.near.count) == (0, 1)


def test_similarity_is_what_the_rows_really_share(tmp_path: Path) -> None:
    rows = random_rows(20)
    near, far = edited(rows[3], 2), edited(rows[4], 12)
    found = compare(tmp_path, [example(row) for row in (*rows, near, far)]).training

    (match,) = found.near.listed
    assert (match.line, match.of_line) == (21, 4)
    assert match.similarity == pytest.approx(jaccard(rows[3], near), abs=1e-3)
    assert jaccard(rows[4], far) < duplicates.NEAR


def test_nearly_all_near_pairs_are_found_and_no_others(tmp_path: Path) -> None:
    rows = random_rows(400)
    copies = [edited(row, 1 + number % 6, seed=number) for number, row in enumerate(rows)]
    found = compare(tmp_path, [example(row) for row in (*rows, *copies)])
    near = {number + 401 for number, row in enumerate(rows) if jaccard(row, copies[number]) >= duplicates.NEAR}

    assert len(near) > 100
    assert found.compared == 800
    assert found.training.near.count >= 0.97 * len(near)
    assert {match.line for match in found.training.near.listed} <= near
    assert all(match.of_line == match.line - 400 for match in found.training.near.listed)


def test_what_all_rows_begin_with_makes_none_alike(tmp_path: Path) -> None:
    system, task, *rows = random_rows(42, length=200)
    short = [row[:40] for row in rows]
    found = compare(tmp_path, [example([*task, *row], system=system) for row in short])

    assert found.training.near.count == 0
    assert found.boilerplate == pytest.approx(198 / 238, abs=0.01)


def test_a_row_too_short_to_tell_is_not_compared(tmp_path: Path) -> None:
    rows = [[1, 2, 3, 4], [1, 2, 3, 5]]
    found = compare(tmp_path, [example(row) for row in rows])

    assert (found.compared, found.training.near.count) == (0, 0)


def test_validation_rows_that_are_trained_on_are_leaks_and_their_own_repetitions_are_not(tmp_path: Path) -> None:
    rows = random_rows(10)
    alone = random_rows(2, seed=9)
    validation = [rows[4], edited(rows[7], 1), alone[0], alone[1], alone[1], edited(alone[1], 1)]
    found = compare(tmp_path, [example(row) for row in rows], [example(row) for row in validation])

    assert found.leaked is not None
    assert [(match.line, match.of_line) for match in found.leaked.exact.listed] == [(1, 5)]
    assert [(match.line, match.of_line) for match in found.leaked.near.listed] == [(2, 8)]
    assert (found.training.exact.count, found.training.near.count) == (0, 0)


def test_a_part_at_a_time_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(100)
    examples = [example(row) for row in (*rows, *rows[:7], *(edited(row, 2) for row in rows[:30]))]
    whole = compare(tmp_path, examples, examples[:5])
    for name, value in (("_ROWS_AT_ONCE", 9), ("_TOKENS_AT_ONCE", 100), ("_KEYS_AT_ONCE", 16)):
        monkeypatch.setattr(duplicates, name, value)

    assert compare(tmp_path, examples, examples[:5]) == whole
    assert whole.training.exact.count == 7 and whole.training.near.count > 20


def test_all_are_counted_and_the_first_listed(tmp_path: Path) -> None:
    (row,) = random_rows(1)
    found = compare(tmp_path, [example(row)] * 150).training

    assert found.exact.count == 149
    assert [match.line for match in found.exact.listed] == list(range(2, 102))


def test_a_file_without_examples_is_like_none(tmp_path: Path) -> None:
    found = compare(tmp_path, [example(row) for row in random_rows(3)], [])

    assert found.leaked is not None and found.leaked.exact.count == 0
