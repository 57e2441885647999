"""A base's card: its tokenizer, chat template and stop tokens, in a folder. Made without weights, and read without torch.

Workers publish it, so that the API renders and counts for a base without having it.
"""

import hashlib
import json
from pathlib import Path

from app.core import render
from app.core.catalog import Base
from app.core.engine import card_key, tokenizer_key
from app.core.render import Renderer, RenderError
from app.core.storage import Storage
from worker.model import source
from worker.model.directory import locked, written_whole
from worker.model.source import BaseRefused

_FORMAT = 3  # another number makes every card anew


def prepared(base: Base, cache_dir: Path) -> Path:
    """The folder with what `Renderer.open` reads. Needs no weights.

    Raises BaseRefused when the family's marked template and the base's own one write a conversation differently.
    """
    template = render.marked_template(base.family)
    directory = _directory(base, template, cache_dir)
    with locked(cache_dir / "cards" / f".{directory.name}.lock"):
        if not directory.exists():
            _write_card(base, template, source.vocabulary(base, cache_dir), directory)
    return directory


def find(base: Base, cache_dir: Path) -> Path | None:
    """The folder that `prepared` would give, if it is there already. Raises BaseRefused."""
    directory = _directory(base, render.marked_template(base.family), cache_dir)
    return directory if directory.exists() else None


def revision_of(directory: Path) -> str:
    """What the base's revision resolved to when the card was made."""
    return str(json.loads((directory / render.CARD).read_text())["revision"])


def publish(storage: Storage, base_id: str, directory: Path) -> None:
    """Put a card where the API looks for it; its tokenizer first, under a name of its own. Twice is once."""
    card = (directory / render.CARD).read_bytes()
    sha256 = json.loads(card)["tokenizer_sha256"]
    key = tokenizer_key(base_id, sha256)
    if not storage.exists(key) or storage.sha256_of(key) != sha256:
        storage.put_file(key, directory / render.TOKENIZER)
    storage.put(card_key(base_id), card, content_type="application/json")


def _directory(base: Base, template: str, cache_dir: Path) -> Path:
    said = f"{_FORMAT} {source.fingerprint(base)} {template} {render.marked_tools_template(base.family)}"
    key = hashlib.sha256(said.encode()).hexdigest()
    return cache_dir / "cards" / f"{base.id}-{key[:16]}"


def _write_card(base: Base, template: str, vocabulary: source.Vocabulary, directory: Path) -> None:
    renderer = Renderer(vocabulary.tokenizer, template, vocabulary.stop_ids, base.context_length)
    _check_template(base, renderer, vocabulary)
    tokenizer = vocabulary.tokenizer.to_str().encode()
    facts = {
        "id": base.id,
        "revision": vocabulary.revision,
        "template": template,
        "tools_template": _tools_template(base, renderer, vocabulary),
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        "stop_ids": list(vocabulary.stop_ids),
        "context_length": base.context_length,
    }
    with written_whole(directory) as partial:
        (partial / render.TOKENIZER).write_bytes(tokenizer)
        (partial / render.CARD).write_text(json.dumps(facts))


def _check_template(base: Base, renderer: Renderer, vocabulary: source.Vocabulary) -> None:
    try:
        differs = renderer.differs_from_template(vocabulary.template, vocabulary.variables)
    except RenderError as error:
        raise BaseRefused(f"templates/{base.family}.jinja does not serve {base.id}: {error}") from None
    if differs:
        raise BaseRefused(
            f"the chat template of {base.id} writes conversations differently from templates/{base.family}.jinja; "
            "give the catalog entry a family whose template agrees"
        )


def _tools_template(base: Base, plain: Renderer, vocabulary: source.Vocabulary) -> str | None:
    """The family's template for conversations with tools, if the base's own one agrees: else it has none."""
    if (template := render.marked_tools_template(base.family)) is None:
        return None
    renderer = Renderer(plain.tokenizer, plain.template, vocabulary.stop_ids, base.context_length, template)
    return None if renderer.differs_on_tools(vocabulary.template, vocabulary.variables) else template
