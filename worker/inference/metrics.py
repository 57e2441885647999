"""What an engine measures. No torch: the model is only watched from outside."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar, get_args

from prometheus_client import Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.core.engine import Chunk, EngineStats, FinishReason
from app.core.metrics import LONG_SECONDS, SECONDS, TOKEN_SECONDS, at_zero, gauge, new_registry
from worker.inference.engine import Runner
from worker.inference.sequence import Choice, Slice
from worker.inference.sequence import Sequence as Running

X = TypeVar("X")
Y = TypeVar("Y")

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class EngineMetrics:
    """Of one engine. `first_token_seconds` includes the wait for a place and for the adapter."""

    def __init__(self) -> None:
        self.registry = new_registry()
        counter, histogram = partial(Counter, registry=self.registry), partial(Histogram, registry=self.registry)
        self._answers = counter("tunesmith_engine_answers", "Answers that are over", ("finish_reason",))
        at_zero(self._answers, (*get_args(FinishReason), "error", "left"))
        self._prompt_tokens = counter("tunesmith_engine_prompt_tokens", "Tokens of prompts")
        self._cached_tokens = counter("tunesmith_engine_cached_tokens", "Those of them that were found in the cache")
        self._generated_tokens = counter("tunesmith_engine_generated_tokens", "Tokens of answers")
        self._first_token_seconds = histogram(
            "tunesmith_engine_first_token_seconds", "From a request to its first token", buckets=SECONDS
        )
        self._next_token_seconds = histogram(
            "tunesmith_engine_next_token_seconds", "From one token of an answer to the next", buckets=TOKEN_SECONDS
        )
        self._queue_seconds = histogram(
            "tunesmith_engine_queue_seconds", "From a request to the first step that reads of it", buckets=SECONDS
        )
        self._batch = histogram("tunesmith_engine_batch_sequences", "Sequences in a step", buckets=BATCHES)
        self._step_seconds = histogram("tunesmith_engine_step_seconds", "One forward", buckets=TOKEN_SECONDS)
        self._load_seconds = histogram(
            "tunesmith_engine_adapter_load_seconds",
            "To read, check and prepare an adapter that was not in memory",
            ("result",),
            buckets=LONG_SECONDS,
        )
        at_zero(self._load_seconds, ("loaded", "failed"))

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Tell these too, as they are when Prometheus asks."""
        self.registry.register(_Stats(stats))

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def answering(self, prompt_tokens: int) -> "AnswerMetrics":
        return AnswerMetrics(self, prompt_tokens)

    def timed(self, load: Callable[[X], Y]) -> Callable[[X], Y]:
        """`load`, timed."""

        def timed_load(what: X) -> Y:
            began, result = time.perf_counter(), "failed"
            try:
                loaded = load(what)
                result = "loaded"
                return loaded
            finally:
                self._load_seconds.labels(result).observe(time.perf_counter() - began)

        return timed_load

    def watching(self, runner: Runner) -> Runner:
        """`runner`, with its steps counted."""
        return _WatchedRunner(runner, self._batch, self._step_seconds, self._queue_seconds)


class AnswerMetrics:
    """Of one answer while it is given."""

    def __init__(self, of: EngineMetrics, prompt_tokens: int) -> None:
        self._of, self._prompt_tokens = of, prompt_tokens
        self._spoke_at = time.perf_counter()
        self._tokens = 0
        self._is_read, self._is_over = False, False

    def note(self, chunk: Chunk) -> None:
        of, now = self._of, time.perf_counter()
        if not self._is_read and chunk.error is None:  # one that is refused is read elsewhere
            self._is_read = True
            of._prompt_tokens.inc(self._prompt_tokens)
            of._cached_tokens.inc(chunk.cached_tokens)
        gained = chunk.completion_tokens - self._tokens
        if gained > 0:
            (of._next_token_seconds if self._tokens else of._first_token_seconds).observe(now - self._spoke_at)
            of._generated_tokens.inc(gained)
            self._tokens, self._spoke_at = chunk.completion_tokens, now
        if chunk.finish_reason or chunk.error is not None:
            self._end(chunk.finish_reason or "error")

    def left(self) -> None:
        """Its client has, perhaps once it had heard the end."""
        if not self._is_over:
            self._end("left")

    def _end(self, reason: str) -> None:
        self._is_over = True
        self._of._answers.labels(reason).inc()


class _WatchedRunner:
    def __init__(self, runner: Runner, batch: Histogram, seconds: Histogram, queued: Histogram) -> None:
        self._runner, self._batch, self._seconds, self._queued = runner, batch, seconds, queued

    def run(self, slices: Sequence[Slice]) -> list[tuple[Running, Choice | None]]:
        self._batch.observe(len(slices))
        for sequence in (part.sequence for part in slices if part.sequence.began_at is None):
            sequence.began_at = time.perf_counter()
            self._queued.observe(sequence.began_at - sequence.made_at)
        with self._seconds.time():
            return self._runner.run(slices)


class _Stats(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        found = self._stats()
        yield gauge("tunesmith_engine_running", "Requests in the batch", ("base",), [((found.base,), found.running)])
        yield gauge("tunesmith_engine_waiting", "Requests that wait for a place", ("base",), [((found.base,), found.waiting)])
        pages = {"all": found.pages, "held": found.held_pages, "cached": found.cached_pages}
        yield gauge(
            "tunesmith_engine_cache_pages",
            "Pages for keys and values: all, those in use, those that can be found again",
            ("kind",),
            [((kind,), count) for kind, count in pages.items()],
        )
        yield from _tiers(found)


def _tiers(found: EngineStats) -> Iterator[Metric]:
    """Adapters in slots, memory and on disk. What was not found in one is looked for in the next: a miss."""
    tiers = found.tiers.items()
    yield _by_tier("tunesmith_engine_adapters", "Adapters held", {name: tier.held for name, tier in tiers})
    yield _by_tier("tunesmith_engine_adapter_bytes", "What they take", {name: tier.size_bytes for name, tier in tiers})
    for what, counts in (
        ("hits", {name: tier.hits for name, tier in tiers}),
        ("evictions", {name: tier.evictions for name, tier in tiers}),
    ):
        family = CounterMetricFamily(f"tunesmith_engine_adapter_{what}", f"Adapter {what}", labels=("tier",))
        for name, count in counts.items():
            family.add_metric((name,), count)
        yield family
    yield CounterMetricFamily("tunesmith_engine_adapter_fetches", "Adapters brought from storage", value=found.fetched_adapters)
    yield CounterMetricFamily("tunesmith_engine_adapter_refusals", "Adapters that may not answer", value=found.refused_adapters)


def _by_tier(name: str, help: str, values: dict[str, int]) -> GaugeMetricFamily:
    return gauge(name, help, ("tier",), [((tier,), value) for tier, value in values.items()])
