"""`tunesmith backup` and `tunesmith restore`: all that a stack holds, in a folder, and a stack made of one."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument

from cli.failure import Failed
from cli.options import DATA_DIR, AsJson, StackDir
from cli.output import busy, show

if TYPE_CHECKING:
    from types import ModuleType

    from app.core.settings import Settings
    from worker.embedded.backup import Manifest

Made = Annotated[Path, Argument(metavar="DIR", help="The folder to make; it must not be there yet.")]
Source = Annotated[Path, Argument(metavar="DIR", help="What `tunesmith backup` has made.")]


def backup(to: Made, data_dir: StackDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Copy a stack with all its data.

    All that `tunesmith up` keeps in its data directory goes to a new folder: database,
    objects and secrets. The stack may be running, and jobs with it: the copy is of one
    instant, and `tunesmith restore` makes the stack of that instant again.

    It holds API keys' pepper, passwords and customers' data: keep it as you keep those.
    """
    made = _with_stack("backup", lambda backups, settings: backups.back_up(data_dir, to, settings))
    show(made.model_dump(mode="json"), f"{to} holds the database and {made.objects} objects of {_instant(made)}", as_json=as_json)


def restore(source: Source, data_dir: StackDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Make a stack of a backup.

    It is made in a data directory that is empty or not there yet, for `tunesmith up`
    to run: with its API keys, files, models and jobs, which go on from their last
    checkpoint. A backup of an older release is brought up to date by `up`; one of a
    newer release is refused.

    What happened after the backup is not known any more: a webhook that was delivered
    since then is delivered again.
    """
    made = _with_stack("restore", lambda backups, settings: backups.restore(source, data_dir, settings))
    show(made.model_dump(mode="json"), f"{data_dir} is the stack of {_instant(made)}; `tunesmith up` runs it", as_json=as_json)


def _instant(made: "Manifest") -> str:
    return f"{made.made_at:%Y-%m-%d %H:%M:%S} UTC"


def _with_stack(command: str, act: "Callable[[ModuleType, Settings], Manifest]") -> "Manifest":
    """Let `act` do its work with worker.embedded.backup."""
    from cli.doctor import configuration

    try:
        from worker.embedded import StackError, backup
    except ImportError as error:
        raise Failed(f"{error}; `tunesmith {command}` needs: pip install 'tunesmith[embedded]'") from error
    from app.core.errors import AppError

    settings = configuration.require()
    try:
        with busy(f"{command} under way"):
            return act(backup, settings)
    except (StackError, AppError, OSError) as error:
        raise Failed(error) from error
