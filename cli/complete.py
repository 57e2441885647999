"""What a shell completes with the service's help. It waits for nobody: who is away or does not know us completes nothing."""

from typing import Any

import typer

from cli.failure import Failed

PATIENCE_SECONDS = 2.0


def job_ids(context: typer.Context) -> list[tuple[str, str]]:
    return [(job["id"], f"{job['status']}, {job['model']}") for job in _listed(context, "/fine_tuning/jobs")]


def models(context: typer.Context) -> list[tuple[str, str]]:
    return [(model["id"], model["owned_by"]) for model in _listed(context, "/models")]


def _listed(context: typer.Context, path: str) -> list[dict[str, Any]]:
    from cli import account
    from cli.api import Api

    try:
        with Api(account.find(context.params.get("data_dir")), attempts=1, seconds=PATIENCE_SECONDS) as api:
            listed: list[dict[str, Any]] = api.get(path)["data"]
            return listed
    except Failed:
        return []
