"""The command as a whole: it starts quickly, completes what is typed, and says what it does not understand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI

from cli.main import main
from tests import make
from tests.cli.conftest import Home, Tunesmith
from tests.embedded.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]
HEAVY = ("httpx", "openai", "sqlalchemy", "fastapi", "pydantic_settings", "boto3", "numpy", "torch", "app", "worker")
EXTRAS = ("openai", "sqlalchemy", "psycopg", "fastapi", "starlette", "uvicorn", "alembic", "torch", "transformers", "worker")


@pytest.mark.parametrize("arguments", [["--help"], ["jobs", "watch", "--help"], ["version"]])
def test_help_waits_for_nothing_heavy(arguments: list[str]) -> None:
    program = f"import sys; from cli.main import main; main({arguments}); print(*set({HEAVY}) & set(sys.modules), sep=',')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)

    assert done.stdout.splitlines()[-1] == ""


def test_a_command_without_its_own_shows_help_and_is_not_understood(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr()

    assert "Tune models and talk to them" in said.out and "Run the service" in said.out and said.err == ""


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["jbos"], "No such command 'jbos'"),
        (["jobs", "watch"], "Missing argument 'JOB'; see `tunesmith jobs watch --help`"),
        (["jobs", "list", "--jsno"], "No such option: --jsno (Possible options: --json)"),
    ],
)
def test_what_is_not_understood_is_told_in_a_line(capsys: pytest.CaptureFixture[str], arguments: list[str], why: str) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()

    assert said.out == "" and said.err.startswith(f"tunesmith: {why}") and said.err.count("\n") == 1


def completed(home: Home, capfd: pytest.CaptureFixture[str], words: str) -> list[str]:
    """What a shell is told when it asks in the words of Typer's script."""
    home.patch.setenv("_TUNESMITH_COMPLETE", "complete_bash")
    home.patch.setenv("COMP_WORDS", words)
    home.patch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main([])
    return capfd.readouterr().out.split()


@pytest.mark.usefixtures("tunesmith")
def test_a_shell_completes_commands_jobs_and_models(
    home: Home, capfd: pytest.CaptureFixture[str], client: OpenAI, file_id: str
) -> None:
    job = client.fine_tuning.jobs.create(model=make.TINY, training_file=file_id)
    home.patch.setattr("cli.complete.PATIENCE_SECONDS", PATIENCE_SECONDS)

    assert completed(home, capfd, "tunesmith jobs wa") == ["watch"]
    assert completed(home, capfd, "tunesmith jobs watch ") == [job.id]
    assert completed(home, capfd, "tunesmith chat tiny-") == [make.TINY]


def test_who_is_not_logged_in_completes_no_ids(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    assert completed(home, capfd, "tunesmith jobs watch ") == []


def test_everything_can_be_read_by_programs(tunesmith: Tunesmith) -> None:
    """Every command that prints an outcome has --json; `up` writes a log, and import-config nothing but JSON."""
    without = {path for path in paths() if "--json" not in tunesmith(*path, "--help").out}

    assert without == {("up",), ("import-config",)}


def paths() -> list[tuple[str, ...]]:
    """Every command there is."""
    from cli.main import app

    groups = {str(group.name): group.typer_instance for group in app.registered_groups if not group.hidden}
    inner = [(name, command) for name, group in groups.items() if group for command in group.registered_commands]
    named = [(name, str(command.name or getattr(command.callback, "__name__", ""))) for name, command in inner]
    outer = [str(command.name or getattr(command.callback, "__name__", "")) for command in app.registered_commands]
    return [*((name.replace("_", "-"),) for name in outer), *named]


def test_customers_need_no_more_than_the_base_package(home: Home, client: OpenAI) -> None:
    home.log_in(str(client.base_url), client.api_key)
    (home.folder / "train.jsonl").write_bytes(make.chat_file())
    commands = (
        ["files", "check", "train.jsonl"],
        ["files", "push", "train.jsonl", "--no-wait"],
        ["jobs", "list"],
        ["models"],
        ["chat", "gpt-9", "Hello"],
        ["webhooks", "listen", "--secret", "whsec_="],
    )
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({EXTRAS})); from cli.main import main; "
        f"print(*(main(command) for command in {commands}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )

    assert done.stderr.splitlines()[-1] == "0 0 0 0 1 1", done.stderr
