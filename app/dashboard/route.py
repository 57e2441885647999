"""Routes of pages: what goes wrong is told as a page, or to the part of a page that asked."""

import json
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import RedirectResponse
from fastapi.routing import APIRoute

from app.dashboard.assets import NotBuilt
from app.dashboard.deps import NotSignedIn
from app.dashboard.rendering import render
from app.handlers import answer

_HEADINGS = {403: "Not from here", 404: "Not found", 503: "Not just now"}


class PageRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_as_page(request: Request) -> Response:
            try:
                return await handle(request)
            except NotSignedIn:
                return _to_sign_in(request)
            except NotBuilt as error:
                return Response(f"{error}\n", status_code=503, media_type="text/plain")
            except Exception as error:  # as the API tells it, which logs what nobody expected
                return told(request, error)

        return handle_as_page


def _to_sign_in(request: Request) -> Response:
    if request.headers.get("hx-request"):  # a part of a page would show the form inside of itself
        return Response(status_code=401, headers={"HX-Redirect": "/sign-in", "X-Problem": "you are not signed in any more"})
    query = f"?{request.url.query}" if request.url.query else ""
    return RedirectResponse(f"/sign-in?next={quote(request.url.path + query)}", status_code=303)


def told(request: Request, error: Exception) -> Response:
    """In the API's words, as a page or to the part of one that asked."""
    said = answer(error)
    message: str = json.loads(bytes(said.body))["error"]["message"]
    if request.headers.get("hx-request"):
        return Response(status_code=said.status_code, headers={"X-Problem": _in_header(message)})
    heading = _HEADINGS.get(said.status_code, "This did not work")
    return render(request, "error.html", status=said.status_code, heading=heading, message=message)


def _in_header(text: str) -> str:
    """Headers hold Latin-1 on one line."""
    return " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")[:500]
