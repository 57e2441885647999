"""The dashboard's place in the API process: pages, and what `web/` has built."""

from fastapi import FastAPI
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from app.dashboard import (
    account_routes,
    compare_routes,
    evaluation_routes,
    files_routes,
    keys_routes,
    models_routes,
    new_evaluation_routes,
    outcome_routes,
    routes,
    service_routes,
    signing_routes,
    webhooks_routes,
)
from app.dashboard.assets import Assets
from app.dashboard.rendering import open_templates


class _Forever(StaticFiles):
    """Names change with what is in a file, so that no browser asks for one twice."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "public, max-age=31536000, immutable"
        response.headers["x-content-type-options"] = "nosniff"
        return response


def register(app: FastAPI) -> None:
    assets = Assets()
    app.state.templates = open_templates(assets)
    app.mount("/static", _Forever(directory=assets.folder, check_dir=False), name="static")
    for rooms in (
        signing_routes,
        compare_routes,  # before jobs by their ids
        routes,
        outcome_routes,
        files_routes,
        models_routes,
        new_evaluation_routes,  # before evaluations by their ids
        evaluation_routes,
        webhooks_routes,
        keys_routes,
        account_routes,
        service_routes,
    ):
        app.include_router(rooms.router)
