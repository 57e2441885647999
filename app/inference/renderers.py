"""Each base's tokenizer and template, as a worker published them: rendering without the weights."""

from threading import Lock

from app.core.engine import card_keys
from app.core.errors import NotFound, Unavailable
from app.core.render import Renderer
from app.core.storage import Storage


class Renderers:
    """Fetched at first use, kept for as long as the engines hold the same base."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[str, tuple[str, Renderer]] = {}
        self._lock = Lock()

    def get(self, base: str, digest: str) -> Renderer:
        """The renderer of a base whose engines report this digest. Raises Unavailable before one has published it."""
        with self._lock:
            known_digest, renderer = self._known.get(base, ("", None))
            if renderer is None or known_digest != digest:
                renderer = self._fetch(base)
                self._known[base] = (digest, renderer)
            return renderer

    def _fetch(self, base: str) -> Renderer:
        tokenizer_key, facts_key = card_keys(base)
        try:
            return Renderer.parse(self._storage.get(tokenizer_key), self._storage.get(facts_key))
        except NotFound:
            raise Unavailable(f"{base} is still being loaded; try again shortly", code="base_not_loaded") from None
