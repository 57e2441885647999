"""Every value an operator can set, read once at the edge of each process. Below the edge there are only values."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, SecretStr, field_validator
from pydantic_settings import (
    BaseSettings,
    NestedSecretsSettingsSource,
    NoDecode,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)
from pydantic_settings import PydanticBaseSettingsSource as Source

from app.core.catalog import Tier
from app.core.spec import USUAL, QuantizationName

MIB = 1024 * 1024
PREFIX = "TUNESMITH_"
CONFIG_FILE, SECRETS_DIR = f"{PREFIX}CONFIG_FILE", f"{PREFIX}SECRETS_DIR"


class SourceRefused(SettingsError):
    """A file or folder of settings cannot be read; `variable` is the one that names it."""

    def __init__(self, variable: str, named: str, why: object) -> None:
        super().__init__(f"{variable} names {named}, which cannot be read: {why}")
        self.variable = variable


def _listed(value: Any) -> Any:
    """Variables and secret files hold text; TOML has lists of its own."""
    try:
        items = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        items = None
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise ValueError('must be a list, in a variable written as JSON: \'["cpu", "24"]\'')
    return items


Item = TypeVar("Item")
# read here and not by pydantic-settings, which knows the section of what it cannot read, and not the variable
Listed = Annotated[frozenset[Item], NoDecode, BeforeValidator(_listed)]


def _require_http(url: str) -> str:
    if not re.match(r"https?://.", url):
        raise ValueError("must be a URL that begins with http:// or https://")
    return url


class DatabaseSettings(BaseModel):
    """One URL per role: what a process may see is decided by what it connects as."""

    api_url: SecretStr = Field(
        default=SecretStr("postgresql+psycopg://tunesmith_api:tunesmith@127.0.0.1:5432/tunesmith"),
        description="the API's role: sees one organization at a time",
    )
    system_url: SecretStr = Field(
        default=SecretStr("postgresql+psycopg://tunesmith_system:tunesmith@127.0.0.1:5432/tunesmith"),
        description="the role of relay and workers: sees every organization",
    )
    owner_url: SecretStr = Field(
        default=SecretStr("postgresql+psycopg://tunesmith_owner:tunesmith@127.0.0.1:5432/tunesmith"),
        description="the role of migrations: owns the tables",
    )
    pool_size: int = Field(
        default=10,
        ge=1,
        description="connections the API keeps, one for each request in a transaction; as many again for all else",
    )

    @field_validator("api_url", "system_url", "owner_url")
    @classmethod
    def _of_postgres(cls, url: SecretStr) -> SecretStr:
        if not re.match(r"postgresql(\+psycopg)?://", url.get_secret_value()):
            raise ValueError("must be a URL such as postgresql+psycopg://ROLE:PASSWORD@HOST:5432/DATABASE")
        return url


class StorageSettings(BaseModel):
    """An S3 bucket."""

    endpoint_url: str | None = Field(default=None, description="URL of an S3-compatible server; unset for AWS itself")
    region: str = Field(default="us-east-1", description="region of the bucket")
    bucket: str = Field(default="tunesmith", description="name of the bucket; `tunesmith migrate` makes it")
    access_key: str = Field(default="", description="access key id; empty takes AWS's own chain of credentials")
    secret_key: SecretStr = Field(default=SecretStr(""), description="secret access key")

    @field_validator("endpoint_url")
    @classmethod
    def _http(cls, url: str | None) -> str | None:
        return url and _require_http(url)


class LeaseSettings(BaseModel):
    """How long silence lasts before a job is given to another worker."""

    lease_seconds: float = Field(default=60.0, gt=0, description="a worker silent for so long loses its job")
    heartbeat_seconds: float = Field(default=10.0, gt=0, description="how often a worker extends its lease")
    max_attempts: int = Field(default=5, ge=1, description="broken attempts without a new checkpoint, after which a job fails")
    max_deaths_at_step: int = Field(default=3, ge=2, description="attempts in a row that die at one step: then a job fails")
    backoff_seconds: float = Field(default=5.0, gt=0, description="before a job's next attempt; doubled for each that broke")


class WebhookSettings(BaseModel):
    """Where deliveries may go. Everything that is not public is refused unless it is named here."""

    allow_loopback: bool = Field(default=False, description="let webhooks go to this machine")
    allowed_hosts: Listed[str] = Field(default=frozenset(), description="hosts in private networks that webhooks may go to")
    timeout_seconds: float = Field(default=15.0, gt=0, le=15, description="how long a receiver may take to answer, at most 15")


class LimitSettings(BaseModel):
    """What one request may carry."""

    file_bytes: int = Field(default=512 * MIB, ge=1, description="largest file in one request")
    upload_bytes: int = Field(default=8 * 1024 * MIB, ge=1, description="largest file in parts: docs/uploads.md")
    part_bytes: int = Field(default=64 * MIB, ge=1, description="largest part; the SDK sends parts of 64 MiB")
    body_bytes: int = Field(default=4 * MIB, ge=1, description="largest body of any other request")


class InferenceSettings(BaseModel):
    """One engine process, and how the API speaks to engines."""

    base: str = Field(default="smollm2-135m-instruct", description="catalog id of the base an engine serves")
    quantization: QuantizationName = Field(
        default=USUAL, description="how an engine holds its base; `tunesmith up` starts one for each of `TRAINING__QUANTIZATIONS`"
    )
    host: str = Field(default="127.0.0.1", description="address an engine listens on, and announces")
    port: int = Field(default=0, ge=0, le=65535, description="port an engine listens on; 0 takes a free one and announces it")
    gateway_url: str = Field(default="http://127.0.0.1:8000", description="where an engine reaches the API")
    default_max_tokens: int = Field(default=1024, ge=1, description="length of an answer when the request names none")
    max_batch: int = Field(default=32, ge=1, description="requests an engine computes at once")
    max_waiting: int = Field(default=256, ge=0, description="requests that may wait in an engine; more are refused with 503")
    max_waiting_of_tenant: int = Field(
        default=64, ge=1, description="requests of one organization that may wait in an engine; more are refused with 429"
    )
    cache_bytes: int = Field(
        default=2 * 1024 * MIB, ge=1, description="an engine's keys and values; texts that do not fit are computed again"
    )
    unpacked_bytes: int = Field(
        default=4 * 1024 * MIB,
        ge=0,
        description="on a CPU, a 4-bit base is computed with as plain matrices if these take no more: several times faster",
    )
    max_adapters: int = Field(default=64, ge=1, description="adapters that may answer at the same time: an engine's slots")
    adapter_slot_bytes: int = Field(
        default=4 * 1024 * MIB, ge=1, description="what the adapters in slots may take, on a GPU of its memory"
    )
    adapter_memory_bytes: int = Field(
        default=2 * 1024 * MIB, ge=0, description="adapters an engine keeps in memory beside those in slots"
    )
    max_rank: int = Field(default=128, ge=1, description="highest LoRA rank an engine loads")
    adapter_disk_bytes: int = Field(default=20 * 1024 * MIB, ge=0, description="adapters an engine keeps on disk")
    heartbeat_seconds: float = Field(default=3.0, gt=0, description="how often an engine says that it lives")
    heartbeat_timeout_seconds: float = Field(default=15.0, gt=0, description="an engine silent for so long gets no requests")

    @field_validator("gateway_url")
    @classmethod
    def _http(cls, url: str) -> str:
        return _require_http(url)


class EvaluationSettings(BaseModel):
    """How much one evaluation may ask, and which judges there are."""

    max_samples: int = Field(default=20_000, ge=1, description="rows times models of one evaluation; more are refused")
    max_file_bytes: int = Field(default=64 * MIB, ge=1, description="largest file that is evaluated with")
    at_once: int = Field(default=8, ge=1, description="questions of an evaluation that a worker has under way at once")
    judges_file: Path | None = Field(default=None, description="TOML with judges: docs/evaluations.md shows one")

    @field_validator("judges_file")
    @classmethod
    def _at_home(cls, path: Path | None) -> Path | None:
        return path and path.expanduser()


class WandbSettings(BaseModel):
    """Weights & Biases, for jobs that ask for it: the API refuses those while no key is set, the relay reports."""

    api_key: SecretStr = Field(default=SecretStr(""), description="key of the account that runs are made with")
    base_url: str = Field(default="https://api.wandb.ai", description="where its API answers, or a server of your own")

    @field_validator("base_url")
    @classmethod
    def _http(cls, url: str) -> str:
        return _require_http(url)


class MlflowSettings(BaseModel):
    """An MLflow tracking server, for jobs that ask for it: the API refuses those while none is set, the relay reports."""

    tracking_uri: str | None = Field(default=None, description="address of the tracking server")
    ui_url: str | None = Field(default=None, description="where customers see its pages; unset tells them a run's id only")
    username: str = Field(default="", description="name for basic authentication")
    password: SecretStr = Field(default=SecretStr(""), description="password for basic authentication")
    token: SecretStr = Field(default=SecretStr(""), description="bearer token, instead of name and password")

    @field_validator("tracking_uri", "ui_url")
    @classmethod
    def _http(cls, url: str | None) -> str | None:
        if url and "@" in url:
            raise ValueError("must hold no name and password: they have settings of their own")
        return url and _require_http(url).rstrip("/")


class MetricsSettings(BaseModel):
    """Where Prometheus may ask: docs/observability.md lists what it is told."""

    token: SecretStr = Field(
        default=SecretStr(""), description="bearer token for `/metrics` of API and engines; while it is empty the API has none"
    )
    host: str = Field(default="127.0.0.1", description="address at which relay and workers answer `/metrics`")
    port: int = Field(
        default=0, ge=0, le=65535, description="port at which they do, without a token, so in a private network only; 0 for none"
    )


class TracingSettings(BaseModel):
    """OpenTelemetry: docs/observability.md lists the spans."""

    endpoint: str | None = Field(
        default=None, description="a collector's OTLP over HTTP, such as http://127.0.0.1:4318; unset makes no spans"
    )
    share: float = Field(default=1.0, ge=0, le=1, description="part of the traces begun here that are kept")

    @field_validator("endpoint")
    @classmethod
    def _http(cls, url: str | None) -> str | None:
        return _require_http(url).rstrip("/") if url else None  # Compose passes on what is not chosen as nothing


class GpuSettings(BaseModel):
    """What of a card a plan may count on: app.core.tiers has the arithmetic, docs/gpu.md the numbers."""

    reserved_bytes: int | None = Field(
        default=None,
        ge=0,
        description="of each card, kept for CUDA contexts and fragmentation; by default a twentieth of it, at least 1 GiB",
    )
    has_engine: bool = Field(default=True, description="whether an engine answers on the same card as the train worker")
    engine_share: float = Field(default=0.3, gt=0, lt=1, description="part of a shared card that is the engine's")


class TrainingSettings(BaseModel):
    """One train worker. It serves the queue `train.<tier>` of its tier and of every smaller one."""

    tier: Literal["auto"] | Tier = Field(default="auto", description="the largest it holds; `auto`: what its card has room for")
    tiers: Listed[Tier] = Field(default=frozenset[Tier]({"cpu"}), description="tiers some worker serves; others are refused")
    quantizations: Listed[QuantizationName] = Field(
        default=frozenset[QuantizationName]({USUAL}),
        min_length=1,
        description="how jobs may have their base held: an engine must serve each; others are refused",
    )
    warm_base: str | None = Field(
        default="smollm2-135m-instruct", description="base that waiting trainers hold ready; empty for none"
    )


class DashboardSettings(BaseModel):
    """The pages at `/`."""

    is_served: bool = Field(default=True, description="whether the API serves the dashboard too")
    url: str | None = Field(
        default=None,
        description="where browsers find it behind a proxy, such as `https://tunes.example.org`; by default as they ask",
    )

    @field_validator("url")
    @classmethod
    def _http(cls, url: str | None) -> str | None:
        return url and _require_http(url).rstrip("/")


class Settings(BaseSettings):
    """The whole configuration: `TUNESMITH_STORAGE__BUCKET=…` sets `storage.bucket`.

    A variable wins over a file of that name in the folder `TUNESMITH_SECRETS_DIR` (`storage__secret_key`), and that over the
    TOML file `TUNESMITH_CONFIG_FILE`.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", extra="ignore", hide_input_in_errors=True)

    database: DatabaseSettings = DatabaseSettings()
    broker_url: str = Field(default="redis://127.0.0.1:6379/0", description="Valkey or Redis, the doorbell of the workers")
    storage: StorageSettings = StorageSettings()
    leases: LeaseSettings = LeaseSettings()
    webhooks: WebhookSettings = WebhookSettings()
    limits: LimitSettings = LimitSettings()
    inference: InferenceSettings = InferenceSettings()
    training: TrainingSettings = TrainingSettings()
    gpu: GpuSettings = GpuSettings()
    evaluations: EvaluationSettings = EvaluationSettings()
    wandb: WandbSettings = WandbSettings()
    mlflow: MlflowSettings = MlflowSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    dashboard: DashboardSettings = DashboardSettings()

    key_pepper: SecretStr = Field(default=SecretStr(""), description="keys are hashed with it; losing it revokes every key")
    engine_token: SecretStr = Field(default=SecretStr(""), description="shared secret between the gateway and the engines")
    cache_dir: Path = Field(default=Path("~/.cache/tunesmith"), description="quantized bases and tokenizers")
    work_dir: Path = Field(default=Path("~/.cache/tunesmith/work"), description="running jobs' scratch space")
    catalog_file: Path | None = Field(default=None, description="TOML with more base models and aliases")
    price_file: Path | None = Field(default=None, description="TOML with the prices of training; by default all is free")
    log_format: Literal["json", "console"] = Field(default="json", description="one JSON object a line, or words for people")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        default="INFO", description="what is less severe is not logged"
    )

    @field_validator("cache_dir", "work_dir", "catalog_file", "price_file")
    @classmethod
    def _at_home(cls, path: Path | None) -> Path | None:
        return path and path.expanduser()

    @field_validator("broker_url")
    @classmethod
    def _has_scheme(cls, url: str) -> str:
        if "://" not in url:
            raise ValueError("must be a URL such as redis://:PASSWORD@HOST:6379/0")
        return url

    @field_validator("log_level", mode="before")
    @classmethod
    def _in_capitals(cls, level: Any) -> Any:
        return level.upper() if isinstance(level, str) else level

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: Source,
        env_settings: Source,
        dotenv_settings: Source,  # noqa: ARG003 - the caller names them all
        file_secret_settings: Source,
    ) -> tuple[Source, ...]:
        sources = [init_settings, env_settings]
        if folder := os.environ.get(SECRETS_DIR):
            options = {"secrets_dir": folder, "secrets_dir_missing": "error", "secrets_prefix": ""}
            with _naming(SECRETS_DIR, folder):
                sources.append(NestedSecretsSettingsSource(file_secret_settings, **options))  # type: ignore[arg-type]
        if file := os.environ.get(CONFIG_FILE):
            with _naming(CONFIG_FILE, file):
                if not Path(file).is_file():
                    raise FileNotFoundError("it is not a file")
                sources.append(TomlConfigSettingsSource(settings_cls, file))
        return tuple(sources)


@contextmanager
def _naming(variable: str, named: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # wrong TOML, wrong UTF-8 and SettingsError are ValueErrors
        raise SourceRefused(variable, named, error) from error
