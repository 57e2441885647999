"""Who is let in next. No torch here."""

from collections import defaultdict, deque
from collections.abc import Iterator

from worker.inference.sequence import Sequence


class WaitingRoom:
    """Tenants take turns by what they were given: the next is of the tenant with the smallest count of tokens, and of one tenant
    who came first (virtual token counter: Sheng et al., "Fairness in Serving Large Language Models", 2024).

    A tenant that comes back after a while starts at the count of who was let in last: nobody saves up by staying away.
    """

    def __init__(self) -> None:
        self._queues = defaultdict[str, deque[Sequence]](deque)
        self._counts = dict[str, float]()  # of tenants above `_now`; all others stand at it
        self._now = 0.0

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queue in self._queues.values() for sequence in queue)

    def count_of(self, tenant: str) -> int:
        return len(self._queues[tenant]) if tenant in self._queues else 0

    def add(self, sequence: Sequence) -> None:
        self._queues[sequence.tenant].append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Before all others of its tenant: it had been let in already."""
        self._queues[sequence.tenant].appendleft(sequence)

    def charge(self, tenant: str, tokens: float) -> None:
        self._counts[tenant] = self._count(tenant) + tokens

    @property
    def next(self) -> Sequence | None:
        tenant = min(self._queues, key=self._count, default=None)
        return None if tenant is None else self._queues[tenant][0]

    def let_in(self, sequence: Sequence) -> None:
        """Take out who is `next`."""
        tenant = sequence.tenant
        self._now = max(self._now, self._count(tenant))
        self._counts = {one: count for one, count in self._counts.items() if count > self._now}
        self._queues[tenant].popleft()
        if not self._queues[tenant]:
            del self._queues[tenant]

    def take_out_over(self) -> list[Sequence]:
        over = [sequence for sequence in self if sequence.is_over]
        for tenant in {sequence.tenant for sequence in over}:
            self._queues[tenant] = deque(sequence for sequence in self._queues[tenant] if not sequence.is_over)
            if not self._queues[tenant]:
                del self._queues[tenant]
        return over

    def _count(self, tenant: str) -> float:
        return max(self._counts.get(tenant, 0.0), self._now)
