"""What `npm run build` in `web/` has made: scripts, styles, fonts, under names that change with their content; and icons."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markupsafe import Markup

FOLDER = Path(__file__).parent / "static"


class NotBuilt(Exception):
    """The assets are missing: this checkout was never built."""


@dataclass(frozen=True)
class Assets:
    folder: Path = FOLDER

    @cached_property
    def _names(self) -> dict[str, str]:
        try:
            names: dict[str, str] = json.loads((self.folder / "manifest.json").read_text())
        except FileNotFoundError:
            raise NotBuilt(f"{self.folder} holds no assets; `make assets` builds them") from None
        return names

    @cached_property
    def _icons(self) -> dict[str, str]:
        icons: dict[str, str] = json.loads((self.folder / "icons.json").read_text())
        return icons

    def url(self, name: str) -> str:
        """Where a browser finds `job.js`."""
        return f"/static/{self._names[name]}"

    def icon(self, name: str, label: str | None = None) -> Markup:
        """An SVG in the text's size and colour. Without a label it is an ornament, and no screen reader tells of it."""
        told = Markup('role="img" aria-label="{}"').format(label) if label else Markup('aria-hidden="true"')
        start = Markup('<svg class="icon" viewBox="0 0 24 24" {}>').format(told)
        title = Markup("<title>{}</title>").format(label) if label else Markup()
        return start + title + Markup(self._icons[name]) + Markup("</svg>")  # noqa: S704 - built from a package of ours
