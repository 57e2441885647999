"""An adapter is loaded once, verified, kept while it is used, and never mistaken for another."""

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from app.core.engine import AdapterRef
from app.core.errors import BadRequest, NotFound, Unavailable
from app.core.manifest import BaseEntry
from app.core.storage import Storage
from tests import small_disk
from tests.embedded.patience import PATIENCE_SECONDS
from tests.inference.make import Words
from worker.inference import adapters
from worker.inference.adapters import AdapterStore, Room
from worker.inference.disk import AdapterDisk

Published = dict[str, AdapterRef]
BASE = BaseEntry(id="base", revision="1", digest="d" * 64)


def ref(name: str) -> AdapterRef:
    return AdapterRef(id=name, digest=name * 8, prefix=name, base="base")


class Loads:
    """Counts loads, and holds them up until they may finish."""

    def __init__(self) -> None:
        self.names = list[str]()
        self.may_finish = threading.Event()
        self.may_finish.set()
        self.error: Exception | None = None

    def __call__(self, wanted: AdapterRef) -> Words:
        self.names.append(wanted.id)
        assert self.may_finish.wait(PATIENCE_SECONDS)
        if self.error:
            raise self.error
        return Words(f"weights of {wanted.id}")


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "SLOT_WAIT_SECONDS", PATIENCE_SECONDS)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch, _patience: None) -> None:
    monkeypatch.setattr(adapters, "SLOT_WAIT_SECONDS", 0.2)


def store(
    loads: Callable[[AdapterRef], Words], max_adapters: int = 2, *, slot_bytes: int = 99, memory_bytes: int = 0
) -> AdapterStore:
    return AdapterStore(loads, base=BASE, room=Room(max_adapters, slot_bytes, memory_bytes))


def test_any_number_of_callers_one_load() -> None:
    async def story() -> None:
        loads = Loads()
        loads.may_finish.clear()
        held = store(loads)
        waiting = [asyncio.create_task(held.acquire(ref("a"))) for _ in range(20)]
        await asyncio.sleep(0.01)
        waiting[0].cancel()  # the first to ask leaves: the others still get it
        loads.may_finish.set()
        leases = await asyncio.gather(*waiting[1:])

        assert loads.names == ["a"]
        assert {lease.weights for lease in leases} == {"weights of a"}
        assert held.evict(ref("a").digest) is False
        for lease in leases:
            held.release(lease)
            held.release(lease)
        assert held.evict(ref("a").digest) is True

    asyncio.run(story())


@pytest.mark.usefixtures("hurried")
def test_the_least_recently_used_free_adapter_makes_room() -> None:
    async def story() -> None:
        loads = Loads()
        held = store(loads)
        leases = {name: await held.acquire(ref(name)) for name in "ab"}
        with pytest.raises(Unavailable):
            await held.acquire(ref("c"))
        held.release(leases["a"])
        held.release(leases["b"])
        held.release(await held.acquire(ref("a")))
        await held.acquire(ref("c"))

        assert held.names == (ref("a").internal_name, ref("c").internal_name)

    asyncio.run(story())


def test_who_finds_every_slot_leased_waits_in_order_of_arrival() -> None:
    async def story() -> None:
        held, order = store(Loads(), max_adapters=1, memory_bytes=999), list[str]()
        lease = await held.acquire(ref("a"))
        for name in "bcde":
            await held.prefetch(ref(name))  # else they arrive as their loading ends, in any order

        async def ask(name: str) -> None:
            mine = await held.acquire(ref(name))
            order.append(name)
            await asyncio.sleep(0)
            held.release(mine)

        waiting = [asyncio.create_task(ask(name)) for name in "bcde"]
        await asyncio.sleep(0.05)
        waiting[1].cancel()  # one leaves: those behind it are still called
        held.release(lease)
        await asyncio.gather(*waiting, return_exceptions=True)

        assert order == ["b", "d", "e"]
        assert held.leases == 0

    asyncio.run(story())


@pytest.mark.usefixtures("hurried")
def test_nobody_is_called_in_vain_for_ever() -> None:
    async def story() -> None:
        held = store(Loads(), max_adapters=1)
        lease = await held.acquire(ref("a"))
        with pytest.raises(Unavailable) as refusal:
            await held.acquire(ref("b"))
        held.release(lease)

        assert refusal.value.code == "adapter_slots_busy"
        assert (await held.acquire(ref("b"))).weights == "weights of b"

    asyncio.run(story())


def test_an_evicted_adapter_comes_back_from_memory() -> None:
    async def story() -> None:
        loads = Loads()
        held = store(loads, max_adapters=1, memory_bytes=1)
        for name in "aba":
            held.release(await held.acquire(ref(name)))
        assert loads.names == ["a", "b"]
        held.release(await held.acquire(ref("c")))
        held.release(await held.acquire(ref("b")))  # "a" took its place in memory when it left for "c"

        assert loads.names == ["a", "b", "c", "b"]
        assert {name: tier.held for name, tier in held.tiers().items()} == {"slots": 1, "memory": 1}

    asyncio.run(story())


def test_slots_keep_within_their_bytes() -> None:
    async def story() -> None:
        sizes = {"a": 3, "b": 3, "c": 5, "d": 9}

        class Sized(Words):
            @property
            def size_bytes(self) -> int:
                return sizes[self]

        held = store(lambda wanted: Sized(wanted.id), max_adapters=9, slot_bytes=8)
        for name in "abc":
            held.release(await held.acquire(ref(name)))
        assert held.names == (ref("b").internal_name, ref("c").internal_name)
        with pytest.raises(BadRequest) as refusal:
            await held.acquire(ref("d"))

        assert refusal.value.code == "adapter_refused"
        assert held.names == (ref("b").internal_name, ref("c").internal_name)

    asyncio.run(story())


def test_a_pinned_adapter_stays_and_one_slot_is_never_pinned() -> None:
    async def story() -> None:
        held = store(Loads(), max_adapters=2)
        held.release(await held.acquire(ref("a"), pin=True))
        with pytest.raises(Unavailable) as refusal:
            await held.acquire(ref("b"), pin=True)
        for name in "bc":
            held.release(await held.acquire(ref(name)))

        assert refusal.value.code == "adapter_pins_busy"
        assert held.names == (ref("a").internal_name, ref("c").internal_name)
        assert held.evict(ref("a").digest) is True

    asyncio.run(story())


def test_a_prefetch_puts_nobody_out() -> None:
    async def story() -> None:
        loads = Loads()
        held = store(loads, max_adapters=1, memory_bytes=9)
        await held.prefetch(ref("a"))
        await held.prefetch(ref("b"))
        assert held.names == (ref("a").internal_name,)
        held.release(await held.acquire(ref("b")))

        assert loads.names == ["a", "b"]

    asyncio.run(story())


def test_a_load_that_everyone_left_is_not_lost() -> None:
    async def story() -> None:
        loads = Loads()
        loads.may_finish.clear()
        held = store(loads, memory_bytes=9)
        impatient = asyncio.create_task(held.acquire(ref("a")))
        await asyncio.sleep(0.01)
        impatient.cancel()
        await asyncio.gather(impatient, return_exceptions=True)
        loads.may_finish.set()
        await asyncio.sleep(0.05)
        await held.acquire(ref("a"))

        assert loads.names == ["a"]

    asyncio.run(story())


@pytest.mark.parametrize("slots", [64, 16])
def test_a_thousand_adapters_of_which_many_are_asked_for_at_once(slots: int) -> None:
    async def story() -> None:
        chance, wrong, most = random.Random(slots), list[str](), 0
        held = store(lambda wanted: Words(wanted.id), max_adapters=slots, slot_bytes=slots, memory_bytes=100)

        async def ask(number: int) -> None:
            nonlocal most
            name = f"adapter-{number}"
            lease = await held.acquire(ref(name))
            most = max(most, len(held.names))
            await asyncio.sleep(0.0005 * chance.random())
            wrong.extend([name] if lease.weights != name else [])
            held.release(lease)

        for _ in range(40):
            await asyncio.gather(*(ask(min(int(chance.paretovariate(0.4)), 1000)) for _ in range(64)))

        tiers = held.tiers()
        assert not wrong
        assert most <= slots
        assert tiers["memory"].size_bytes <= 100
        assert tiers["memory"].hits
        assert held.leases == 0

    asyncio.run(story())


def test_a_missing_adapter_is_not_looked_for_again_at_once() -> None:
    async def story() -> None:
        loads = Loads()
        loads.error = NotFound("gone", code="model_not_found")
        held = store(loads)
        for _ in range(5):
            with pytest.raises(NotFound):
                await held.acquire(ref("a"))

        assert loads.names == ["a"]
        assert held.names == ()

    asyncio.run(story())


def test_storage_that_does_not_answer_is_asked_again() -> None:
    async def story() -> None:
        loads = Loads()
        loads.error = Unavailable("away")
        held = store(loads)
        with pytest.raises(Unavailable):
            await held.acquire(ref("a"))
        loads.error = None

        assert (await held.acquire(ref("a"))).weights == "weights of a"

    asyncio.run(story())


@pytest.fixture
def disk(storage: Storage, tmp_path: Path) -> AdapterDisk:
    return AdapterDisk(storage, tmp_path, max_bytes=2**30)


def tampered(storage: Storage, of: AdapterRef, name: str, *, prefix: str) -> AdapterRef:
    """A copy under another prefix in which one byte of one file differs."""
    for key in list(storage.list_keys(of.prefix + "/")):
        body = storage.get(key)
        changed = body[:-2] + bytes([body[-2] ^ 1]) + body[-1:] if key.endswith(name) else body
        storage.put(f"{prefix}/{key.rpartition('/')[2]}", changed)
    return of.model_copy(update={"prefix": prefix})


@pytest.mark.parametrize("name", ["manifest.json", "adapter_model.safetensors", "adapter_config.json"])
def test_a_tampered_file_is_refused(disk: AdapterDisk, storage: Storage, published: Published, name: str) -> None:
    with pytest.raises(BadRequest, match=name) as refusal:
        disk.open(tampered(storage, published["first"], name, prefix=f"tampered/{name}"))
    assert refusal.value.code == "adapter_refused"


def test_nothing_half_fetched_stays_on_disk(disk: AdapterDisk, storage: Storage, published: Published, tmp_path: Path) -> None:
    with pytest.raises(BadRequest):
        disk.open(tampered(storage, published["first"], "adapter_model.safetensors", prefix="tampered/half"))

    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_the_adapter_loads_when_there_is_room(
    storage: Storage, published: Published, tmp_path: Path
) -> None:
    with small_disk.mounted(tmp_path / "disk", mib=1) as folder:
        disk = AdapterDisk(storage, folder / "adapters", max_bytes=2**30)
        small_disk.fill(folder)
        with pytest.raises(Unavailable) as full:
            disk.open(published["first"])
        assert full.value.code == "insufficient_storage"

        small_disk.clear(folder)
        assert disk.open(published["first"]).is_dir()


def test_a_file_damaged_on_disk_is_fetched_again(disk: AdapterDisk, published: Published) -> None:
    weights = disk.open(published["first"]) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"\0")

    assert (disk.open(published["first"]) / "adapter_model.safetensors").read_bytes() == whole


def test_an_adapter_on_disk_needs_no_storage(disk: AdapterDisk, published: Published) -> None:
    first = disk.open(published["first"])

    assert disk.open(published["first"].model_copy(update={"prefix": "gone"})) == first


def test_the_disk_keeps_within_its_bytes(storage: Storage, published: Published, tmp_path: Path) -> None:
    refs = list(published.values())
    sizes = [
        sum(file.stat().st_size for file in AdapterDisk(storage, tmp_path / "all", max_bytes=2**30).open(one).iterdir())
        for one in refs
    ]
    small = AdapterDisk(storage, tmp_path / "small", max_bytes=max(sizes) + min(sizes) - 1)
    for one in refs:
        small.open(one)

    assert [path.name for path in (tmp_path / "small").iterdir()] == [refs[-1].digest]


@pytest.mark.parametrize("digest", ["../escape", "0" * 63, ""])
def test_a_digest_that_is_none_names_no_directory(disk: AdapterDisk, published: Published, digest: str) -> None:
    with pytest.raises(NotFound):
        disk.open(published["first"].model_copy(update={"digest": digest}))
