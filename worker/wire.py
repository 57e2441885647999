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
FEWEST_TOKENS = 128


class TrainerJob(BaseModel):
    """One run. Checkpoints go to, and are resumed from, `checkpoints_dir`; the adapter is written to `output_dir`.

    The run deletes old checkpoints. Those that the trainer names in `Checkpointed` lie in `handover_dir`: the supervisor's own.
    `start` is the adapter that it continues.

    `micro_batch_tokens` is how many tokens are in memory at once: the spec's, or fewer where those did not fit. With
    `is_checkpointing` layers are computed again in the backward, whether or not the trainer's card seems to have room.
    """

    model_config = ConfigDict(frozen=True)

    spec: TrainSpec
    base: Base
    dataset: Path
    validation: Path | None = None
    start: Path | None = None
    output_dir: Path
    checkpoints_dir: Path
    handover_dir: Path
    micro_batch_tokens: int
    is_checkpointing: bool = False

    def smaller(self) -> "TrainerJob | None":
        """The same steps with half the tokens at once, layers computed again; None where that would not help."""
        half = self.micro_batch_tokens // 2
        changes = {"micro_batch_tokens": half, "is_checkpointing": True}
        return self.model_copy(update=changes) if half >= FEWEST_TOKENS else None
