"""Who runs in the next step, in which pages. No torch and no threads here: the engine calls it under its lock."""

from collections import Counter
from collections.abc import Sequence as SequenceOf

from app.core.errors import RateLimited, Unavailable
from worker.inference.pages import Pages
from worker.inference.sequence import Sequence, Slice
from worker.inference.waiting import WaitingRoom

PATIENCE_STEPS = 16  # how long a tenant with nothing in a full batch waits for a place before one is made
WRITTEN_WEIGHT = 2.0  # a token of an answer counts as so many of a prompt (Sheng et al., 2024)


class Scheduler:
    """A bounded queue, a bounded batch, a bounded number of prompt tokens in a step, and a page for every token that is kept.

    Running sequences decode in every step; what is left of the step's tokens goes to prompts, in pieces if they are long, so
    that a long prompt delays its neighbours' next token by one bounded step at a time: `busy_tokens` where someone decodes,
    `step_tokens` where nobody does. When pages run out the newest sequence gives up its own and is computed again later.
    """

    def __init__(
        self,
        pages: Pages,
        *,
        max_batch: int,
        max_waiting: int,
        max_waiting_of_tenant: int,
        step_tokens: int,
        busy_tokens: int | None = None,
    ) -> None:
        self.pages = pages
        self._max_batch, self._max_waiting, self._max_of_tenant = max_batch, max_waiting, max_waiting_of_tenant
        self._step_tokens, self._busy_tokens = step_tokens, busy_tokens or step_tokens
        self.waiting = WaitingRoom()
        self.running: list[Sequence] = []  # oldest first
        self._steps_waited = Counter[Sequence]()

    def add(self, sequence: Sequence) -> None:
        """Raises RateLimited when the tenant's part of the queue is full, Unavailable when all of it is."""
        if self.waiting.count_of(sequence.tenant) >= self._max_of_tenant:
            message = f"{self._max_of_tenant} requests of yours are waiting; send fewer at once, or again when some were answered"
            raise RateLimited(message)
        if len(self.running) + len(self.waiting) >= self._max_batch + self._max_waiting:
            raise Unavailable("every place in the engine's queue is taken; try again shortly", code="engine_overloaded")
        self.waiting.add(sequence)

    def schedule(self) -> list[Slice]:
        """The slices of the next step: decodes first, then prompts in order of admission."""
        for sequence in list(self.running):
            self._grow(sequence)
        self._make_way()
        self._admit()
        decoding = [sequence for sequence in self.running if sequence.remaining == 1]
        slices = [Slice(sequence, sequence.computed, 1) for sequence in decoding]
        left = self._busy_tokens if decoding else self._step_tokens
        for sequence in self.running:
            if sequence.remaining > 1 and (count := min(sequence.remaining, left)):
                slices.append(Slice(sequence, sequence.computed, count))
                left -= count
        slices.sort(key=lambda part: part.count > 1)  # the last token of a long prompt may stand alone
        return slices

    def advance(self, slices: SequenceOf[Slice]) -> None:
        """The step has been computed: what it filled can be found again, and is on its tenants' accounts."""
        for part in slices:
            sequence = part.sequence
            before, sequence.computed = sequence.computed // self.pages.size, sequence.computed + part.count
            full = sequence.computed // self.pages.size
            if full > before:  # most steps fill no page
                names = sequence.page_names(self.pages.size, full)
                for place in range(before, full):
                    self.pages.name(sequence.pages[place], names[place])
            self.waiting.charge(sequence.tenant, part.count + WRITTEN_WEIGHT * part.is_last)

    def sweep(self) -> list[Sequence]:
        """Take out what is over, wherever it stands, and free its pages."""
        over = [sequence for sequence in self.running if sequence.is_over]
        for sequence in over:
            self._let_go(sequence)
        over += self.waiting.take_out_over()
        for sequence in over:
            self._steps_waited.pop(sequence, None)
        return over

    def _grow(self, sequence: Sequence) -> None:
        """A page for the token that it reads next; the newest give way if there is none, perhaps itself."""
        while sequence in self.running and len(sequence.pages) < self.pages.needed(len(sequence.tokens)):
            if self.pages.available:
                sequence.pages += self.pages.take(1)
            else:
                self._put_back(self.running[-1])

    def _admit(self) -> None:
        while len(self.running) < self._max_batch and (sequence := self.waiting.next) and self._find_pages(sequence):
            self.waiting.let_in(sequence)
            self._steps_waited.pop(sequence, None)
            self.running.append(sequence)

    def _find_pages(self, sequence: Sequence) -> bool:
        """What is known of its text, and room for the rest. Whoever runs keeps a page to grow into."""
        size = self.pages.size
        shared = self.pages.share(sequence.page_names(size, (len(sequence.tokens) - 1) // size))  # one token is left to compute
        missing = self.pages.needed(len(sequence.tokens)) - len(shared)
        if missing > self.pages.available - len(self.running):
            self.pages.release(shared)
            return False
        sequence.computed = len(shared) * size
        if not sequence.completion_tokens:  # else it gave way, and finds what it had read itself
            sequence.cached_tokens = sequence.computed
        sequence.pages = shared + self.pages.take(missing)
        return True

    def _make_way(self) -> None:
        """A tenant that has no place in a full batch and waited long gets the newest one of who has most."""
        sequence = self.waiting.next
        if sequence is None or len(self.running) < self._max_batch:
            return
        self._steps_waited[sequence] += 1
        rows = Counter(one.tenant for one in self.running)
        if rows[sequence.tenant] or self._steps_waited[sequence] < PATIENCE_STEPS:
            return
        tenant, count = rows.most_common(1)[0]
        if count > 1:
            self._put_back(next(one for one in reversed(self.running) if one.tenant == tenant))

    def _put_back(self, sequence: Sequence) -> None:
        self._let_go(sequence)
        self.waiting.put_back(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pages.release(sequence.pages)
        sequence.pages, sequence.computed = [], 0
