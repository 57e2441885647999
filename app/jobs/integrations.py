"""Where a job's metrics go beside its events: what a request may name, and what this installation can reach."""

from collections.abc import Sequence
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from app.core.errors import BadRequest
from app.core.settings import Settings
from app.schemas import Request, without_nul

Name = Annotated[str, StringConstraints(min_length=1, max_length=128), AfterValidator(without_nul)]
PathName = Annotated[Name, StringConstraints(pattern=r"^[^/\\#?%:]+$")]  # which Weights & Biases asks for
TagKey = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_./ -]+$")]  # which MLflow does
Tag = Annotated[str, StringConstraints(min_length=1, max_length=64), AfterValidator(without_nul)]
TagValue = Annotated[str, StringConstraints(max_length=500), AfterValidator(without_nul)]


class Wandb(Request):
    project: PathName
    name: Name | None = None
    entity: PathName | None = None
    tags: Annotated[list[Tag], Field(max_length=16)] | None = None


class Mlflow(Request):
    experiment: Name
    run_name: Name | None = None
    tags: Annotated[dict[TagKey, TagValue], Field(max_length=16)] | None = None


class Integration(Request):
    """`wandb` is as the API of OpenAI has it. `tensorboard` needs no more than its name: a file among the job's result files."""

    type: Literal["wandb", "mlflow", "tensorboard"]
    wandb: Wandb | None = None
    mlflow: Mlflow | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Integration":
        for name in FOLLOWED:
            if (getattr(self, name) is not None) != (self.type == name):
                raise ValueError(f"hold an object {name!r} if that is its type, and only then")
        return self


FOLLOWED: Final = ("wandb", "mlflow")  # by the relay, while the job runs; a file is written at its end
SHOWN: Final = {"wandb": "Weights & Biases", "mlflow": "MLflow"}
_SETTINGS = {"wandb": "TUNESMITH_WANDB__API_KEY", "mlflow": "TUNESMITH_MLFLOW__TRACKING_URI"}


def offered(settings: Settings) -> frozenset[str]:
    """The types that this installation can reach."""
    reached = {"wandb": settings.wandb.api_key.get_secret_value(), "mlflow": settings.mlflow.tracking_uri}
    return frozenset({"tensorboard", *(name for name, setting in reached.items() if setting)})


def require_offered(asked: Sequence[Integration] | None, settings: Settings) -> None:
    """Raises BadRequest, naming the setting that its operator would have to make."""
    for place, one in enumerate(asked or ()):
        if one.type not in offered(settings):
            message = (
                f"this installation does not report to {SHOWN[one.type]}: its operator has to set {_SETTINGS[one.type]}; "
                "leave the integration out, or take the metrics from the job's events"
            )
            raise BadRequest(message, param=f"integrations.{place}.type", code="integration_not_configured")
