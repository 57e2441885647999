"""Which pages of the key-value cache belong to whom, and what can be found in them again. No torch: `cache` holds the bytes."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class KeyChain:
    """Names of a text's full pages. A page's name covers all that came before it, so that equal names mean equal keys and values.

    `seed` names everything else that these depend on or that divides those who may share: base, adapters, tenant.
    """

    def __init__(self, seed: bytes) -> None:
        self._names, self._last = list[bytes](), seed

    def of(self, tokens: Sequence[int], *, size: int, count: int) -> list[bytes]:
        """Names of the first `count` pages of `size` tokens. The same text each time, perhaps longer."""
        while len(self._names) < count:
            at = len(self._names) * size
            page = array("q", tokens[at : at + size]).tobytes()
            self._last = hashlib.blake2b(self._last + page, digest_size=32).digest()
            self._names.append(self._last)
        return self._names[:count]


class Pages:
    """`count` pages of `size` tokens. A page is held by any number of sequences; when the last lets go of a page with a name, it
    stays to be found again until its place is needed, the least recently used first."""

    def __init__(self, *, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._name_of = dict[int, bytes]()
        self._named = dict[bytes, int]()
        self._idle = OrderedDict[int, None]()  # named pages that nobody holds, least recently used first

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        return self.count - self.available

    @property
    def cached(self) -> int:
        """Pages that can be found by name, held or not."""
        return len(self._named)

    def needed(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int]:
        """Pages to write into, `available` at most."""
        assert count <= self.available, "more pages taken than there are"
        taken = [self._free.pop() if self._free else self._forget_oldest() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, names: Iterable[bytes]) -> list[int]:
        """Pages with these names, as far as all are known. They are held from now on, and not to be written."""
        found = []
        for name in names:
            page = self._named.get(name)
            if page is None:
                break
            self._idle.pop(page, None)
            self._holders[page] += 1
            found.append(page)
        return found

    def name(self, page: int, name: bytes) -> None:
        """This page, held and full, can be found from now on; unless another one already goes by the name."""
        assert self._holders[page], "nobody holds the page"
        if name not in self._named and page not in self._name_of:
            self._named[name], self._name_of[page] = page, name

    def release(self, pages: Sequence[int]) -> None:
        """Let go of a sequence's pages, given in the order of its text: the last ones are forgotten first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, "a page released more often than held"
            if self._holders[page]:
                continue
            if page in self._name_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _forget_oldest(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._named[self._name_of.pop(page)]
        return page
