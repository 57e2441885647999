"""Token sets on disk, written and read a piece at a time."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from app.core.render import Example
from app.core.tokens.token_file import TokenReader, TokenWriter
from app.core.tokens.tokenise import TokenisedSet

LENGTHS = [3, 1, 40, 2, 7, 7]


def examples() -> list[Example]:
    rng = np.random.default_rng(1)
    return [
        Example(
            rng.integers(0, 9, n).tolist(),
            (rng.random(n) < 0.5).tolist(),
            bytes(rng.integers(0, 4, n).tolist()),
            n // 2,
            n % 3 - 1,
        )
        for n in LENGTHS
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made, into = examples(), tmp_path / "set.safetensors"
    with TokenWriter(into) as writer:
        writer.append(made[:2], [5, 6])
        writer.append([], [])
        writer.append(made[2:], [8, 9, 10, 12])
        writer.finish({"dropped": '{"count": 0, "listed": []}'})
    assert [left.name for left in tmp_path.iterdir()] == [into.name]
    return into


def test_a_trainer_reads_it_whole(path: Path) -> None:
    read, made = TokenisedSet.read(path), examples()

    assert read.tokens_N.tolist() == [token for example in made for token in example.tokens]
    assert read.is_trained_N.tolist() == [flag for example in made for flag in example.is_trained]
    assert read.lengths_E.tolist() == LENGTHS
    assert read.lines_E.tolist() == [5, 6, 8, 9, 10, 12]
    assert read.seconds_E.tolist() == [n // 2 for n in LENGTHS]
    assert read.ratings_E.tolist() == [n % 3 - 1 for n in LENGTHS]
    assert [read.lengths_of(e) for e in range(3)] == [(1, 2), (1,), (20, 20)]


def test_a_set_of_the_last_release_has_no_pairs_and_keeps_its_digest(path: Path, tmp_path: Path) -> None:
    read = TokenisedSet.read(path)
    old = {name: getattr(read, name) for name in ("tokens_N", "is_trained_N", "offsets_E1", "lines_E")}
    save_file(old, tmp_path / "old.safetensors", metadata={"dropped": '{"count": 0, "listed": []}'})
    alone = TokenisedSet.read(tmp_path / "old.safetensors")

    assert (alone.pairs, read.pairs, alone.rated, read.rated) == (0, 5, 0, 2)
    assert replace(read, ratings_E=-read.ratings_E).sha256 != read.sha256
    assert alone.sha256 == hashlib.sha256(b"".join(array.tobytes() for array in old.values())).hexdigest() != read.sha256


@pytest.mark.parametrize(("most_examples", "most_tokens"), [(100, 1000), (2, 1000), (100, 8), (1, 1)])
def test_blocks_hold_every_example_once_within_their_bounds(path: Path, most_examples: int, most_tokens: int) -> None:
    made, seen = examples(), list[Example]()
    with TokenReader(path) as reader:
        for block in reader.blocks(examples=most_examples, tokens=most_tokens):
            assert block.first == len(seen)
            assert block.lines_B.tolist() == [5, 6, 8, 9, 10, 12][len(seen) : len(seen) + len(block.lengths_B)]
            assert len(block.lengths_B) <= most_examples
            assert len(block.tokens_N) <= most_tokens or len(block.lengths_B) == 1
            for span, second, rating in zip(block.spans(), block.seconds_B, block.ratings_B, strict=True):
                tokens, flags = block.tokens_N[span].tolist(), block.is_trained_N[span].tolist()
                seen.append(Example(tokens, flags, block.speakers_N[span].tobytes(), int(second), int(rating)))

    assert seen == made


def test_one_example_is_found_alone(path: Path) -> None:
    with TokenReader(path) as reader:
        assert reader.block(2).tokens_N.tolist() == examples()[2].tokens
        assert reader.line(4) == 10


def test_what_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), TokenWriter(tmp_path / "set.safetensors") as writer:
        writer.append(examples(), [1] * len(LENGTHS))
        raise KeyError

    assert list(tmp_path.iterdir()) == []
