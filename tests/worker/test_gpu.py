"""Which card a process may use: what CUDA would make of the environment, and one card at most."""

import pytest

from tests.worker.make import Board, Machine
from worker import gpu
from worker.gpu import CardRefused

FIRST, SECOND = Board(), Board(uuid="GPU-bbbb-0002")
SLICE = Board(name="NVIDIA A100 MIG 3g.40gb", uuid="MIG-cccc-0003", mib=40_448)
SPLIT = Board(name="NVIDIA A100", uuid="GPU-cccc-0003", mib=81_251, is_split=True)
TWO = Machine(FIRST, SECOND)


def uuids(machine: Machine, **environment: str) -> list[str]:
    return [card.uuid for card in gpu.visible_cards(machine, environment)]


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        ("0", [FIRST]),
        ("1", [SECOND]),
        ("1,0", [SECOND, FIRST]),
        (" 1 ", [SECOND]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [FIRST]),  # behind a name that is none, CUDA sees nothing
        ("0,7,1", [FIRST]),
        ("GPU-bbbb-0002", [SECOND]),
        ("GPU-bb", [SECOND]),
        ("GPU-", []),  # begins more than one
        ("GPU-dddd", []),
        ("NoDevFiles", []),
    ],
)
def test_the_environment_names_cards_as_cuda_reads_it(named: str, seen: list[Board]) -> None:
    assert uuids(TWO, CUDA_VISIBLE_DEVICES=named) == [board.uuid for board in seen]


def test_without_the_variable_every_card_is_seen() -> None:
    assert uuids(TWO) == [FIRST.uuid, SECOND.uuid]
    assert gpu.visible_cards(Machine(FIRST), {})[0] == gpu.Card(FIRST.name, FIRST.uuid, 24_564 * 2**20, "580.65.06")


def test_a_machine_without_a_driver_or_a_card_has_none() -> None:
    assert uuids(Machine(FIRST, has_driver=False)) == uuids(Machine()) == []


def test_a_mig_instance_is_a_card_and_a_split_card_is_none() -> None:
    machine = Machine(SPLIT, instances=(SLICE,))

    assert uuids(machine, CUDA_VISIBLE_DEVICES=SLICE.uuid) == [SLICE.uuid]
    assert uuids(machine, CUDA_VISIBLE_DEVICES="MIG-gone") == []
    with pytest.raises(CardRefused, match="is split into MIG instances"):
        uuids(machine)


def test_an_index_that_cuda_would_count_differently_is_refused() -> None:
    by_speed = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}

    with pytest.raises(CardRefused, match="set CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        uuids(TWO, CUDA_VISIBLE_DEVICES="0", **by_speed)
    assert uuids(TWO, CUDA_VISIBLE_DEVICES=SECOND.uuid, **by_speed) == [SECOND.uuid]
    assert uuids(Machine(FIRST), CUDA_VISIBLE_DEVICES="0", **by_speed) == [FIRST.uuid]


def test_two_cards_are_refused() -> None:
    with pytest.raises(CardRefused, match="sees 2 GPUs; a worker is pinned to one: start one worker per card") as refused:
        gpu.require_one(gpu.visible_cards(TWO, {}))
    assert FIRST.uuid in str(refused.value) and SECOND.uuid in str(refused.value)


def test_children_get_the_card_by_its_uuid_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "library", lambda: TWO)
    environment = {"CUDA_VISIBLE_DEVICES": "1"}
    card = gpu.pin(environment)

    assert card is not None and card.uuid == SECOND.uuid
    assert environment == {"CUDA_VISIBLE_DEVICES": SECOND.uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_without_a_card_the_environment_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "library", lambda: Machine(has_driver=False))
    environment = {"CUDA_VISIBLE_DEVICES": "1"}

    assert gpu.pin(environment) is None
    assert environment == {"CUDA_VISIBLE_DEVICES": "1"}
