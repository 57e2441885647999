"""One engine process. `python -m worker.inference.server` reads the settings, loads the base and serves until told to leave."""

import asyncio
import os
import signal
import socket
from pathlib import Path
from types import FrameType

import structlog
import uvicorn

from app.core import catalog, logging, tracing
from app.core.settings import Settings
from app.core.spec import QUANTIZATIONS
from app.core.storage import open_storage
from worker import gpu
from worker.inference import native, threads
from worker.inference.announce import advertised_url, announce
from worker.inference.driver import EngineDriver
from worker.inference.metrics import EngineMetrics
from worker.inference.routes import create_app
from worker.model import base as bases
from worker.model import card

log = structlog.get_logger()

LAST_BYTES_SECONDS = 10  # what a slow reader gets after the engine has nothing left to do


class DrainingServer(uvicorn.Server):
    """The first signal drains: the gateway is told, new requests get 503, running ones finish. The second one leaves at once."""

    def __init__(self, config: uvicorn.Config, driver: EngineDriver) -> None:
        super().__init__(config)
        self._driver = driver
        self._draining: asyncio.Task[None] | None = None
        self.announcing: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._start_draining, signal.Signals(sig).name)

    def _start_draining(self, reason: str) -> None:
        if not self._draining:
            self._draining = asyncio.create_task(self._drain(reason))

    async def _drain(self, reason: str) -> None:
        log.info("engine_draining", signal=reason)
        await asyncio.gather(self._driver.drain(), self._take_leave())
        self.should_exit = True

    async def _take_leave(self) -> None:
        if self.announcing:
            self.announcing.cancel()
            await asyncio.wait([self.announcing])


async def serve(settings: Settings, base: bases.LoadedBase, card_dir: Path) -> None:
    """Answer until told to leave."""
    storage = open_storage(settings.storage)
    token = settings.engine_token.get_secret_value()
    metrics = EngineMetrics()
    driver = native.open_driver(base, storage, cache_dir=settings.cache_dir, settings=settings.inference, metrics=metrics)
    try:
        app = create_app(driver, token=token, metrics=metrics, metrics_token=settings.metrics.token.get_secret_value())
        listener = _listen(settings.inference.host, settings.inference.port)
        url = advertised_url(settings.inference.host, listener.getsockname()[1], settings.inference.gateway_url)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=LAST_BYTES_SECONDS
        )
        server = DrainingServer(config, driver)
        beats = announce(driver, storage, card_dir=card_dir, url=url, token=token, settings=settings.inference)
        server.announcing = asyncio.create_task(beats)
        held = base.quantization.name
        log.info("engine_listening", url=url, base=base.entry.id, quantization=held, base_digest=base.entry.digest)
        await server.serve(sockets=[listener])
    finally:
        driver.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(128)  # before the first heartbeat: whoever hears it may call
    return listener


def main() -> None:
    settings = Settings()
    logging.configure("engine", format=settings.log_format, level=settings.log_level)
    tracing.configure("engine", settings.tracing)
    try:
        gpu.pin(os.environ)
    except gpu.CardRefused as error:
        raise SystemExit(str(error)) from error
    gpu.limit_engine(settings.gpu)
    wanted = catalog.load(settings.catalog_file).resolve(settings.inference.base)
    threads.share()
    quantization = QUANTIZATIONS[settings.inference.quantization]
    base = bases.load(wanted, settings.cache_dir, quantization=quantization, dtype=bases.fastest_dtype(), for_training=False)
    asyncio.run(serve(settings, base, card.prepared(wanted, settings.cache_dir)))


if __name__ == "__main__":
    main()
