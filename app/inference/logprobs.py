"""Tokens of an answer and their log-probabilities, as the two endpoints write them."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from app.core.engine import TokenLogprob, ToldToken


def of_chat(tokens: Sequence[ToldToken]) -> dict[str, Any]:
    content = [{**_told(token), "top_logprobs": [_told(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def of_text(tokens: Sequence[ToldToken], *, start: int) -> dict[str, Any]:
    """`start` is how many characters of tokens were told before."""
    texts = [_text(token) for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{_text(other): other.logprob for other in token.top} for token in tokens],
        "text_offset": list(accumulate(map(len, texts[:-1]), initial=start)),
    }


def _told(token: TokenLogprob) -> dict[str, Any]:
    return {"token": _text(token), "bytes": list(token.bytes), "logprob": token.logprob}


def _text(token: TokenLogprob) -> str:
    """A token may be a part of a character."""
    return bytes(token.bytes).decode(errors="replace")
