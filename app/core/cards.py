"""A base's card in storage: how it is rendered for and tokenised, as its workers have published it. Nobody needs the weights."""

import hashlib
import json
from pathlib import Path

from app.core.engine import card_key, tokenizer_key
from app.core.errors import NotFound, Unavailable
from app.core.render import CARD, TOKENIZER
from app.core.storage import Storage


class NotPublished(Unavailable):
    """No worker has loaded this base yet."""

    code = "base_not_loaded"

    def __init__(self, base: str) -> None:
        super().__init__(f"{base} is still being loaded; try again shortly")


def read_facts(storage: Storage, base: str) -> bytes:
    """The card's `base.json`, which names its tokenizer. Raises NotPublished until it is there."""
    try:
        return storage.get(card_key(base))
    except NotFound:
        raise NotPublished(base) from None


def read_tokenizer(storage: Storage, base: str, facts: bytes) -> bytes:
    """The `tokenizer.json` that belongs to these facts. Raises NotPublished; Unavailable when it is damaged."""
    sha256 = json.loads(facts).get("tokenizer_sha256")
    try:
        tokenizer = storage.get(tokenizer_key(base, sha256))
    except NotFound:
        raise NotPublished(base) from None
    if sha256 and hashlib.sha256(tokenizer).hexdigest() != sha256:
        message = f"the tokenizer of {base} is damaged in storage; its workers publish it again when they start"
        raise Unavailable(message, code="base_not_loaded")
    return tokenizer


def write(facts: bytes, tokenizer: bytes, directory: Path) -> None:
    """As `Renderer.open` reads it."""
    (directory / CARD).write_bytes(facts)
    (directory / TOKENIZER).write_bytes(tokenizer)
