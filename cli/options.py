"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from cli import complete

AsJson = Annotated[bool, Option("--json", help="Write JSON.")]
StackDir = Annotated[Path, Option("--data-dir", metavar="DIR", help="Where the data of `tunesmith up` lies.")]
Host = Annotated[str, Option(metavar="ADDRESS", help="The address the API listens on.")]
Port = Annotated[int, Option(min=1, max=65535, metavar="N", help="The API's port.")]
DATA_DIR, HOST, PORT = Path(".tunesmith"), "127.0.0.1", 8000  # unless told otherwise

# of commands that speak to the API
Stack = Annotated[Path | None, Option("--data-dir", metavar="DIR", help="Speak to the stack that `tunesmith up` runs there.")]
JobId = Annotated[str, Argument(metavar="JOB", help="A job's id.", autocompletion=complete.job_ids)]
Most = Annotated[int, Option("--limit", min=1, metavar="N", help="How many to show, the newest first.")]
