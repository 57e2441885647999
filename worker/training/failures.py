"""How a run can fail, and what of it its owner is told."""

from typing import ClassVar

import torch

from app.core.events import DISK_FULL, INTERNAL_ERROR, OUT_OF_MEMORY, Failed
from worker.model import directory
from worker.model.base import BaseRefused


class TrainingFailed(Exception):
    """The same data and settings would fail again anywhere; the message is for their owner."""

    code: ClassVar[str]


class Diverged(TrainingFailed):
    code = "diverged"


class NothingToTrain(TrainingFailed):
    code = "nothing_to_train"


class WrongRows(TrainingFailed):
    code = "format_not_trained"


class StartRefused(TrainingFailed):
    code = "continue_from_unusable"


class BaseUnsupported(TrainingFailed):
    code = "base_unsupported"


class OptimizerUnsupported(TrainingFailed):
    code = "optimizer_unsupported"


def failed(error: BaseException) -> Failed:
    """The last event of a run that raised `error`. What is not the owner's doing is said without its details."""
    match error:
        case TrainingFailed():
            return Failed(code=error.code, message=str(error), is_user_error=True)
        case BaseRefused():
            return Failed(code="base_refused", message=str(error), is_user_error=False)
        case _ if _is_out_of_memory(error):
            return Failed(code=OUT_OF_MEMORY, message="the trainer ran out of memory", is_user_error=False)
        case _ if directory.is_full(error):
            path = error.filename if isinstance(error, OSError) else None
            return Failed(code=DISK_FULL, message="the trainer's disk is full", is_user_error=False, path=path)
    return Failed(code=INTERNAL_ERROR, message=f"the trainer failed unexpectedly ({type(error).__name__})", is_user_error=False)


def _is_out_of_memory(error: BaseException) -> bool:
    """On a CPU there is no class of its own: torch's allocator says the one, oneDNN the other."""
    says = str(error)
    is_said = "can't allocate memory" in says or "could not create a primitive" in says
    return is_said or isinstance(error, MemoryError | torch.OutOfMemoryError)
