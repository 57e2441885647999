"""What file to upload for the data sets that a configuration names: our formats, and columns that have another name there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Form:
    """A format of docs/data.md, and the columns that Axolotl lets be called otherwise, by its key for them."""

    format: str
    columns: Mapping[str, str]


_CHAT: Final = Form("chat", {"field_messages": "messages", "field_tools": "tools"})
_PAIRS: Final = Form(
    "preference",
    {"field_messages": "input.messages", "field_chosen": "preferred_output", "field_rejected": "non_preferred_output"},
)
_ALPACA: Final = Form(
    "alpaca", {"field_instruction": "instruction", "field_input": "input", "field_output": "output", "field_system": "no column"}
)
OF_METHOD: Final = {"dpo": _PAIRS, "orpo": _PAIRS, "kto": Form("rated", {})}
FORMS: Final = {
    "alpaca": _ALPACA,
    "chat_template": _CHAT,
    "sharegpt": Form("sharegpt", {"field_messages": "conversations"}),
    "completion": Form("text", {"field": "text"}),
    "pretrain": Form("text", {"text_column": "text"}),
    None: Form("chat", {}),
}
# of a data set's own keys; the rest of them is either where it is, which an upload replaces, or said to be otherwise here
_WHERE: Final = frozenset(
    {"path", "name", "split", "data_files", "ds_type", "type", "revision", "trust_remote_code"}
    | {"shards", "shards_idx", "preprocess_shards"}
)
_TEMPLATE: Final = frozenset(
    {"chat_template", "chat_template_jinja", "message_field_role", "message_field_content", "message_property_mappings"}
    | {"roles", "roles_to_train", "train_on_eos", "train_on_eot"}
)
_USUAL: Final = {
    "roles_to_train": (["assistant"], ["gpt"]),
    "train_on_eos": ("turn", "all"),
    "train_on_eot": ("turn", "all"),
    "message_property_mappings": ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
}
_AS_THEY_ARE: Final = "rows as their format says; each message may carry a `weight` of 0 or 1"
_LEARNT: Final = "`role` and `content`, of which what the assistant says is learnt, with its end of turn"


def uploads(datasets: Sequence[Mapping[str, Any]], *, of: Form | None, into: str) -> Iterator[str]:
    """What to do until `into`, a parameter of the job, can name a file. `of`: the only form of its method."""
    if len(datasets) > 1:
        yield f"{into}: a job reads one file, so write these {len(datasets)} data sets one behind the other, in one format"
    for one in datasets:
        form = of or _form(one)
        where = " ".join(str(one[key]) for key in ("path", "name", "split") if one.get(key))
        if form is None:
            yield f"{into}: write {where} in a format of docs/data.md; `{one.get('type')}` is none"
            continue
        yield f"{into}: upload {where} as JSON Lines of the format `{form.format}` (docs/data.md; `tunesmith files check FILE`)"
        for key, column in form.columns.items():
            theirs = one.get(key) or _of_type(one).get(key)
            if theirs and theirs != column:
                yield f"{into}: call the column `{theirs}` of {where} `{column}`"


def strange(datasets: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Keys of data sets that say what is done otherwise here, each with what is done."""
    for place, one in enumerate(datasets):
        form = _form(one) or _PAIRS
        known = _WHERE | _TEMPLATE | set(form.columns if form else ()) | set(_PAIRS.columns)
        for key, value in one.items():
            if value in (None, "", [], {}, False):
                continue
            if key not in known:
                yield (
                    f"datasets[{place}].{key}",
                    _AS_THEY_ARE,
                )
            elif key in _USUAL and value not in _USUAL[key]:
                yield (
                    f"datasets[{place}].{key}",
                    _LEARNT,
                )


def _form(one: Mapping[str, Any]) -> Form | None:
    kind = one.get("type")
    if isinstance(kind, Mapping):
        return _ALPACA
    if one.get("field_messages") == "conversations" and kind == "chat_template":
        return FORMS["sharegpt"]
    return FORMS.get(str(kind).split(".")[0].split(":")[0] if kind is not None else None)


def _of_type(one: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = one.get("type")
    return kind if isinstance(kind, Mapping) else {}
