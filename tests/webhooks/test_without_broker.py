"""Valkey is a doorbell and no more: without it the API takes jobs and the relay delivers webhooks."""

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from openai import OpenAI

from app.core.settings import Settings
from tests import make
from tests.embedded.patience import eventually
from tests.webhooks.receiver import Receiver
from tests.webhooks.steps import relay_process


@contextmanager
def closed() -> Iterator[int]:
    yield make.free_port()


@contextmanager
def silent() -> Iterator[int]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("broker", [closed, silent])
def test_a_webhook_is_delivered_while_the_broker_is_away(
    settings: Settings, client: OpenAI, receiver: Receiver, broker: Callable[[], AbstractContextManager[int]]
) -> None:
    client.webhooks.create(name="a", url=receiver.url, event_types=["fine_tuning.job.cancelled"])
    with broker() as port:
        away = settings.model_copy(update={"broker_url": f"redis://127.0.0.1:{port}/0"})
        with relay_process(away):
            file = client.files.create(file=("a.jsonl", make.chat_file()), purpose="fine-tune")
            job = client.fine_tuning.jobs.create(model=make.TINY, training_file=file.id)
            client.fine_tuning.jobs.cancel(job.id)
            eventually(lambda: any(job.id.encode() in message.body for message in receiver.received))
