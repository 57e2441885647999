"""Places between two side effects where a test lets a process die, as power cuts and kernels do: with no word and no tidying up.

`CRASH_AT` is the name of a point: whoever comes there dies. Or it is a folder, in which a file of a point's name lets one process
die there and goes with it. Unset, as it is in production, a point does nothing. tests/chaos/test_chaos.py hits each.
"""

import os
import signal
from pathlib import Path

POINTS = {
    "upload_stored": "the bytes of a file are in storage, its row is not written",
    "part_stored": "a part of an upload is in storage, its row is not written",
    "upload_assembled": "the parts are one object, which no row knows",
    "post_uncommitted": "a request has written its rows, and not committed them",
    "post_committed": "a request is committed, its answer not sent",
    "usage_unrecorded": "a chat is answered but for its last words, what it took is not written down",
    "usage_recorded": "what a chat took is written down, its last words are not sent",
    "file_examined": "a file is read, the verdict not committed",
    "verdict_committed": "a file has its verdict, the jobs that wait for it are not looked at",
    "dataset_stored": "a job's tokens are in storage, the job is not queued",
    "job_prepared": "a job is queued, nobody is rung",
    "job_claimed": "a worker has the lease, and has done nothing",
    "data_fetched": "a worker has the data, no trainer has the job",
    "beat_committed": "a heartbeat is committed, the worker does not know it",
    "checkpoint_received": "the trainer has written a checkpoint, none of it is in storage",
    "checkpoint_half_uploaded": "the adapter of a checkpoint is in storage, the state that a resume needs is not",
    "checkpoint_uploaded": "a checkpoint is in storage, and not known",
    "checkpoint_committed": "a checkpoint is known, the worker has not gone on",
    "adapter_uploaded": "the final adapter is in storage, the job has not succeeded",
    "results_stored": "the result files are in storage, the job has not succeeded",
    "job_completed": "the job has succeeded, its worker does not know it",
    "attempt_released": "a broken attempt is given back, its worker does not know it",
    "outbox_taken": "the relay has taken messages, and acted on none",
    "ring_sent": "a queue is rung, the message not settled",
    "purge_half_done": "some of what is to be deleted is gone",
    "outbox_acted": "the relay has acted on a message, and not settled it",
    "webhook_claimed": "a delivery is claimed, and not sent",
    "webhook_sent": "the receiver has taken a delivery, which is not settled",
    "jobs_reaped": "jobs are taken from silent workers, nobody is rung",
}


def point(name: str) -> None:
    """Die here if it is asked for."""
    assert name in POINTS, name
    if (asked := os.environ.get("CRASH_AT")) and (asked == name or _is_armed(Path(asked) / name)):
        os.kill(os.getpid(), signal.SIGKILL)


def _is_armed(file: Path) -> bool:
    """Once: of two that come here together one dies."""
    try:
        file.unlink()
    except OSError:
        return False
    return True
