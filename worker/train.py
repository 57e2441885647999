"""The train worker. `python -m worker.train` finds the card it is pinned to and serves the queues that the card has room for."""

import os
import subprocess
import sys

import structlog

from app.core import logging, tiers
from app.core.settings import Settings
from worker import gpu
from worker.gpu import Card, CardRefused

log = structlog.get_logger()

# threads: worker_shutting_down fires in the main process only. Nobody else is there to gossip with
_OPTIONS = ("--pool", "threads", "-c", "1", "--without-gossip", "--without-mingle", "--without-heartbeat")


def main() -> int:
    settings = Settings()
    logging.configure("worker", format=settings.log_format, level=settings.log_level)
    try:
        card = gpu.pin(os.environ)
        if card and not _torch_can_use_it():
            log.warning("gpu_unusable", card=card.name, driver=card.driver)
            card = None
        queues = queues_of(card, settings)
    except CardRefused as error:
        log.error("train_worker_refused", reason=str(error))
        return 1
    log.info("train_worker_starting", card=card and card.name, uuid=card and card.uuid, queues=queues)
    from worker.celery import celery  # reads the settings as it is imported; by now it is certain that they are needed

    celery.start(list(celery_arguments("train", *queues)))
    return 0


def _torch_can_use_it() -> bool:
    """Asked in a process that ends: the worker itself does without torch, and without CUDA's memory."""
    asked = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", asked], check=False).returncode == 0


def celery_arguments(name: str, *queues: str) -> tuple[str, ...]:
    """What the `celery` command is told to run one of our workers on these queues."""
    return ("--quiet", "worker", "-Q", ",".join(queues), "-n", f"{name}@%h", *_OPTIONS)


def queues_of(card: Card | None, settings: Settings) -> tuple[str, ...]:
    """Those of the largest tier the worker holds and of every smaller one, so that a large card takes small jobs too.

    Raises CardRefused for a card without room for any.
    """
    stated, serves_cpu = settings.training.tier, tiers.CPU in settings.training.tiers
    if stated != "auto":
        held = tiers.up_to(stated)
    elif card is not None:
        held = tiers.of_card(card.total_bytes, settings.gpu)
    elif serves_cpu:
        held = (tiers.CPU,)
    else:  # else jobs would wait for ever for a worker that looks well
        raise CardRefused("no GPU can be used here, and TUNESMITH_TRAINING__TIERS has no cpu tier; `tunesmith doctor` says why")
    if serves_cpu and tiers.CPU not in held:
        held += (tiers.CPU,)
    if not held and card:
        mib = tiers.trainer_bytes(card.total_bytes, settings.gpu) // 2**20
        raise CardRefused(f"{card.name} has {mib} MiB for training, too little for any tier; docs/gpu.md says what to change")
    return tuple(f"train.{tier}" for tier in held)


if __name__ == "__main__":
    sys.exit(main())
