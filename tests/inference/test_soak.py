"""Thousands of requests at once, half of them left early: what is told is right, and nothing is left behind."""

import asyncio
import random
from collections import Counter

from peft import PeftModel

from app.core.engine import AdapterRef, Chunk, GenerateRequest
from app.core.errors import RateLimited, Unavailable
from tests.inference import make
from tests.inference.conftest import OpenDriver
from worker.inference.driver import EngineDriver
from worker.model.base import LoadedBase

REQUESTS, AT_ONCE, TENANTS = 5_000, 64, 3
Right = dict[tuple[str | None, tuple[int, ...]], str]  # adapter and prompt to answer
TEXT = [3 + at % 250 for at in range(90)]


def prompts() -> list[tuple[int, ...]]:
    """Some begin alike."""
    return [tuple(TEXT[:length]) for length in (3, 20, 33, 50, 90)] + [(7, *TEXT[:40])]


def test_five_thousand_requests_leave_nothing_behind(
    open_driver: OpenDriver, oracle: LoadedBase, trained: dict[str, PeftModel], published: dict[str, AdapterRef]
) -> None:
    chance = random.Random(7)
    models = {None: oracle.model, **trained}
    right = {
        (name, prompt): make.words(model, oracle.renderer, prompt, 6) for name, model in models.items() for prompt in prompts()
    }
    few = {"max_adapters": 2, "max_batch": 24, "max_waiting": 32, "max_waiting_of_tenant": 12}
    driver = open_driver(**few, cache_bytes=60 * make.page_bytes(oracle))
    ends = asyncio.run(_soak(driver, chance, right, published))

    stats = driver.stats()
    assert (stats.running, stats.waiting, stats.held_pages) == (0, 0, 0)
    assert all(driver.evict(published[name].digest) for name in published if published[name].internal_name in stats.adapters)
    assert ends["told"] + ends["left"] == REQUESTS
    assert min(ends["told"], ends["left"]) > REQUESTS / 5, ends
    assert ends["rate_limit_exceeded"] + ends["engine_overloaded"], ends


async def _soak(driver: EngineDriver, chance: random.Random, right: Right, published: dict[str, AdapterRef]) -> Counter[str]:
    ends, places = Counter[str](), asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        (name, prompt), tenant = chance.choice(list(right)), f"org-{chance.randrange(TENANTS)}"
        wanted = make.request(prompt, published.get(name or ""), max_tokens=6).model_copy(update={"tenant": tenant})
        try:
            async with asyncio.timeout(chance.choice([None, None, 0, chance.random() * 0.2])):
                said = await _insist(driver, wanted, ends)
        except TimeoutError:
            ends["left"] += 1
        else:
            assert make.text_of(said) == right[name, prompt]
            ends["told"] += 1
        finally:
            places.release()

    async with asyncio.TaskGroup() as group:
        for _ in range(REQUESTS):
            await places.acquire()
            group.create_task(one())
    await make.until(lambda: not driver.stats().running)
    assert len(asyncio.all_tasks()) == 1
    return ends


async def _insist(driver: EngineDriver, wanted: GenerateRequest, ends: Counter[str]) -> list[Chunk]:
    """As clients do that were told to come again."""
    while True:
        try:
            return await make.answer(driver, wanted)
        except (RateLimited, Unavailable) as refusal:
            ends[str(refusal.code)] += 1
            await asyncio.sleep(0.05)
