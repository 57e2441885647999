"""From a configuration of Axolotl or TRL to the body of a job, with a word on each of its keys."""

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Final

from app.core.catalog import Base, Catalog, HubSource
from app.core.errors import NotFound
from app.core.importing import datasets
from app.core.importing.values import HOWS, NotHere, targets
from app.core.methods import METHODS

UPLOAD_FIRST: Final = "THE-ID-OF-THE-UPLOADED-FILE"
TOOLS: Final = {"axolotl": "base_model", "trl": "model_name_or_path"}  # by the key that tells them apart
METHOD_OF: Final = {"sft": "supervised", "dpo": "dpo", "orpo": "orpo", "kto": "kto"}
COMPARING: Final = frozenset({"dpo", "orpo"})
_OFF: Final[tuple[Any, ...]] = (None, False, "", [], {}, 0, -1, "no", "none")  # values by which nothing is asked


class NotRecognised(ValueError):
    """The file is no configuration of a tool that is known here."""


@dataclass(frozen=True)
class Mapped:
    key: str
    to: str
    value: Any
    is_default: bool = False


@dataclass(frozen=True)
class Ignored:
    key: str
    why: str


@dataclass(frozen=True)
class Refused:
    """`matters`: what is trained would be something else."""

    key: str
    why: str
    instead: str
    matters: bool = True


@dataclass
class Imported:
    """`body` is for `POST /v1/fine_tuning/jobs`, without what was refused. `uploads` says what to do first."""

    tool: str
    body: dict[str, Any] = field(default_factory=dict)
    mapped: list[Mapped] = field(default_factory=list)
    ignored: list[Ignored] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)

    def put(self, key: str, to: str, value: Any, *, is_default: bool = False) -> None:
        at = self.body
        *outer, last = to.split(".")
        for name in outer:
            at = at.setdefault(name, {})
        at[last] = value
        self.mapped.append(Mapped(key, to, value, is_default))


def convert(document: Any, catalog: Catalog, *, method: str | None = None) -> Imported:
    """`method` is the script that TRL is called with, which its file does not say. Raises NotRecognised."""
    if not isinstance(document, Mapping):
        raise NotRecognised("it holds no keys; a configuration of Axolotl or TRL is a YAML mapping")
    tool = next((name for name, key in TOOLS.items() if document.get(key)), None)
    if tool is None:
        raise NotRecognised(f"it has neither of {' and '.join(TOOLS.values())}, by which Axolotl's and TRL's files are known")
    return _Conversion(tool, {str(key): value for key, value in document.items()}, catalog, method).run()


@cache
def _table(tool: str) -> Mapping[str, Any]:
    return tomllib.loads((files("app.core.importing") / f"{tool}.toml").read_text())


def known_keys(tool: str) -> frozenset[str]:
    """Every key of the tool's that something is said of."""
    table = _table(tool)
    listed = (key for kind in ("ignored", "refused") for group in table[kind] for key in group["keys"])
    return frozenset({*table["keys"], *table["same"], *listed, *_PARTS[tool]})


class _Conversion:
    def __init__(self, tool: str, document: dict[str, Any], catalog: Catalog, method: str | None) -> None:
        self._table, self._catalog, self._asked_method = _table(tool), catalog, method
        self._out = Imported(tool)
        self._given = document
        self._of = {**self._defaults(), **{key: value for key, value in document.items() if value is not None}}

    def run(self) -> Imported:
        self._method()
        for part in dict.fromkeys(_PARTS[self._out.tool].values()):
            part(self)
        for key, (to, *how) in self._table["keys"].items():
            if key in self._of:
                self._map(key, to, how[0] if how else "as is")
        for key, value in self._given.items():
            if key not in self._table["keys"] and key not in _PARTS[self._out.tool]:
                self._sort(key, value)
        self._tell_rest()
        self._shape()
        return self._out

    def _defaults(self) -> dict[str, Any]:
        defaults = dict(self._table["defaults"])
        if self._given.get("warmup_steps") or self._given.get("warmup_ratio"):
            defaults = {key: value for key, value in defaults.items() if not key.startswith("warmup")}
        if self._out.tool == "trl":
            defaults["learning_rate"] = self._table["learning_rate"][self._script]
        return defaults

    @property
    def _script(self) -> str:
        """sft, dpo, orpo or kto; or what Axolotl calls another."""
        return str(self._given.get("rl") or "sft") if self._out.tool == "axolotl" else self._asked_method or "sft"

    def _is_default(self, key: str) -> bool:
        return self._given.get(key) is None

    def _map(self, key: str, to: str, how: str) -> None:
        value = self._of[key]
        try:
            said = HOWS[how](value)
        except NotHere as none:
            self._out.refused.append(Refused(key, none.why, none.instead, matters=key != "save_steps"))
            return
        if said is None or said == "" or (value == 0 and key in ("neftune_noise_alpha", "noisy_embedding_alpha")):
            return
        self._out.put(key, to, said, is_default=self._is_default(key))

    def _sort(self, key: str, value: Any) -> None:
        """A key that has no place in the body."""
        if value in _OFF:
            self._out.ignored.append(Ignored(key, "it asks for nothing"))
        elif value == self._table["same"].get(key) or _is_among(value, self._table["same"].get(key)):
            self._out.ignored.append(Ignored(key, "so it is done here"))
        elif group := self._group("ignored", key):
            self._out.ignored.append(Ignored(key, group["why"]))
        elif group := self._group("refused", key):
            self._out.refused.append(Refused(key, group["why"], group["instead"], matters=group.get("matters", True)))
        else:
            why = f"this release knows no such key of {self._out.tool}"
            near = difflib.get_close_matches(key, known_keys(self._out.tool), n=1, cutoff=0.8)
            self._out.refused.append(Refused(key, why, near[0] if near else "leaving it out, if it does not matter"))

    def _tell_rest(self) -> None:
        """Of keys that several parts have heard and none has spoken of."""
        out = self._out
        keys = [*(m.key for m in out.mapped), *(i.key for i in out.ignored), *(r.key for r in out.refused)]
        told = " ".join(keys).split()  # several may make one value
        for key, part in _PARTS[self._out.tool].items():
            if key not in told and self._given.get(key) is not None:
                self._out.ignored.append(Ignored(key, _HEARD.get(part, "so it is done here")))

    def _group(self, kind: str, key: str) -> Any:
        return next((group for group in self._table[kind] if key in group["keys"]), None)

    def _method(self) -> None:
        name = METHOD_OF.get(self._script)
        if name not in METHODS:
            why = f"the method {self._script} is not offered"
            self._out.refused.append(Refused("rl" if "rl" in self._given else "--method", why, f"one of {', '.join(METHODS)}"))
        elif name != "supervised" or "rl" in self._given:
            self._out.put("rl" if "rl" in self._given else "--method", "method.type", name)

    def model(self) -> None:
        key = TOOLS[self._out.tool]
        name = str(self._given[key])
        base = self._catalog.find(name) or next((one for one in self._catalog.values() if _is_on_hub(one, name)), None)
        if base is not None:
            self._out.put(key, "model", base.id)
            return
        self._out.body["model"] = name
        try:
            self._catalog.sized(name.rpartition("/")[2])
            near = "another base of `tunesmith models list`"
        except NotFound as unknown:
            near = str(unknown).rpartition("; ")[2]
        self._out.refused.append(Refused(key, f"{name} is not in the catalog", near))

    def batch(self) -> None:
        names = ("micro_batch_size", "gradient_accumulation_steps")
        if self._out.tool == "trl":
            names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        key, whole = " × ".join(names), HOWS["whole"]
        try:
            rows = whole(self._of[names[0]]) * whole(self._of[names[1]])
        except NotHere as none:
            self._out.refused.append(Refused(key, none.why, none.instead))
            return
        self._out.put(key, "hyperparameters.batch_size", rows, is_default=all(map(self._is_default, names)))

    def quantization(self) -> None:
        """What the base is held in. Axolotl quantizes the constants of 4 bits too; TRL does if it is told to."""
        if self._of.get("load_in_8bit"):
            self._out.put("load_in_8bit", "quantization.scheme", "int8")
        elif self._of.get("load_in_4bit"):
            self._out.put("load_in_4bit", "quantization.scheme", str(self._of.get("bnb_4bit_quant_type", "nf4")))
            key = "bnb_4bit_use_double_quant" if self._out.tool == "axolotl" else "use_bnb_nested_quant"
            nested = bool(self._of.get(key, self._out.tool == "axolotl"))
            self._out.put(key, "quantization.double_quant", nested, is_default=self._is_default(key))
        else:
            self._out.put("load_in_4bit", "quantization.scheme", "none", is_default=True)

    def adapter(self) -> None:
        is_adapter = self._given.get("adapter") in ("lora", "qlora") or self._given.get("use_peft") is True
        if not is_adapter:
            key = "adapter" if self._out.tool == "axolotl" else "use_peft"
            self._out.refused.append(
                Refused(key, "without it all weights are trained, and here only adapters are", "LoRA, with a high adapter.rank")
            )

    def targets(self) -> None:
        named = self._of.get("lora_target_modules")
        key = "lora_target_linear" if self._of.get("lora_target_linear") else "lora_target_modules"
        value = "all-linear" if key == "lora_target_linear" else named
        if not value:
            return
        try:
            self._out.put(key, "adapter.target_modules", targets(value), is_default=self._is_default(key))
        except NotHere as none:
            self._out.refused.append(Refused(key, none.why, none.instead))

    def dropout(self) -> None:
        """Preference trainers of TRL switch every dropout off, the adapter's too."""
        if self._out.tool == "trl" and self._script != "sft" and self._of.get("disable_dropout", True):
            self._of["lora_dropout"] = 0.0
            self._given.setdefault("lora_dropout", None)

    def publish(self) -> None:
        if self._of.get("load_best_model_at_end"):
            self._out.put("load_best_model_at_end", "training.publish", "best")

    def learnt(self) -> None:
        """TRL learns whole conversations unless it is told otherwise."""
        if self._script == "sft" and not self._of.get("assistant_only_loss") and not self._of.get("completion_only_loss"):
            why = "without it TRL learns from the questions of chats too; here only what the assistant says is learnt"
            self._out.refused.append(Refused("assistant_only_loss", why, 'rows of plain text, `{"text"}`', matters=False))

    def data(self) -> None:
        self._out.body |= {"training_file": UPLOAD_FIRST}
        sets = _sets(self._given.get("datasets"))
        if not sets and self._given.get("dataset_name"):
            names = (self._given["dataset_name"], self._given.get("dataset_config"), self._of.get("dataset_train_split", "train"))
            sets = [dict(zip(("path", "name", "split"), names, strict=True))]
        compares = self._script in COMPARING
        self._out.uploads += datasets.uploads(sets, is_preference=compares, into="training_file")
        for key, why in datasets.strange(sets):
            self._out.refused.append(Refused(key, "it is done otherwise here", why))
        for_validation = _sets(self._given.get("test_datasets"))
        is_judged = self._out.tool == "trl" and self._given.get("eval_strategy") not in _OFF
        if is_judged and sets and "test_split_size" not in self._given:
            for_validation = [{**sets[0], "split": self._given.get("dataset_test_split", "test")}]
        if for_validation:
            self._out.body["validation_file"] = UPLOAD_FIRST
            self._out.uploads += datasets.uploads(for_validation, is_preference=compares, into="validation_file")

    def reports(self) -> None:
        if self._of.get("use_tensorboard"):
            self._out.put("use_tensorboard", "integrations.tensorboard", {})
        for tracker in _listed(self._given.get("report_to")):
            if tracker == "tensorboard":
                self._out.put("report_to", "integrations.tensorboard", {})
            elif tracker == "wandb":
                self._out.put("report_to", "integrations.wandb", {"project": self._given.get("project", "huggingface")})
                if self._given.get("run_name"):
                    self._out.put("run_name", "integrations.wandb.name", self._given["run_name"])
            elif tracker not in _OFF:
                instead = "integrations: wandb, mlflow with an `experiment`, or tensorboard"
                self._out.refused.append(Refused("report_to", f"{tracker} is not reported to from this", instead, matters=False))

    def _shape(self) -> None:
        """Bring what was put by its path into the body's own form."""
        body = self._out.body
        name = body.pop("method", {"type": "supervised"})["type"]
        if hyperparameters := body.pop("hyperparameters", None):
            body["method"] = {"type": name, name: {"hyperparameters": hyperparameters}}
        if reports := body.pop("integrations", None):
            body["integrations"] = [{"type": type} | ({type: about} if about else {}) for type, about in reports.items()]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _sets(value: Any) -> list[Mapping[str, Any]]:
    """Of `datasets`: a list of tables, or of names alone."""
    return [one if isinstance(one, Mapping) else {"path": one} for one in _listed(value)]


def _is_on_hub(base: Base, name: str) -> bool:
    return isinstance(base.source, HubSource) and base.source.id.lower() == name.lower()


def _is_among(value: Any, same: Any) -> bool:
    return isinstance(same, list) and value in same


_Part = Callable[[_Conversion], None]
_BOTH: Final[dict[str, _Part]] = {
    "gradient_accumulation_steps": _Conversion.batch,
    "load_in_4bit": _Conversion.quantization,
    "load_in_8bit": _Conversion.quantization,
    "lora_target_modules": _Conversion.targets,
    "load_best_model_at_end": _Conversion.publish,
    "datasets": _Conversion.data,
}
# keys whose values make something only together with others
_PARTS: Final[dict[str, dict[str, _Part]]] = {
    "axolotl": {
        "base_model": _Conversion.model,
        "adapter": _Conversion.adapter,
        "rl": _Conversion.adapter,
        "micro_batch_size": _Conversion.batch,
        "lora_target_linear": _Conversion.targets,
        "bnb_4bit_quant_type": _Conversion.quantization,
        "bnb_4bit_use_double_quant": _Conversion.quantization,
        "test_datasets": _Conversion.data,
        "use_tensorboard": _Conversion.reports,
        **_BOTH,
    },
    "trl": {
        "model_name_or_path": _Conversion.model,
        "use_peft": _Conversion.adapter,
        "per_device_train_batch_size": _Conversion.batch,
        "bnb_4bit_quant_type": _Conversion.quantization,
        "use_bnb_nested_quant": _Conversion.quantization,
        "dataset_name": _Conversion.data,
        "dataset_config": _Conversion.data,
        "dataset_train_split": _Conversion.data,
        "dataset_test_split": _Conversion.data,
        "eval_strategy": _Conversion.data,
        "assistant_only_loss": _Conversion.learnt,
        "completion_only_loss": _Conversion.learnt,
        "disable_dropout": _Conversion.dropout,
        "report_to": _Conversion.reports,
        "run_name": _Conversion.reports,
        "project": _Conversion.reports,
        **_BOTH,
    },
}
_HEARD: Final[Mapping[_Part, str]] = {
    _Conversion.data: "it says which files to upload",
    _Conversion.reports: "it is of a tracker, and none that there is here is asked for",
    _Conversion.quantization: "it says how 4 bits are meant, which is said with load_in_4bit",
    _Conversion.dropout: "it decides the adapter's dropout",
}
