"""What the supervisor and its trainer process say to each other: one line of JSON each.

The supervisor writes one `TrainerJob` to the trainer's stdin, and later perhaps `STOP`; closing the pipe means
"your supervisor is gone". The trainer writes `READY` once it is warm, then the engine's events.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from app.core.catalog import Base
from app.core.spec import TrainSpec

READY = b'{"kind":"ready"}\n'
STOP = b"stop\n"


class TrainerJob(BaseModel):
    """One run. Checkpoints go to, and are resumed from, `checkpoints_dir`; the adapter is written to `output_dir`."""

    model_config = ConfigDict(frozen=True)

    spec: TrainSpec
    base: Base
    dataset: Path
    validation: Path | None = None
    output_dir: Path
    checkpoints_dir: Path
