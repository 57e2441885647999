"""`tunesmith files`: what jobs are trained on."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from cli.files.check import check
from cli.files.report import lines_of
from cli.options import AsJson, Most, Stack
from cli.output import listed, local_time, show

app = typer.Typer(no_args_is_help=True, help="Check training files, and bring them to the service.")
app.command()(check)

File = Annotated[Path, Argument(metavar="FILE", help="A JSON Lines file: docs/data.md has the formats.")]
Purpose = Annotated[Literal["fine-tune", "evals"], Option(help="To train on, or to evaluate with.")]
PartSize = Annotated[int, Option(min=1, max=64, metavar="MIB", help="A larger file goes in parts of this size.")]
NoWait = Annotated[bool, Option("--no-wait", help="Do not wait until it is known whether the file is valid.")]
PART_MIB = 16


@app.command()
def push(
    file: File,
    purpose: Purpose = "fine-tune",
    part_size: PartSize = PART_MIB,
    no_wait: NoWait = False,
    data_dir: Stack = None,
    as_json: AsJson = False,
) -> int:
    """Upload a file, and say whether it is valid.

    What is wrong with it is shown with the lines it stands in; the status is 1 then. A large file goes in parts, and if that is
    interrupted the same command goes on with those that have not arrived, for an hour.
    """
    from cli.api import connect
    from cli.files.push import MIB, pushed, validated

    with connect(data_dir) as api:
        sent = pushed(api, file, purpose=purpose, part_bytes=part_size * MIB)
        if not no_wait:
            sent = validated(api, sent)
    found = lines_of(file, sent["report"]) if sent["report"] else ()
    show(sent, "\n".join([f"{sent['id']}: {sent['bytes']} bytes, {sent['status']}", *found]), as_json=as_json)
    return 1 if sent["status"] == "error" else 0


@app.command("list")
def list_files(limit: Most = 20, data_dir: Stack = None, as_json: AsJson = False) -> None:
    """List your files."""
    from cli.api import connect

    with connect(data_dir) as api:
        found = api.page_through("/files", limit)
    names = ("ID", "STATUS", "PURPOSE", "BYTES", "CREATED", "NAME")
    rows = [
        (file["id"], file["status"], file["purpose"], str(file["bytes"]), local_time(file["created_at"]), file["filename"])
        for file in found
    ]
    show(found, listed(names, rows), as_json=as_json)
