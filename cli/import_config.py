"""`tunesmith import-config`: a configuration of Axolotl or TRL as the body of a job, and a word on each of its keys."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.failure import failed
from cli.table import columns

if TYPE_CHECKING:
    from app.core.importing import Imported, Refused

ABOUT = """\
Read a YAML file that Axolotl or TRL trains by, and write the body of POST /v1/fine_tuning/jobs. On stderr: what was mapped, what
is ignored because it does not matter here, what is refused with the next best thing, and the files to upload first.

The status is 1, and no body is written, if something is refused that would train something else; --force writes it all the
same, without that. docs/importing.md has more."""
MOST_CORRECTIONS = 20


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "import-config",
        help="turn an Axolotl or TRL configuration into a job",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument(
        "--method", choices=("sft", "dpo", "orpo", "kto"), help="the script that TRL is called with; by default sft"
    )
    parser.add_argument("--training-file", metavar="ID", help="of the uploaded file")
    parser.add_argument("--validation-file", metavar="ID", help="of the uploaded file")
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the body goes; by default stdout")
    parser.add_argument("--force", action="store_true", help="write the body without what is refused")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import yaml

    from app.core.importing import NotRecognised, convert
    from cli.doctor import configuration

    settings = configuration.read_or_say()
    if settings is None:
        return 1
    known, finding = configuration.read_catalog(settings)
    if not configuration.is_fit(finding) or known is None:
        return 1
    try:
        document = yaml.safe_load(options.file.read_text())
        imported = convert(document, known, method=options.method)
    except (OSError, NotRecognised, UnicodeDecodeError, yaml.YAMLError) as error:
        return failed(f"{options.file}: {error}")
    for name in ("training_file", "validation_file"):
        if given := getattr(options, name):
            imported.body[name] = given
            imported.uploads = [upload for upload in imported.uploads if not upload.startswith(f"{name}:")]
    _correct(imported)
    _report(imported)
    stopping = [refused for refused in imported.refused if refused.matters]
    if stopping and not options.force:
        return failed(f"{len(stopping)} keys ask for what is not offered; --force writes the body without them")
    text = json.dumps(imported.body, indent=2) + "\n"
    if options.output is None:
        print(text, end="")
        return 0
    try:
        options.output.write_text(text)
    except OSError as error:
        return failed(error)
    return 0


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
