"""What the engine says is what PEFT says: alone, among others, and after an adapter has come back."""

import asyncio
from collections.abc import Collection
from pathlib import Path

import pytest
from peft import PeftModel

from app.core.engine import AdapterRef, GenerateRequest
from app.core.errors import BadRequest, NotFound, Unavailable
from app.core.storage import Storage
from tests.inference import make
from tests.inference.conftest import OpenDriver
from worker.inference.driver import EngineDriver
from worker.model.base import LoadedBase

Published = dict[str, AdapterRef]
Trained = dict[str, PeftModel]


def expected(base: LoadedBase, trained: Trained, name: str | None, prompt: list[int], max_tokens: int = 24) -> str:
    model = trained[name] if name else base.model
    return make.words(model, base.renderer, prompt, max_tokens)


async def said(driver: EngineDriver, wanted: GenerateRequest) -> str:
    return make.text_of(await make.answer(driver, wanted))


async def all_said(driver: EngineDriver, wanted: Collection[GenerateRequest]) -> list[str]:
    return await asyncio.gather(*(said(driver, one) for one in wanted))


@pytest.mark.parametrize("name", [None, "first", "second", "third"])
def test_each_model_alone_says_what_peft_says(
    open_driver: OpenDriver, oracle: LoadedBase, trained: Trained, published: Published, name: str | None
) -> None:
    driver = open_driver()
    for prompt in make.PROMPTS:
        wanted = make.request(prompt, published.get(name or ""))
        assert asyncio.run(said(driver, wanted)) == expected(oracle, trained, name, prompt)


def test_base_and_three_adapters_in_one_batch_say_what_peft_says(
    open_driver: OpenDriver, oracle: LoadedBase, trained: Trained, published: Published
) -> None:
    asked = [(name, prompt) for prompt in make.PROMPTS for name in (None, "first", "second", "third")]
    answers = asyncio.run(
        all_said(open_driver(max_batch=16), [make.request(prompt, published.get(name or "")) for name, prompt in asked])
    )

    assert answers == [expected(oracle, trained, name, prompt) for name, prompt in asked]
    assert len({answers[at] for at in range(4)}) == 4  # four models: the comparison could have failed


def test_an_evicted_adapter_comes_back_and_says_the_same(
    open_driver: OpenDriver, oracle: LoadedBase, trained: Trained, published: Published
) -> None:
    driver = open_driver(max_adapters=1)
    for name in ("first", "second", "first"):
        assert asyncio.run(said(driver, make.request(ref=published[name]))) == expected(oracle, trained, name, make.PROMPTS[0])
        assert driver.stats().adapters == (published[name].internal_name,)


def test_a_prompt_longer_than_a_step_is_read_in_pieces(
    open_driver: OpenDriver, oracle: LoadedBase, trained: Trained, published: Published
) -> None:
    prompt = [3 + at % 250 for at in range(400)]
    wanted = [make.request(prompt, published["second"]), make.request(), make.request(prompt)]

    assert asyncio.run(all_said(open_driver(), wanted)) == [
        expected(oracle, trained, "second", prompt),
        expected(oracle, trained, None, make.PROMPTS[0]),
        expected(oracle, trained, None, prompt),
    ]


def test_what_was_read_with_one_adapter_is_never_used_for_another(
    open_driver: OpenDriver, oracle: LoadedBase, trained: Trained, published: Published
) -> None:
    driver, prompt = open_driver(), [3 + at % 250 for at in range(100)]
    found = dict[str | None, list[int]]()
    for name in ("first", "second", None, "first", "second", None):
        chunks = asyncio.run(make.answer(driver, make.request(prompt, published.get(name or ""))))
        assert make.text_of(chunks) == expected(oracle, trained, name, prompt)
        found.setdefault(name, []).append(chunks[-1].cached_tokens)

    assert set(map(tuple, found.values())) == {(0, 96)}


def test_what_was_read_for_one_tenant_is_never_used_for_another(open_driver: OpenDriver, published: Published) -> None:
    driver, prompt = open_driver(), [3 + at % 250 for at in range(100)]

    def cached(tenant: str) -> int:
        wanted = make.request(prompt, published["first"]).model_copy(update={"tenant": tenant})
        return asyncio.run(make.answer(driver, wanted))[-1].cached_tokens

    assert [cached(tenant) for tenant in ("one", "other", "one", "other")] == [0, 0, 96, 96]


def test_an_answer_goes_on_from_the_conversation_it_belongs_to(
    open_driver: OpenDriver, oracle: LoadedBase, trained: Trained, published: Published
) -> None:
    driver = open_driver()
    prompt = [3 + at % 250 for at in range(60)]
    told = make.greedy(trained["first"], prompt, oracle.renderer.stop_ids, 24)
    asyncio.run(said(driver, make.request(prompt, published["first"])))
    longer = [*prompt, *told, 65, 66]
    chunks = asyncio.run(make.answer(driver, make.request(longer, published["first"])))

    assert chunks[-1].cached_tokens == (len(prompt) + len(told) - 1) // 16 * 16
    assert make.text_of(chunks) == expected(oracle, trained, "first", longer)


def test_with_too_few_pages_for_all_everyone_is_answered_the_same(
    open_driver: OpenDriver, oracle: LoadedBase, trained: Trained, published: Published
) -> None:
    text = [5 + at % 200 for at in range(120)]
    asked = [(name, [at, *text]) for at in range(3) for name in (None, "first", "second")]
    driver = open_driver(cache_bytes=26 * make.page_bytes(oracle))
    answers = asyncio.run(
        all_said(driver, [make.request(prompt, published.get(name or ""), max_tokens=40) for name, prompt in asked])
    )

    assert answers == [expected(oracle, trained, name, prompt, 40) for name, prompt in asked]


def test_a_quantized_base_that_is_not_unpacked_says_the_same(
    open_driver: OpenDriver, oracle: LoadedBase, trained: Trained, published: Published
) -> None:
    wanted = [make.request(prompt, published["first"]) for prompt in make.PROMPTS]

    assert asyncio.run(all_said(open_driver(unpacked_bytes=0), wanted)) == [
        expected(oracle, trained, "first", prompt) for prompt in make.PROMPTS
    ]


def test_a_model_that_was_trained_again_never_answers_for_its_old_self(
    open_driver: OpenDriver,
    oracle: LoadedBase,
    trained: Trained,
    published: Published,
    storage: Storage,
    tmp_path: Path,
) -> None:
    driver, prompt = open_driver(), [3 + at % 250 for at in range(40)]
    again = make.publish(storage, oracle, trained["second"], tmp_path / published["first"].id)
    told = [asyncio.run(said(driver, make.request(prompt, ref))) for ref in (published["first"], again, published["first"])]

    assert again.id == published["first"].id
    assert told == [expected(oracle, trained, name, prompt) for name in ("first", "second", "first")]


def test_two_engines_in_one_process_do_not_disturb_each_other(
    open_driver: OpenDriver, oracle: LoadedBase, trained: Trained, published: Published
) -> None:
    async def both() -> list[str]:
        one, other = open_driver(), open_driver()
        wanted = make.request(ref=published["first"]), make.request(ref=published["second"]), make.request()
        return await asyncio.gather(said(one, wanted[0]), said(other, wanted[1]), said(other, wanted[2]))

    assert asyncio.run(both()) == [expected(oracle, trained, name, make.PROMPTS[0]) for name in ("first", "second", None)]


def test_a_seed_gives_the_same_text_in_company(open_driver: OpenDriver, published: Published) -> None:
    driver = open_driver()
    seeded = [make.request(ref=published["first"], temperature=1.0, top_p=0.9, seed=11) for _ in range(2)]
    alone = asyncio.run(said(driver, seeded[0]))
    company = [make.request(prompt, published["third"], temperature=1.0) for prompt in make.PROMPTS]

    assert asyncio.run(all_said(driver, [*company, seeded[1]]))[-1] == alone


def test_an_unknown_adapter_is_never_answered_by_the_base(open_driver: OpenDriver, published: Published) -> None:
    unknown = AdapterRef(id="unknown", digest="0" * 64, prefix="adapters/unknown", base=published["first"].base)

    with pytest.raises(NotFound) as refusal:
        asyncio.run(said(open_driver(), make.request(ref=unknown)))
    assert refusal.value.code == "model_not_found"


def test_a_lease_answers_only_for_its_own_adapter(open_driver: OpenDriver, published: Published) -> None:
    async def mixed_up() -> None:
        driver = open_driver()
        lease = await driver.ensure(published["first"])
        for wanted in (make.request(), make.request(ref=published["second"])):
            with pytest.raises(ValueError, match="lease"):
                await anext(driver.stream(wanted, [lease]))
        with pytest.raises(ValueError, match="lease"):
            await anext(driver.stream(make.request(ref=published["first"]), []))

    asyncio.run(mixed_up())


def test_an_adapter_of_another_base_is_refused(open_driver: OpenDriver, published: Published) -> None:
    foreign = published["first"].model_copy(update={"base": "another"})

    with pytest.raises(Unavailable) as refusal:
        asyncio.run(said(open_driver(), make.request(ref=foreign)))
    assert refusal.value.code == "base_not_loaded"


def test_an_adapter_over_the_allowed_rank_is_refused_by_name(open_driver: OpenDriver, published: Published) -> None:
    with pytest.raises(BadRequest, match="rank") as refusal:
        asyncio.run(said(open_driver(max_rank=4), make.request(ref=published["second"])))
    assert refusal.value.code == "adapter_refused"


def test_a_prompt_that_fills_the_context_is_refused(open_driver: OpenDriver) -> None:
    driver = open_driver()
    with pytest.raises(BadRequest) as refusal:
        asyncio.run(said(driver, make.request([5] * driver.caps.context_length)))
    assert refusal.value.code == "context_length_exceeded"


def test_an_answer_ends_where_the_context_does(open_driver: OpenDriver) -> None:
    driver = open_driver()
    chunks = asyncio.run(make.answer(driver, make.request([5] * (driver.caps.context_length - 3), max_tokens=100)))

    assert chunks[-1].completion_tokens <= 3
    assert chunks[-1].finish_reason


def test_a_token_id_that_is_none_of_the_model_s_is_refused(open_driver: OpenDriver) -> None:
    with pytest.raises(BadRequest):
        asyncio.run(said(open_driver(), make.request([5, 100_000])))


def test_leaving_early_frees_sequence_and_lease(open_driver: OpenDriver, published: Published) -> None:
    async def leave() -> None:
        driver = open_driver(max_adapters=1)
        wanted = make.request(ref=published["first"], max_tokens=400, temperature=2.0, seed=1)
        lease = await driver.ensure(published["first"])
        chunks = driver.stream(wanted, [lease])
        await anext(chunks)
        assert driver.evict(published["first"].digest) is False  # in use
        await chunks.aclose()
        driver.release(lease)

        await make.until(lambda: driver.stats().running == 0)
        assert driver.evict(published["first"].digest) is True

    asyncio.run(leave())


def test_cancelling_by_name_ends_the_stream(open_driver: OpenDriver) -> None:
    async def cancel() -> None:
        driver = open_driver()
        wanted = make.request(max_tokens=400, temperature=2.0, seed=1)
        chunks = driver.stream(wanted, [])
        await anext(chunks)
        driver.cancel(wanted.request_id)
        driver.cancel("unknown")

        assert [chunk async for chunk in chunks][-1].error
        await make.until(lambda: driver.stats().running == 0)

    asyncio.run(cancel())
