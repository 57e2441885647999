"""Each base's tokenizer and template, as a worker published them: rendering without the weights."""

import hashlib
import time
from dataclasses import dataclass, replace
from threading import Lock

from app.core import cards
from app.core.errors import Unavailable
from app.core.render import Renderer
from app.core.storage import Storage

LOOK_AGAIN_SECONDS = 30.0


@dataclass(frozen=True)
class _Known:
    base_digest: str
    card_sha256: str
    renderer: Renderer
    seen_at: float


class Renderers:
    """Fetched at first use; looked at again after a while, and at once when the engines hold another base under that name."""

    def __init__(self, storage: Storage, *, look_again_seconds: float = LOOK_AGAIN_SECONDS) -> None:
        self._storage, self._look_again_seconds = storage, look_again_seconds
        self._known: dict[tuple[str, str], _Known] = {}  # by base and digest: engines may hold one base in several ways
        self._lock = Lock()

    def get(self, base: str, base_digest: str = "") -> Renderer:
        """The renderer of a base, or of the one whose engines report this digest. Raises Unavailable until it is published."""
        with self._lock:
            known = self._known.get((base, base_digest))
            if known is None or time.monotonic() - known.seen_at >= self._look_again_seconds:
                known = self._look(base, base_digest, known or self._another(base))
                self._known[base, base_digest] = known
            return known.renderer

    def _another(self, base: str) -> _Known | None:
        """What is known of the base held in another way: the same tokenizer, unless its card is another."""
        return next((known for (of, _), known in self._known.items() if of == base), None)

    def _look(self, base: str, base_digest: str, known: _Known | None) -> _Known:
        """Read the card, and the tokenizer only if another card is there."""
        try:
            facts = cards.read_facts(self._storage, base)
            sha256 = hashlib.sha256(facts).hexdigest()
            is_same = known is not None and known.card_sha256 == sha256
            renderer = known.renderer if known and is_same else self._parse(base, facts)
            return _Known(base_digest, sha256, renderer, time.monotonic())
        except cards.NotPublished:
            raise
        except Unavailable:
            if known is None or known.base_digest != base_digest:
                raise
            return replace(known, seen_at=time.monotonic())  # storage is away, we are not

    def _parse(self, base: str, facts: bytes) -> Renderer:
        return Renderer.parse(cards.read_tokenizer(self._storage, base, facts), facts)
