"""Pages of the key-value cache: never two owners of what is written, never one lost, and found again only by the same text."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.inference.pages import KeyChain, Pages

SIZE = 2


def test_a_text_is_found_as_far_as_it_is_the_same() -> None:
    pages = Pages(count=4, size=SIZE)
    first = KeyChain(b"seed").of([1, 2, 3, 4, 5, 6], size=SIZE, count=3)
    held = pages.take(3)
    for page, name in zip(held, first, strict=True):
        pages.name(page, name)

    assert pages.share(KeyChain(b"seed").of([1, 2, 3, 4, 9, 9], size=SIZE, count=3)) == held[:2]
    assert pages.share(KeyChain(b"seed").of([9, 2, 3, 4, 5, 6], size=SIZE, count=3)) == []
    assert pages.share(KeyChain(b"another").of([1, 2, 3, 4, 5, 6], size=SIZE, count=3)) == []


def test_the_end_of_the_text_used_longest_ago_is_forgotten_first() -> None:
    pages = Pages(count=4, size=SIZE)
    texts = [KeyChain(b"").of(tokens, size=SIZE, count=2) for tokens in ([1, 2, 3, 4], [5, 6, 7, 8])]
    for names in texts:
        held = pages.take(2)
        for page, name in zip(held, names, strict=True):
            pages.name(page, name)
        pages.release(held)
    pages.take(1)

    assert [len(pages.share(names)) for names in texts] == [1, 2]


class Held:
    """What one sequence would know of its pages."""

    def __init__(self, names: list[bytes], shared: list[int], own: list[int]) -> None:
        self.names, self.shared, self.own = names, shared, own


class PagesMachine(RuleBasedStateMachine):
    """Sequences come with texts that begin alike, name their pages and leave, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(count=7, size=SIZE)
        self.sequences: list[Held] = []
        self.content: dict[int, bytes] = {}  # what was written into each page, by its name

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=8), seed=st.sampled_from([b"one", b"two"]))
    def arrive(self, tokens: list[int], seed: bytes) -> None:
        names = KeyChain(seed).of(tokens, size=SIZE, count=len(tokens) // SIZE)
        shared = self.pages.share(names)
        assert [self.content[page] for page in shared] == names[: len(shared)], "found pages that hold another text"
        missing = len(names) - len(shared)
        if missing > self.pages.available:
            self.pages.release(shared)
            return
        own = self.pages.take(missing)
        assert not {page for one in self.sequences for page in (*one.own, *one.shared)} & set(own), "taken from its holder"
        for page, name in zip(own, names[len(shared) :], strict=True):
            self.content[page] = name
        self.sequences.append(Held(names, shared, own))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def name(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.sequences))
        for page, name in zip(one.own, one.names[len(one.shared) :], strict=True):
            self.pages.name(page, name)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(one)
        self.pages.release(one.shared + one.own)

    @invariant()
    def none_is_lost(self) -> None:
        held = {page for one in self.sequences for page in (*one.own, *one.shared)}
        assert self.pages.held == len(held)
        assert self.pages.available == self.pages.count - len(held)


TestPagesMachine = PagesMachine.TestCase
TestPagesMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
