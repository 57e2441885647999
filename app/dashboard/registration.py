"""The dashboard's place in the API process: pages, and what `web/` has built."""

from contextlib import suppress

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from app.core.errors import NotFound
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
from app.dashboard.assets import Assets, NotBuilt
from app.dashboard.rendering import open_templates
from app.dashboard.route import told
from app.handlers import answer


class _Forever(StaticFiles):
    """Names change with what is in a file, so that no browser asks for one twice."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "public, max-age=31536000, immutable"
        response.headers["x-content-type-options"] = "nosniff"
        return response


def register(app: FastAPI) -> None:
    """After the API's own handlers: of an address that nobody has people are told on a page, and programs as before."""
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
    app.add_exception_handler(HTTPException, _in_their_way)


async def _in_their_way(request: Request, error: Exception) -> Response:
    is_missing = isinstance(error, HTTPException) and error.status_code == 404
    is_a_person = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/v1/")
    if is_missing and is_a_person:
        with suppress(NotBuilt):
            return told(request, NotFound("there is no page at this address"))
    return answer(error)
