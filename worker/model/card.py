"""A base's card: its tokenizer, chat template and stop tokens, in a folder. Made without weights, and read without torch."""

import hashlib
import json
from pathlib import Path

from app.core import render
from app.core.catalog import Base
from app.core.render import Renderer
from worker.model import source
from worker.model.directory import locked, written_whole
from worker.model.source import BaseRefused

_FORMAT = 2  # another number makes every card anew


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


def _directory(base: Base, template: str, cache_dir: Path) -> Path:
    said = f"{_FORMAT} {source.fingerprint(base)} {template} {render.marked_tools_template(base.family)}"
    key = hashlib.sha256(said.encode()).hexdigest()
    return cache_dir / "cards" / f"{base.id}-{key[:16]}"


def _write_card(base: Base, template: str, vocabulary: source.Vocabulary, directory: Path) -> None:
    renderer = Renderer(vocabulary.tokenizer, template, vocabulary.stop_ids, base.context_length)
    if renderer.differs_from_template(vocabulary.template, vocabulary.variables):
        raise BaseRefused(
            f"the chat template of {base.id} writes conversations differently from templates/{base.family}.jinja; "
            "give the catalog entry a family whose template agrees"
        )
    facts = {
        "id": base.id,
        "revision": vocabulary.revision,
        "template": template,
        "tools_template": _tools_template(base, renderer, vocabulary),
        "stop_ids": list(vocabulary.stop_ids),
        "context_length": base.context_length,
    }
    with written_whole(directory) as partial:
        (partial / render.TOKENIZER).write_text(vocabulary.tokenizer.to_str())
        (partial / render.CARD).write_text(json.dumps(facts))


def _tools_template(base: Base, plain: Renderer, vocabulary: source.Vocabulary) -> str | None:
    """The family's template for conversations with tools, if the base's own one agrees: else it has none."""
    if (template := render.marked_tools_template(base.family)) is None:
        return None
    renderer = Renderer(plain.tokenizer, plain.template, vocabulary.stop_ids, base.context_length, template)
    return None if renderer.differs_on_tools(vocabulary.template, vocabulary.variables) else template
