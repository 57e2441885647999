"""An engine makes itself known: the base's card in storage once, then a heartbeat to the gateway every few seconds."""

import asyncio
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import httpx
import structlog

from app.core import ids
from app.core.engine import Heartbeat
from app.core.settings import InferenceSettings
from app.core.storage import Storage
from worker.inference.driver import EngineDriver
from worker.model import card

log = structlog.get_logger()

TIMEOUT_SECONDS = 5.0


async def announce(
    driver: EngineDriver, storage: Storage, *, card_dir: Path, url: str, token: str, settings: InferenceSettings
) -> None:
    """Publish, then beat until cancelled, and say goodbye. Nothing that fails here stops the engine: it is tried again with the
    next beat."""
    engine_id = ids.new("engine_")
    failing = _Once()
    is_published = False
    async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS, headers={"Authorization": f"Bearer {token}"}) as client:

        async def beat(*, is_leaving: bool = False) -> None:
            said = _beat(driver, engine_id, url, is_leaving=is_leaving).model_dump(mode="json")
            answer = await client.post(f"{settings.gateway_url}/internal/engines", json=said)
            answer.raise_for_status()

        try:
            while True:
                try:
                    if not is_published:
                        await asyncio.to_thread(card.publish, storage, driver.caps.base.id, card_dir)
                        is_published = True
                    await beat()
                    failing.clear()
                except Exception as error:  # a full disk, a damaged card: an engine that falls silent is no longer asked
                    failing.warn("heartbeat_failed", reason=str(error) or type(error).__name__, gateway=settings.gateway_url)
                await asyncio.sleep(settings.heartbeat_seconds)
        finally:
            if is_published:
                with suppress(httpx.HTTPError):  # a gateway that is away hears it from the silence
                    await beat(is_leaving=True)


def advertised_url(host: str, port: int, gateway_url: str) -> str:
    """Where the gateway finds us. Bound to every address, we name the one that the way to the gateway starts from."""
    if host in ("0.0.0.0", "::", ""):
        host = _address_towards(urlsplit(gateway_url))
    return f"http://{host}:{port}"


def _address_towards(gateway: SplitResult) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((gateway.hostname, gateway.port or 80))  # sends nothing: only asks the routing table
        except OSError:  # its name is not known yet
            return socket.gethostname()
        return str(probe.getsockname()[0])


def _beat(driver: EngineDriver, engine_id: str, url: str, *, is_leaving: bool) -> Heartbeat:
    stats = driver.stats()
    return Heartbeat(
        engine_id=engine_id,
        url=url,
        base=stats.base,
        base_digest=stats.base_digest,
        quantization=driver.caps.quantization,
        running=stats.running,
        waiting=stats.waiting,
        adapters={name: tier.held for name, tier in stats.tiers.items()},
        is_leaving=is_leaving,
    )


class _Once:
    """Logs the first failure of a row, and that it is over."""

    def __init__(self) -> None:
        self._is_failing = False

    def warn(self, event: str, **fields: str) -> None:
        if not self._is_failing:
            log.warning(event, **fields)
        self._is_failing = True

    def clear(self) -> None:
        if self._is_failing:
            log.info("heartbeat_restored")
        self._is_failing = False
