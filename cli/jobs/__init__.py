"""`tunesmith jobs`: make them, watch them, stop them, compare them."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from cli import complete
from cli.files import PART_MIB
from cli.options import AsJson, JobId, Most, Stack
from cli.output import busy, listed, local_time, show

if TYPE_CHECKING:
    from cli.api import Api

app = typer.Typer(no_args_is_help=True, help="Make fine-tuning jobs, watch, stop and compare them.")

TrainingFile = Annotated[str, Argument(metavar="FILE", help="A path, which is uploaded first, or a file's id.")]
ModelName = Annotated[str | None, Option(metavar="NAME", help="A base, or a model of yours.", autocompletion=complete.models)]
ValidationFile = Annotated[str | None, Option("--validation", metavar="FILE", help="A path or an id, as FILE.")]
Method = Annotated[Literal["supervised", "dpo", "orpo", "kto"] | None, Option(help="By default supervised: docs/methods.md.")]
Epochs = Annotated[int | None, Option(metavar="N", help="How often each row is seen.")]
BatchSize = Annotated[int | None, Option(metavar="ROWS", help="Of an optimizer step.")]
Rate = Annotated[float | None, Option("--lr", metavar="RATE", help="The highest learning rate.")]
Rank = Annotated[int | None, Option(metavar="N", help="Of the adapter.")]
Seed = Annotated[int | None, Option(metavar="N")]
Suffix = Annotated[str | None, Option(metavar="WORD", help="A part of the model's name.")]
Metadata = Annotated[list[str] | None, Option(metavar="NAME=VALUE", help="A note on the job; may be repeated.")]
Settings = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any field of the body, as training.scheduler=linear: docs/options.md.",
    ),
]
Body = Annotated[
    Path | None, Option(metavar="FILE", help="The body as JSON, as `tunesmith import-config` writes it; options go before it.")
]
DryRun = Annotated[bool, Option("--dry-run", help="Say what would come of it, and make no job.")]
Wait = Annotated[bool, Option("--wait", help="Wait for its end; the status is 1 if it does not succeed.")]
Watch = Annotated[bool, Option("--watch", help="Wait, and show how it goes: as `tunesmith jobs watch`.")]
After = Annotated[str | None, Option(metavar="EVENT", help="Begin behind the event of this id.")]


@app.command()
def create(
    file: TrainingFile,
    model: ModelName = None,
    validation: ValidationFile = None,
    method: Method = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    rank: Rank = None,
    seed: Seed = None,
    suffix: Suffix = None,
    metadata: Metadata = None,
    settings: Settings = None,
    body: Body = None,
    dry_run: DryRun = False,
    wait: Wait = False,
    watch: Watch = False,
    data_dir: Stack = None,
    as_json: AsJson = False,
) -> int:
    """Make a job, of a file that is here or there.

    What is left out is chosen by the service, which says why. --json with --watch writes the job and then its events, one a line.
    """
    from cli.api import connect
    from cli.jobs.create import body_of, dry_run_lines, file_id

    options = {
        "model": model,
        "method.type": method,
        "hyperparameters.n_epochs": epochs,
        "hyperparameters.batch_size": batch_size,
        "training.learning_rate": lr,
        "adapter.rank": rank,
        "seed": seed,
        "suffix": suffix,
        "dry_run": dry_run or None,
    }
    asked = body_of(written=body, options=options, settings=settings or (), metadata=metadata or ())
    with connect(data_dir) as api:
        asked["training_file"] = file_id(api, file, part_mib=PART_MIB)
        if validation:
            asked["validation_file"] = file_id(api, validation, part_mib=PART_MIB)
        with busy("looking at it" if dry_run else "making the job"):
            made = api.post("/fine_tuning/jobs", asked)
        if dry_run:
            show(made, "\n".join(dry_run_lines(made)), as_json=as_json)
            return 0 if made["ok"] else 1
        if watch:
            print(json.dumps(made) if as_json else made["id"], flush=True)
            return _watched(api, made, as_json=as_json)
        if not wait:
            show(made, f"{made['id']}: {made['status']}; tunesmith jobs watch {made['id']}", as_json=as_json)
            return 0
        return _waited(api, made, as_json)


@app.command()
def watch(job: JobId, after: After = None, data_dir: Stack = None, as_json: AsJson = False) -> int:
    """Show how a job goes, until it is over.

    On a terminal a picture that changes, else lines; --json writes an event a line. Ctrl-C leaves the job alone, and whoever
    watches again sees all of it. If the service is away for a while it is waited for. The status is 1 if the job does not
    succeed.
    """
    from cli.api import connect

    with connect(data_dir) as api:
        return _watched(api, api.get(f"/fine_tuning/jobs/{job}"), after=after, as_json=as_json)


@app.command("list")
def list_jobs(limit: Most = 20, data_dir: Stack = None, as_json: AsJson = False) -> None:
    """List your jobs."""
    from cli.api import connect

    with connect(data_dir) as api:
        found = api.page_through("/fine_tuning/jobs", limit)
    names, rows = ("ID", "STATUS", "MODEL", "STEP", "CREATED", "FINE-TUNED MODEL"), list[tuple[str, ...]]()
    for job in found:
        status, steps = "paused" if job["paused"] else job["status"], (job["plan"] or {}).get("total_steps", "-")
        became = job["fine_tuned_model"] or "-"
        rows.append((job["id"], status, job["model"], f"{job['step']}/{steps}", local_time(job["created_at"]), became))
    show(found, listed(names, rows), as_json=as_json)


@app.command()
def pause(job: JobId, data_dir: Stack = None, as_json: AsJson = False) -> None:
    """Halt a job; a running one keeps a checkpoint first."""
    _told("pause", job, data_dir, as_json)


@app.command()
def resume(job: JobId, data_dir: Stack = None, as_json: AsJson = False) -> None:
    """Let a paused job go on from its last checkpoint."""
    _told("resume", job, data_dir, as_json)


@app.command()
def cancel(job: JobId, data_dir: Stack = None, as_json: AsJson = False) -> None:
    """Stop a job for good."""
    _told("cancel", job, data_dir, as_json)


@app.command()
def compare(
    jobs: Annotated[list[str], Argument(metavar="JOB...", help="2 to 20 of them.", autocompletion=complete.job_ids)],
    data_dir: Stack = None,
    as_json: AsJson = False,
) -> None:
    """Jobs side by side: in what they differ, and what came of it."""
    from cli.api import connect
    from cli.jobs.compare import lines_of

    with connect(data_dir) as api, busy("comparing"):
        found = api.get("/fine_tuning/jobs/compare", ids=",".join(jobs))
    show(found, "\n".join(lines_of(found["data"])), as_json=as_json)


def _told(action: str, job_id: str, data_dir: Path | None, as_json: bool) -> None:
    from cli.api import connect
    from cli.jobs.watch import standing_of

    with connect(data_dir) as api:
        job = api.post(f"/fine_tuning/jobs/{job_id}/{action}")
    show(job, f"{job['id']}: {standing_of(job)}", as_json=as_json)


def _watched(api: "Api", job: dict[str, Any], *, after: str | None = None, as_json: bool) -> int:
    from cli.jobs.watch import Json, Lines, watch

    if as_json:
        return watch(api, job, Json(), after=after)
    if not sys.stdout.isatty():
        return watch(api, job, Lines(), after=after)
    from rich.console import Console

    from cli.jobs.picture import Picture

    with Picture(job, Console()) as picture:
        return watch(api, job, picture, after=after)


def _waited(api: "Api", job: dict[str, Any], as_json: bool) -> int:
    from cli.jobs.watch import Silent, standing_of, watch

    with busy(f"waiting for {job['id']}"):
        status = watch(api, job, Silent())
    last = api.get(f"/fine_tuning/jobs/{job['id']}")
    show(last, f"{last['id']}: {standing_of(last)}", as_json=as_json)
    return status
