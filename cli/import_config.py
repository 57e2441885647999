"""`tunesmith import-config`: a configuration of Axolotl or TRL as the body of a job, and a word on each of its keys."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from cli.failure import Failed
from cli.table import columns

if TYPE_CHECKING:
    from app.core.importing import Imported, Refused

MOST_CORRECTIONS = 20

Configuration = Annotated[Path, Argument(metavar="FILE", help="A YAML file that Axolotl or TRL trains by.")]
Script = Annotated[
    Literal["sft", "dpo", "orpo", "kto"] | None, Option("--method", help="The script that TRL is called with; by default sft.")
]
Uploaded = Annotated[str | None, Option(metavar="ID", help="Of the uploaded file.")]
Output = Annotated[Path | None, Option(metavar="FILE", help="Where the body goes; by default stdout.")]
Force = Annotated[bool, Option("--force", help="Write the body without what is refused.")]


def import_config(
    file: Configuration,
    method: Script = None,
    training_file: Uploaded = None,
    validation_file: Uploaded = None,
    output: Output = None,
    force: Force = False,
) -> None:
    """Turn an Axolotl or TRL configuration into a job.

    Write the body of POST /v1/fine_tuning/jobs, as JSON, for `tunesmith jobs create
    --body` or a program. On stderr: what was mapped, what is ignored because it does
    not matter here, what is refused with the next best thing, and the files to upload
    first.

    The status is 1, and no body is written, if something is refused that would train
    something else; --force writes it all the same, without that. docs/importing.md has
    more.
    """
    import yaml

    from app.core.importing import NotRecognised, convert
    from cli.doctor import configuration

    known = configuration.require_catalog(configuration.require())
    try:
        imported = convert(yaml.safe_load(file.read_text()), known, method=method)
    except (OSError, NotRecognised, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Failed(f"{file}: {error}") from error
    for name, given in (("training_file", training_file), ("validation_file", validation_file)):
        if given:
            imported.body[name] = given
            imported.uploads = [upload for upload in imported.uploads if not upload.startswith(f"{name}:")]
    _correct(imported)
    _report(imported)
    stopping = [refused for refused in imported.refused if refused.matters]
    if stopping and not force:
        raise Failed(f"{len(stopping)} keys ask for what is not offered; --force writes the body without them")
    text = json.dumps(imported.body, indent=2) + "\n"
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text)
    except OSError as error:
        raise Failed(error) from error


def _correct(imported: "Imported") -> None:
    """Take out, and tell as refused, what the API itself would refuse: it knows what this release offers."""
    from pydantic import ValidationError

    from app.core.errors import BadRequest
    from app.core.importing import Refused
    from app.jobs.schemas import JobCreate

    for _ in range(MOST_CORRECTIONS):
        try:
            JobCreate.model_validate(imported.body)
        except BadRequest as refusal:
            path, why = str(refusal.param).split("."), str(refusal)
        except ValidationError as error:
            first = error.errors()[0]
            path, why = [str(part) for part in first["loc"]], first["msg"]
        else:
            return
        taken = _take_out(imported.body, path)
        if taken is None:
            return
        keys = [mapped.key for mapped in imported.mapped if mapped.to.split(".")[-1] == taken]
        matters = taken != "double_quant"  # it rounds constants that are rounded already
        where = ".".join(path)
        instead = f"what is taken where {where} is left out"
        imported.refused.append(Refused(keys[0] if keys else where, f"{where}: {why}", instead, matters))
        imported.mapped[:] = [mapped for mapped in imported.mapped if mapped.key not in keys[:1]]


def _take_out(body: dict[str, Any], path: list[str]) -> str | None:
    """Delete the deepest thing that is there, and return its name."""
    at: Any = body
    found: tuple[Any, str] | None = None
    for name in path:
        if isinstance(at, list) and name.isdecimal():
            at = at[int(name)]
        elif isinstance(at, dict) and name in at:
            found, at = (at, name), at[name]
    if found is None or found[1] in ("model", "training_file"):
        return None
    del found[0][found[1]]
    return found[1]


def _report(imported: "Imported") -> None:
    _print(f"mapped, from {imported.tool}", ((m.key, m.to, _said(m.value, m.is_default)) for m in imported.mapped))
    _print("ignored", ((ignored.key, ignored.why) for ignored in imported.ignored))
    _print("refused", (_told(refused) for refused in imported.refused))
    _print("files to upload", ((upload,) for upload in imported.uploads))


def _said(value: Any, is_default: bool) -> str:
    return json.dumps(value) + (" (its default)" if is_default else "")


def _told(refused: "Refused") -> tuple[str, str]:
    mark = "" if refused.matters else " (what is trained stays much the same)"
    return refused.key, f"{refused.why}{mark}; instead: {refused.instead}"


def _print(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    listed = list(rows)
    if listed:
        print(f"{title}:", file=sys.stderr)
        for line in columns(listed):
            print(f"  {line}", file=sys.stderr)
