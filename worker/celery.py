"""The Celery app. The broker owns nothing: a message is the name of a queue to look at, and rows are the work."""

from celery import Celery
from celery.signals import setup_logging

from app.core import logging
from app.core.settings import Settings
from worker import broker


def make_celery(settings: Settings) -> Celery:
    """Each setting closes a trap that was measured; docs/decisions/0001 tells them."""
    broker.watch()
    tasks = ["worker.tasks.cpu", "worker.tasks.train", "worker.tasks.vitals"]
    app = Celery("tunesmith", broker=settings.broker_url, include=tasks)
    app.conf.update(
        task_ignore_result=True,
        task_acks_late=False,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue="cpu",
        task_create_missing_queues=True,
        worker_concurrency=1,
        worker_disable_prefetch=True,
        worker_enable_remote_control=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "socket_timeout": 5,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
        },
        timezone="UTC",
    )
    return app


@setup_logging.connect  # Celery configures the root logger unless somebody answers this signal
def keep_our_logging(**_: object) -> None:
    settings = Settings()
    logging.configure("worker", format=settings.log_format, level=settings.log_level)


celery = make_celery(Settings())
