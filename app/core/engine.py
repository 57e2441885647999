"""The private protocol between the gateway and an inference engine: JSON over HTTP, answers as lines of JSON.

`POST /generate` takes a `GenerateRequest` and answers `Chunk` lines; the last one has a `finish_reason`. `POST /blend` is the
same for requests with a `mix`: an engine of before there were any has no such place, where it would otherwise answer as the base.
`POST /prefetch` takes an `AdapterRef`. `GET /stats` answers `EngineStats`. Failures are the public error envelope.
Every call carries `Authorization: Bearer <engine token>`. An engine publishes its base's card (tokenizer and template)
at `card_key` before its first heartbeat.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.core.spec import USUAL, QuantizationName


def card_key(base: str) -> str:
    """Storage key of a base's `base.json`, which names its tokenizer: whoever reads it finds the two that belong together."""
    return f"bases/{base}/base.json"


def tokenizer_key(base: str, sha256: str | None) -> str:
    """Storage key of the `tokenizer.json` with this digest. Cards of 0.1 name none: theirs lies beside the card."""
    return f"bases/{base}/tokenizers/{sha256}.json" if sha256 else f"bases/{base}/tokenizer.json"


FinishReason = Literal["stop", "length"]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True)


class AdapterRef(_Message):
    """One immutable adapter directory in object storage. `digest` is the sha256 of its manifest.json, `base_digest` that of the
    base it was trained on; None for one of before it was told, whose base is held as usual."""

    id: str
    digest: str
    prefix: str
    base: str
    base_digest: str | None = None

    @property
    def internal_name(self) -> str:
        """Retrained weights under the same public name can never answer for the old ones."""
        return f"{self.id}@{self.digest[:12]}"


class Share(_Message):
    """What one adapter by itself would change counts `weight` times."""

    adapter: AdapterRef
    weight: float = 1.0


class Sampling(_Message):
    """Temperature 0 is greedy. `stop` strings end the answer and are not part of it.

    Penalties and bias are added to the logits before anything else, as in the OpenAI API. `top_k` 0 keeps all. `top_logprobs`
    says how many alternatives are told of each token; null tells nothing. An answer is held to `json_schema`, if there is one.
    """

    max_tokens: int = Field(ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int = Field(default=0, ge=0)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[int, float] = {}
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    json_schema: dict[str, Any] | None = None


class GenerateRequest(_Message):
    """Token ids in, text out: the gateway renders, the engine decodes. Nothing computed for one `tenant` is used for another.

    It is answered with `adapter` or with the `mix`, and by the base without either.
    """

    request_id: str
    tenant: str = ""
    prompt: tuple[int, ...] = Field(min_length=1)
    sampling: Sampling
    adapter: AdapterRef | None = None
    mix: tuple[Share, ...] = ()

    @property
    def shares(self) -> tuple[Share, ...]:
        return (Share(adapter=self.adapter),) if self.adapter else self.mix


class TokenLogprob(_Message):
    """The bytes of a token need not be whole characters. `logprob` is the model's own: before bias, penalties and temperature."""

    bytes: tuple[int, ...]
    logprob: float


class ToldToken(TokenLogprob):
    """A token of the answer, and the likeliest ones in its place, the likeliest first."""

    top: tuple[TokenLogprob, ...] = ()


class Chunk(_Message):
    """New text since the last chunk, perhaps empty. `error` ends the stream in place of a `finish_reason`.

    `tokens` are told where logprobs were asked for; their text may be held back until it is known to be no stop string. Of the
    prompt, `cached_tokens` had been read before, for the same tenant and the same adapters.
    """

    text: str = ""
    tokens: tuple[ToldToken, ...] = ()
    finish_reason: FinishReason | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None


class TierStats(_Message):
    """One place where adapters are held: how many and how much now, how often one was found there, how many had to leave."""

    held: int
    size_bytes: int
    hits: int
    evictions: int


class EngineStats(_Message):
    """`adapters` are the internal names of those in slots. `tiers` are slots, memory and disk, the fastest first."""

    base: str
    base_digest: str
    running: int
    waiting: int
    adapters: tuple[str, ...]
    pages: int = 0
    held_pages: int = 0
    cached_pages: int = 0
    tiers: dict[str, TierStats] = {}
    fetched_adapters: int = 0
    refused_adapters: int = 0


class Heartbeat(_Message):
    """An engine tells the gateway where it listens, what it holds and how. Those that do not say how hold it as usual.
    `adapters` counts those in each tier of its memory.

    The last one says that it `is_leaving`, and that it is not to be asked any more.
    """

    engine_id: str
    url: str
    base: str
    base_digest: str
    quantization: QuantizationName = USUAL
    running: int
    waiting: int
    adapters: dict[str, int] = {}
    is_leaving: bool = False
