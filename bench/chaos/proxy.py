"""TCP proxies that lie as networks do: late, slowly, not at all, or with a reset."""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum

CHUNK_BYTES = 64 * 1024
LATE_SECONDS = 0.1
SLOW_BYTES_PER_SECOND = 256 * 1024


class Weather(StrEnum):
    CLEAR = "clear"
    LATE = "latency"
    SLOW = "slow link"
    BLACK_HOLE = "black hole"


class Proxy:
    """Listens on `port` of this machine, and leads to where `target` says at each connection."""

    def __init__(self, target: Callable[[], int]) -> None:
        self._target = target
        self.weather = Weather.CLEAR
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open = set[asyncio.StreamWriter]()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with await asyncio.start_server(self._connected, sock=self._listener) as server:
            await server.serve_forever()

    def clear(self) -> None:
        self.weather = Weather.CLEAR

    def reset(self) -> None:
        """Break off every connection with a RST."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._reset)

    def _reset(self) -> None:
        for writer in list(self._open):
            with suppress(OSError):
                linger = struct.pack("ii", 1, 0)  # close without a word
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target())
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, there_writer}
        self._open |= ends
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._forward(reader, there_writer))
                both.create_task(self._forward(there_reader, writer))
        except* OSError:
            pass
        finally:
            self._open -= ends
            for end in ends:
                end.transport.abort()

    async def _forward(self, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        while chunk := await source.read(CHUNK_BYTES):
            await self._held_up(len(chunk))
            to.write(chunk)
            await to.drain()
        if to.can_write_eof():
            to.write_eof()

    async def _held_up(self, size: int) -> None:
        while self.weather is Weather.BLACK_HOLE:
            await asyncio.sleep(0.05)
        if self.weather is Weather.LATE:
            await asyncio.sleep(LATE_SECONDS)
        elif self.weather is Weather.SLOW:
            await asyncio.sleep(size / SLOW_BYTES_PER_SECOND)


@contextmanager
def serving(*proxies: Proxy) -> Iterator[None]:
    """All of them, in one thread."""
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        await asyncio.gather(*(proxy.serve() for proxy in proxies))

    task = loop.create_task(serve())
    thread = threading.Thread(target=_until_cancelled, args=(loop, task), name="proxies", daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


def _until_cancelled(loop: asyncio.AbstractEventLoop, task: "asyncio.Task[None]") -> None:
    with suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.run_until_complete(_end_connections())
    loop.close()


async def _end_connections() -> None:
    connections = asyncio.all_tasks() - {asyncio.current_task()}
    for connection in connections:
        connection.cancel()
    await asyncio.gather(*connections, return_exceptions=True)
    await asyncio.sleep(0)  # what was aborted is closed in the next round
