"""What a worker publishes of a base is all that the API needs to render for it."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from app.core import catalog, ids, render
from app.core.chat import Message
from app.core.engine import tokenizer_key
from app.core.errors import Unavailable
from app.core.render import Renderer
from app.core.settings import Settings
from app.core.storage import Storage, open_storage
from app.inference.renderers import Renderers
from tests import make
from worker.model import card

ASKED = [Message("user", "Hi"), Message("assistant", "Yes")]


@pytest.fixture(scope="module")
def tiny_card(bases_dir: Path) -> Path:
    return card.prepared(catalog.load()[make.TINY], bases_dir)


def changed(directory: Path, to: Path, *, word: str) -> Path:
    """A card with another template and a tokenizer that knows one word more."""
    renderer = Renderer.open(directory)
    renderer.tokenizer.add_tokens([word])
    tokenizer = renderer.tokenizer.to_str().encode()
    facts = json.loads((directory / render.CARD).read_text())
    facts |= {"template": facts["template"] + "{# changed #}", "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest()}
    to.mkdir()
    (to / render.TOKENIZER).write_bytes(tokenizer)
    (to / render.CARD).write_text(json.dumps(facts))
    return to


def test_a_published_card_renders_as_its_base_does(storage: Storage, tiny_card: Path) -> None:
    base = ids.new("base-")
    with pytest.raises(Unavailable) as refused:
        Renderers(storage).get(base)
    card.publish(storage, base, tiny_card)

    assert refused.value.code == "base_not_loaded"
    assert Renderers(storage).get(base).example(ASKED) == Renderer.open(tiny_card).example(ASKED)


def test_the_api_renders_without_torch() -> None:
    code = "import sys, app.inference.renderers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_another_card_is_seen_as_a_whole(storage: Storage, tiny_card: Path, tmp_path: Path) -> None:
    base = ids.new("base-")
    card.publish(storage, base, tiny_card)
    renderers = Renderers(storage, look_again_seconds=0)
    before = renderers.get(base)
    other = changed(tiny_card, tmp_path / "other", word="Yes")
    sha256 = json.loads((other / render.CARD).read_text())["tokenizer_sha256"]
    storage.put_file(tokenizer_key(base, sha256), other / render.TOKENIZER)  # where a worker that died had come to

    assert renderers.get(base) is before
    card.publish(storage, base, other)
    assert renderers.get(base).template_sha256 != before.template_sha256
    assert len(renderers.get(base).example(ASKED).tokens) == len(before.example(ASKED).tokens) - 2


def test_a_damaged_tokenizer_is_published_again(storage: Storage, tiny_card: Path) -> None:
    base = ids.new("base-")
    card.publish(storage, base, tiny_card)
    storage.put(tokenizer_key(base, json.loads((tiny_card / render.CARD).read_text())["tokenizer_sha256"]), b"{}")
    with pytest.raises(Unavailable, match="damaged"):
        Renderers(storage).get(base)

    card.publish(storage, base, tiny_card)
    assert Renderers(storage).get(base).example(ASKED)


def test_a_card_of_the_last_release_is_read(storage: Storage, tiny_card: Path) -> None:
    base = ids.new("base-")
    facts = json.loads((tiny_card / render.CARD).read_text())
    del facts["tokenizer_sha256"]
    storage.put(f"bases/{base}/base.json", json.dumps(facts).encode())
    storage.put_file(f"bases/{base}/tokenizer.json", tiny_card / render.TOKENIZER)

    assert Renderers(storage).get(base).example(ASKED)


def test_what_is_known_serves_while_storage_is_away(storage: Storage, settings: Settings, tiny_card: Path) -> None:
    base = ids.new("base-")
    card.publish(storage, base, tiny_card)
    renderers = Renderers(storage, look_again_seconds=0)
    before = renderers.get(base, "digest")
    nowhere = settings.storage.model_copy(update={"endpoint_url": f"http://127.0.0.1:{make.free_port()}"})
    renderers._storage = open_storage(nowhere, for_requests=True)

    assert renderers.get(base, "digest") is before
    with pytest.raises(Unavailable):
        renderers.get(base, "another")
