"""Every value an operator can set, read once at the edge of each process. Below the edge there are only values."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024 * 1024


class DatabaseSettings(BaseModel):
    """One URL per role: what a process may see is decided by what it connects as."""

    api_url: SecretStr = SecretStr("postgresql+psycopg://tunesmith_api:tunesmith@127.0.0.1:5432/tunesmith")
    system_url: SecretStr = SecretStr("postgresql+psycopg://tunesmith_system:tunesmith@127.0.0.1:5432/tunesmith")
    owner_url: SecretStr = SecretStr("postgresql+psycopg://tunesmith_owner:tunesmith@127.0.0.1:5432/tunesmith")
    pool_size: int = 10


class StorageSettings(BaseModel):
    """An S3 bucket. `endpoint_url` is None for AWS itself."""

    endpoint_url: str | None = None
    region: str = "us-east-1"
    bucket: str = "tunesmith"
    access_key: str = ""
    secret_key: SecretStr = SecretStr("")


class LeaseSettings(BaseModel):
    """How long silence lasts before a job is given to another worker."""

    lease_seconds: float = 60.0
    heartbeat_seconds: float = 10.0
    max_attempts: int = 5


class WebhookSettings(BaseModel):
    """Where deliveries may go. Everything that is not public is refused unless it is named here."""

    allow_loopback: bool = False
    allowed_hosts: frozenset[str] = frozenset()
    timeout_seconds: float = 15.0


class LimitSettings(BaseModel):
    """What one request may carry."""

    file_bytes: int = 512 * MIB
    body_bytes: int = 4 * MIB


class InferenceSettings(BaseModel):
    """One engine process. `port` 0 takes a free one, which the heartbeat then announces."""

    base: str = "smollm2-135m-instruct"
    host: str = "127.0.0.1"
    port: int = 0
    gateway_url: str = "http://127.0.0.1:8000"
    default_max_tokens: int = Field(default=1024, description="length of an answer when the request names none")
    max_batch: int = 16
    max_waiting: int = 256
    max_adapters: int = 32
    max_rank: int = 128
    adapter_disk_bytes: int = 20 * 1024 * MIB
    heartbeat_seconds: float = 3.0
    heartbeat_timeout_seconds: float = 15.0


class TrainingSettings(BaseModel):
    """One train worker. `tier` names the queue it serves: `train.<tier>`."""

    tier: str = "cpu"
    tiers: frozenset[str] = Field(default=frozenset({"cpu"}), description="tiers some worker serves; others are refused")
    warm_base: str | None = "smollm2-135m-instruct"


class Settings(BaseSettings):
    """The whole configuration: `TUNESMITH_STORAGE__BUCKET=…` sets `storage.bucket`."""

    model_config = SettingsConfigDict(env_prefix="TUNESMITH_", env_nested_delimiter="__", extra="ignore")

    database: DatabaseSettings = DatabaseSettings()
    broker_url: str = "redis://127.0.0.1:6379/0"
    storage: StorageSettings = StorageSettings()
    leases: LeaseSettings = LeaseSettings()
    webhooks: WebhookSettings = WebhookSettings()
    limits: LimitSettings = LimitSettings()
    inference: InferenceSettings = InferenceSettings()
    training: TrainingSettings = TrainingSettings()

    key_pepper: SecretStr = Field(default=SecretStr(""), description="keys are hashed with it; losing it revokes every key")
    engine_token: SecretStr = Field(default=SecretStr(""), description="shared secret between the gateway and the engines")
    cache_dir: Path = Field(default=Path("~/.cache/tunesmith").expanduser(), description="quantized bases and tokenizers")
    work_dir: Path = Field(default=Path("~/.cache/tunesmith/work").expanduser(), description="running jobs' scratch space")
    catalog_file: Path | None = Field(default=None, description="TOML with more base models and aliases")
    log_format: Literal["json", "console"] = "json"
    log_level: str = "INFO"
