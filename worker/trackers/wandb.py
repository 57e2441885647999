"""Weights & Biases by its own library, in a process that is over within a minute: what hangs in it or leaks ends with it.

A run is resumed by the job's id, and the library drops every step that the server has: what is said again is not there twice.
"""

import asyncio
import json
import os
import sys
from typing import Final

from app.jobs.tracking import Due, Run
from worker.services import Services
from worker.trackers.failure import TrackerFailed

TIMEOUT_SECONDS = 60.0  # after which the process ends itself: see wandb_process
MARGIN_SECONDS = 5.0
_PASSED: Final = (
    *("PATH", "HOME", "TMPDIR", "LANG", "PYTHONPATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
)

_QUIET: Final = {"WANDB_ERROR_REPORTING": "false", "OTEL_SDK_DISABLED": "true"}  # it would tell its makers of itself


async def tell(due: Due, to: Services) -> Run:
    """Raises TrackerFailed."""
    settings = to.settings.wandb
    words = {
        "base_url": settings.base_url,
        "run": {
            "id": due.job_id,
            "project": due.asked["project"],
            "entity": due.asked.get("entity"),
            "name": due.asked.get("name") or due.job_id,
            "tags": due.asked.get("tags"),
            "config": due.config,
        },
        "points": [{"step": point.step, "at": point.at.timestamp(), "metrics": point.metrics} for point in due.points],
        "ending": due.ending and {"summary": due.ending.summary, "error": due.ending.error, "state": due.ending.state},
    }
    return _understood(*await _said(json.dumps(words).encode(), api_key=settings.api_key.get_secret_value()))


async def _said(words: bytes, *, api_key: str) -> tuple[bytes, bytes]:
    """What the process answers and what it complains of. It sees none of our settings."""
    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "worker.trackers.wandb_process",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**passed, **_QUIET, "WANDB_API_KEY": api_key, "TUNESMITH_SECONDS": str(int(TIMEOUT_SECONDS))},
    )
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS + MARGIN_SECONDS):
            return await process.communicate(words)
    except TimeoutError:
        return b"", b"it hung"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _understood(answer: bytes, complaint: bytes) -> Run:
    told = json.loads(answer.splitlines()[-1]) if answer.strip() else {}
    if "run_id" in told:
        return Run(told["run_id"], told["url"])
    detail = str(told.get("detail") or complaint.decode(errors="replace")[-500:])
    raise TrackerFailed(str(told.get("reason", "it does not answer")), detail=detail)
