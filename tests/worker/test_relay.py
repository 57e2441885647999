"""What the relay does in a moment that no test of the whole process can choose."""

import asyncio

import pytest

from worker.relay import woken_or_late


@pytest.mark.parametrize("turns", range(4))
def test_a_stop_that_comes_with_a_notification_is_heard(turns: int) -> None:
    """The event first, the stop some turns of the loop later: in one of them the waiter has been woken and has not run yet."""

    async def wake_and_stop() -> None:
        waker = asyncio.Event()

        async def repeat() -> None:
            while True:
                waker.clear()
                await woken_or_late(waker, 60)

        waiting = asyncio.create_task(repeat())
        await asyncio.sleep(0.01)
        waker.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting}, timeout=1)
        assert waiting.cancelled()

    asyncio.run(wake_and_stop())


def test_a_wait_ends_by_itself() -> None:
    asyncio.run(woken_or_late(asyncio.Event(), 0.01))
