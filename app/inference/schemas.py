"""Requests and answers of the inference endpoints. What a base cannot do is refused by name, never ignored."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator, model_validator

from app.core.chat import Message, ToolCall
from app.core.engine import Sampling
from app.core.errors import BadRequest
from app.core.structure import SchemaRefused, grammar_of
from app.schemas import Request

# parameters of the API that this server knows and does not offer, with the values that ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# for billing, caching and abuse tracking elsewhere: they change no answer
_HARMLESS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options")


MAX_ANSWERS = 16  # n of a request
MAX_BIASED = 300
MAX_MIXED, MAX_WEIGHT = 8, 2.0  # models of a mix, and how much each may count

Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Mixed(BaseModel):
    """A model whose adapter is added to the base, so many times."""

    model_config = ConfigDict(extra="forbid")

    model: ModelName
    weight: Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)] = 1.0

    @field_validator("weight")
    @classmethod
    def _something(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError("must not be 0: leave the model out")
        return weight


class _Request(Request):
    """What both endpoints take."""

    model: ModelName
    adapters: Annotated[list[Mixed], Field(min_length=1, max_length=MAX_MIXED)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASED)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name in body.keys() & _NEUTRAL.keys():
            if body[name] is not None and body[name] not in _NEUTRAL[name]:
                message = f"{name} is not supported by this model; remove it"
                raise BadRequest(message, param=name, code="unsupported_parameter")
        return {name: value for name, value in body.items() if name not in _NEUTRAL and name not in _HARMLESS}

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if stop == "" or (isinstance(stop, list) and "" in stop):
            raise ValueError("must not hold an empty string")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if any(not token.isdecimal() for token in bias or ()):
            raise ValueError("must map token ids, as decimal numbers, to biases")
        return bias

    @property
    def mix(self) -> list[tuple[str, float]]:
        """Models whose adapters are added to `model`, and how much each counts."""
        return [(part.model, part.weight) for part in self.adapters or ()]

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def limit_param(self) -> str:
        """The parameter that says how long the answer may be."""
        return "max_tokens"

    @property
    def answers(self) -> int:
        return self.n or 1

    @property
    def told_logprobs(self) -> int | None:
        """How many alternatives are told of each token; None tells nothing of any."""
        return None

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """What the answer is held to."""
        return None

    def sampling(self, max_tokens: int) -> Sampling:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=stop,
            top_k=self.top_k or 0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            top_logprobs=self.told_logprobs,
            json_schema=self.json_schema,
        )


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Called(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _object(cls, arguments: str) -> str:
        try:
            is_object = isinstance(json.loads(arguments), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise ValueError("must be a JSON object, written as a string")
        return arguments


class Call(BaseModel):
    """A call that an earlier answer has made."""

    model_config = ConfigDict(extra="ignore")  # the SDK's streams leave an index in it

    id: str
    type: Literal["function"] = "function"
    function: Called


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[Call] | None = None
    content: Annotated[str | list[TextPart] | None, Field(validate_default=True)] = None
    name: str | None = None
    refusal: None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, message: Any) -> Any:
        """The SDK's own answers, sent back as history, carry many keys that are null."""
        return {name: value for name, value in message.items() if value is not None} if isinstance(message, dict) else message

    @field_validator("content")
    @classmethod
    def _something(cls, content: str | list[TextPart] | None, told: ValidationInfo) -> str | list[TextPart] | None:
        if content is None and not told.data.get("tool_calls"):
            raise ValueError("must be there: only a message that calls tools may have none")
        return content

    @model_validator(mode="after")
    def _whole(self) -> "ChatMessage":
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"must have no tool_calls: only the assistant calls tools, not {self.role}")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("must have the tool_call_id of the call that it answers, if and only if its role is tool")
        return self

    def to_message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return Message(
            "system" if self.role == "developer" else self.role,
            text,
            tool_calls=tuple(
                ToolCall(call.id, call.function.name, json.loads(call.function.arguments)) for call in self.tool_calls or ()
            ),
            tool_call_id=self.tool_call_id,
        )


class Function(BaseModel):
    """`strict` promises nothing here."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: Function

    def described(self) -> dict[str, Any]:
        """As templates show it, and as training files do."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class JsonSchema(BaseModel):
    """`strict` or not, an answer is held to the schema."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}  # a field
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("must have json_schema with the type json_schema, and with no other")
        try:
            if self.schema_of_answer is not None:
                grammar_of(self.schema_of_answer)
        except SchemaRefused as error:
            raise BadRequest(f"the JSON schema cannot be used: {error}", param="response_format.json_schema.schema") from None
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        match self.type:
            case "text":
                return None
            case "json_object":
                return {"type": "object"}
            case "json_schema":
                assert self.json_schema is not None
                return self.json_schema.schema_


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("tool_choice")
    @classmethod
    def _free(cls, choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        if choice not in (None, "none", "auto"):
            message = "tool_choice must be none or auto: a model is not made to call a tool here; tell it to in a message"
            raise BadRequest(message, param="tool_choice", code="unsupported_parameter")
        return choice

    @model_validator(mode="after")
    def _alternatives_of_told(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return self

    @property
    def told_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """Those that the model is told of."""
        return [] if self.tool_choice == "none" else [tool.described() for tool in self.tools or ()]

    @property
    def json_schema(self) -> dict[str, Any] | None:
        return self.response_format.schema_of_answer if self.response_format else None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise BadRequest("max_tokens and max_completion_tokens differ; send one of them", param="max_tokens")
        return self

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_param(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"


class CompletionRequest(_Request):
    """`POST /v1/completions`: one prompt, as text or as token ids."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def told_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def one_prompt(self) -> str | list[int]:
        """Raises BadRequest for a batch of prompts."""
        match self.prompt:
            case str() as text:
                return text
            case [str() as text]:
                return text
            case [list() as tokens]:
                return tokens
            case [int(), *_]:
                return [token for token in self.prompt if isinstance(token, int)]
            case _:
                raise BadRequest("send one prompt a request", param="prompt", code="unsupported_parameter")


class PromptTokens(BaseModel):
    """Of the prompt, what had been read before for this organization and these weights. Counted like the rest."""

    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, *, cached_tokens: int) -> "Usage":
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokens(cached_tokens=cached_tokens),
        )
