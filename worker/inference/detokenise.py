"""Token ids to text as they come: characters are never cut, stop strings never leak."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from app.core.pieces import overlap

_BROKEN = "\ufffd"  # what decoding shows for bytes that are not, or not yet, a character
_LONGEST_TAIL = 3  # a character has at most four bytes, so at most three of them can be waiting for the last


class Detokeniser:
    """Text of a growing list of ids. All that `push` and `flush` return, joined, is the decoded whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # already told; decoded along, since some decoders treat a first token differently
        self._fresh: list[int] = []
        self._told = 0  # characters of the fresh ids' text that were told

    def push(self, token: int) -> str:
        """New text that later tokens cannot change."""
        self._fresh.append(token)
        text = self._text()
        tail = min(len(text) - len(text.rstrip(_BROKEN)), _LONGEST_TAIL)
        new = text[self._told : len(text) - tail]
        if tail:
            self._told = max(self._told, len(text) - tail)
        elif text:
            self._context, self._fresh, self._told = self._fresh, [], 0
        return new

    def flush(self) -> str:
        """What was held back: nothing more will come."""
        text = self._text()[self._told :]
        self._context, self._fresh, self._told = self._fresh, [], 0
        return text

    def _text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._fresh)[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)) if tokens else ""


class StopStrings:
    """Passes text on until one of the strings appears; holds back what may yet become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.is_found = False

    def push(self, text: str) -> str:
        """Text that belongs to the answer. Once `is_found`, nothing does."""
        if self.is_found:
            return ""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_found, self._held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back and is now known to be no stop string."""
        text, self._held = self._held, ""
        return text
