from pathlib import Path

import pytest

from app.core import prices


def test_by_our_own_book_all_is_free() -> None:
    assert prices.load().price("any", 10**9).amount == 0


@pytest.mark.parametrize(("tokens", "amount"), [(0, 0), (1_000_000, 0.48), (10_416, 0.0), (10_417, 0.01), (2_500_000, 1.2)])
def test_a_price_is_by_the_million_and_rounded_to_hundredths(tmp_path: Path, tokens: int, amount: float) -> None:
    book = tmp_path / "prices.toml"
    book.write_text('currency = "USD"\nper_million_tokens = 3\n[bases]\na = 0.48\n')

    assert prices.load(book).price("a", tokens).amount == amount
    assert prices.load(book).price("b", 1_000_000).amount == 3


@pytest.mark.parametrize(
    "text",
    [
        'currency = "dollars"\nper_million_tokens = 1',
        'currency = "USD"',
        'currency = "USD"\nper_million_tokens = -1',
        'currency = "USD"\nper_million_tokens = inf',
        'currency = "USD"\nper_million_tokens = 1\nfree = true',
        "currency",
    ],
)
def test_what_is_no_price_book_is_refused_by_name(tmp_path: Path, text: str) -> None:
    book = tmp_path / "prices.toml"
    book.write_text(text)
    with pytest.raises(ValueError, match=r"prices\.toml is no price book"):
        prices.load(book)
