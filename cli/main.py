"""The `tunesmith` command. Each subcommand is a function in a module here, which imports what is heavy when it is called."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import typer
from typer.core import TyperGroup

from cli import (
    chat,
    config,
    demo,
    doctor,
    files,
    import_config,
    jobs,
    login,
    migrate,
    models,
    people,
    plan,
    sign_in,
    status,
    up,
    version,
    webhooks,
)
from cli.backup import backup, restore
from cli.failure import Failed, say

NAME, TUNE, OPERATE = "tunesmith", "Tune models and talk to them", "Run the service"


class _ReaderLeft(Exception):
    """Of `tunesmith models list | head -2`: who reads has seen enough. Typer would call that a failure."""


class _Commands(TyperGroup):
    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # Typer exports the class under another name
        try:
            done = super().invoke(ctx)
            sys.stdout.flush()  # here it is heard that the reader has left, and not when the interpreter ends
        except BrokenPipeError:
            raise _ReaderLeft from None
        return done


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tuning as a service that anyone can run: QLoRA jobs behind the OpenAI fine-tuning API.",
    epilog="Begin with `tunesmith up`: it runs all there is on this machine and writes an API key for you.",
)
for customers in (login.login, login.logout):
    app.command(rich_help_panel=TUNE)(customers)
app.add_typer(files.app, name="files", rich_help_panel=TUNE)
app.add_typer(jobs.app, name="jobs", rich_help_panel=TUNE)
app.command(rich_help_panel=TUNE)(chat.chat)
app.add_typer(models.app, name="models", rich_help_panel=TUNE)
app.add_typer(webhooks.app, name="webhooks", rich_help_panel=TUNE)
app.add_typer(files.app, name="data", hidden=True)  # where `check` was at first
for operators in (
    *(up.up, demo.demo, sign_in.sign_in, status.status, doctor.doctor, plan.plan, import_config.import_config),
    *(config.config, migrate.migrate, backup, restore, version.version),
):
    app.command(rich_help_panel=OPERATE)(cast(Callable[..., Any], operators))
app.add_typer(people.organizations, name="organizations", rich_help_panel=OPERATE)
app.add_typer(people.users, name="users", rich_help_panel=OPERATE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status. An expected failure is one line on stderr, and status 1, or 2 for what cannot be understood."""
    try:
        status: int | None = typer.main.get_command(app)(arguments, prog_name=NAME, standalone_mode=False)
    except Failed as why:
        say(why)
        return 1
    except typer.TyperException as error:
        if told := error.format_message():  # empty where the help has been shown instead
            path = context.command_path if (context := getattr(error, "ctx", None)) else NAME
            say(f"{told.replace('Value error, ', '').rstrip('.')}; see `{path} --help`")
        return error.exit_code
    except typer.Abort:
        return 130
    except _ReaderLeft:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return 141
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
