"""The train worker's start: the queues that follow from its card, and a refusal where it cannot be pinned to one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.settings import GpuSettings, Settings, TrainingSettings
from tests.embedded.patience import PATIENCE_SECONDS
from worker.gpu import Card, CardRefused
from worker.train import queues_of

ROOT = Path(__file__).parents[2]
NO_BROKER = {"TUNESMITH_BROKER_URL": "redis://127.0.0.1:1/0", "CUDA_VISIBLE_DEVICES": "0,1"}
L40S = "Board('NVIDIA L40S', 'GPU-aaaa-0001', 46_068)"


def card(mib: int) -> Card:
    return Card("a card", "GPU-aaaa", mib * 2**20, "580")


def settings(*, has_engine: bool = False, **training: object) -> Settings:
    asked = TrainingSettings.model_validate({"tiers": ["16", "24", "40", "48"], **training})
    return Settings(training=asked, gpu=GpuSettings(has_engine=has_engine))


def queues(*tiers: str) -> tuple[str, ...]:
    return tuple(f"train.{tier}" for tier in tiers)


def test_a_worker_serves_its_tier_and_the_smaller_ones() -> None:
    assert queues_of(card(24_564), settings()) == queues("24", "16")
    assert queues_of(card(46_068), settings()) == queues("48", "40", "24", "16")
    assert queues_of(card(24_564), settings(has_engine=True)) == queues("16")
    assert queues_of(None, settings(tiers=["cpu"])) == queues("cpu")


def test_a_card_also_takes_what_needs_none_where_the_installation_does_such_work() -> None:
    assert queues_of(card(16_376), settings(tiers=["cpu", "16"])) == queues("16", "cpu")
    assert queues_of(card(12_288), settings(tiers=["cpu"])) == queues("cpu")


def test_a_worker_that_nobody_would_ring_is_refused() -> None:
    with pytest.raises(CardRefused, match="no GPU can be used here"):
        queues_of(None, settings())


def test_a_stated_tier_does_not_take_the_small_jobs_away() -> None:
    assert queues_of(card(24_564), settings(tier="24", tiers=["cpu", "24"])) == queues("24", "16", "cpu")


def test_a_card_without_room_is_refused() -> None:
    with pytest.raises(CardRefused, match="a card has 8426 MiB for training, too little for any tier"):
        queues_of(card(13_500), settings(has_engine=True))


@pytest.mark.parametrize(("stated", "held"), [("24", ("24", "16")), ("cpu", ("cpu",)), ("48", ("48", "40", "24", "16"))])
def test_a_stated_tier_goes_before_the_card(stated: str, held: tuple[str, ...]) -> None:
    assert queues_of(card(81_559), settings(tier=stated)) == queues_of(None, settings(tier=stated)) == queues(*held)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    """Starts train workers on a machine with these boards."""
    started = list[subprocess.Popen[str]]()

    def begin(*boards: str, with_cuda: bool = True, **environment: str) -> subprocess.Popen[str]:
        module = f"""
import sys
from tests.worker.make import *
sys.modules[__name__] = Machine({", ".join(boards)})
"""
        (tmp_path / "pynvml.py").write_text(module)
        if with_cuda:  # else torch is what is installed: a build for CPUs
            (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
        path = os.pathsep.join((str(tmp_path), str(ROOT)))
        given = os.environ | NO_BROKER | {"PYTHONPATH": path} | environment
        command = [sys.executable, "-m", "worker.train"]
        started.append(subprocess.Popen(command, env=given, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for worker in started:
        worker.kill()
        worker.communicate()


def test_two_cards_end_the_worker_with_a_reason(start) -> None:
    worker = start(L40S, "Board(uuid='GPU-bbbb-0002')")
    said = worker.communicate(timeout=PATIENCE_SECONDS)[1]

    assert worker.returncode == 1
    (line,) = said.splitlines()
    assert json.loads(line)["reason"].startswith("this worker sees 2 GPUs; a worker is pinned to one")


def test_a_worker_says_what_it_serves(start) -> None:
    worker = start(L40S, TUNESMITH_GPU__HAS_ENGINE="false", TUNESMITH_TRAINING__TIERS='["48"]')
    lines = iter(worker.stderr)
    said = json.loads(next(lines))

    assert said["event"] == "train_worker_starting"
    assert (said["card"], said["uuid"]) == ("NVIDIA L40S", "GPU-aaaa-0001")
    assert said["queues"] == ["train.48", "train.40", "train.24", "train.16"]


def test_a_card_that_torch_cannot_use_is_no_card(start) -> None:
    worker = start(L40S, with_cuda=False, CUDA_VISIBLE_DEVICES="0", TUNESMITH_TRAINING__TIERS='["48"]')
    unusable, refused = map(json.loads, worker.communicate(timeout=PATIENCE_SECONDS)[1].splitlines())

    assert worker.returncode == 1
    assert (unusable["event"], unusable["card"]) == ("gpu_unusable", "NVIDIA L40S")
    assert "no GPU can be used here" in refused["reason"]


def test_a_worker_without_a_card_looks_for_its_broker(start) -> None:
    worker = start(with_cuda=False)
    assert any("127.0.0.1:1/0" in line for line in worker.stderr)
