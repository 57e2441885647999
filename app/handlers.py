"""Every failure leaves as the envelope `{"error": {message, type, param, code}}`, with all four keys."""

import re
from collections.abc import Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from psycopg.errors import DiskFull, QueryCanceled
from sqlalchemy.exc import DataError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from app import db
from app.core.errors import AppError, BadRequest, Unavailable

log = structlog.get_logger()

_UNION_BRANCH = re.compile(r"(literal|list|dict|tuple|function-\w+|nullable)\[|(constrained-)?(int|float|str|bool)$")
# what pydantic's errors want, behind "must", where its own words are of its making: "String should match pattern …"
_WANTED = {
    "value_error": "{error}",
    "missing": "be given",
    "extra_forbidden": "be left out: it is no known parameter",
    "string_type": "be a string",
    "string_unicode": "be valid unicode",
    "string_too_short": "be {min_length} or more characters long",
    "string_too_long": "be at most {max_length} characters long",
    "string_pattern_mismatch": "match the pattern {pattern}",
    "int_type": "be an integer",
    "int_parsing": "be an integer",
    "int_from_float": "be an integer",
    "int_parsing_size": "be an integer of fewer digits",
    "float_type": "be a number",
    "float_parsing": "be a number",
    "bool_type": "be true or false",
    "bool_parsing": "be true or false",
    "none_required": "be null",
    "list_type": "be a list",
    "tuple_type": "be a list",
    "dict_type": "be an object",
    "model_type": "be an object",
    "model_attributes_type": "be an object",
    "too_short": "have {min_length} or more entries",
    "too_long": "have at most {max_length} entries",
}
_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed", 413: "request_too_large"}


def register(app: FastAPI) -> None:
    """Answer with the envelope wherever FastAPI would write a body of its own."""
    for kind in (AppError, RequestValidationError, HTTPException, DBAPIError, PoolTimeout):
        app.add_exception_handler(kind, _handle)


async def respond(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer from a middleware, which FastAPI's handlers do not reach."""
    await answer(error)(scope, receive, send)


def answer(error: Exception) -> JSONResponse:
    """The response for any exception. What nobody expected is logged and says nothing of itself."""
    match error:
        case AppError():
            return JSONResponse(error.envelope(), status_code=error.status, headers=error.headers)
        case RequestValidationError():
            return answer(first_problem(error.errors()))
        case HTTPException(status_code=400, __cause__=Exception() as cause):  # FastAPI could not read a body
            return answer(BadRequest(f"the body is not valid JSON: {_unreadable(cause)}", code="invalid_json"))
        case HTTPException():
            message = (
                f"{error.detail}: see /docs for what this server answers" if error.status_code in (404, 405) else error.detail
            )
            return _envelope(error.status_code, message, "invalid_request_error", _HTTP_CODES.get(error.status_code))
        case DataError():  # NUL in a path or a cursor, for one
            return answer(BadRequest("a parameter holds a character or a number that cannot be stored"))
        case DBAPIError(orig=DiskFull()):
            log.error("database_disk_full")
            message = "the server's disk is full, so nothing can be stored; tell the operator, and try again later"
            return answer(Unavailable(message, code="insufficient_storage"))
        case DBAPIError(orig=QueryCanceled()):
            log.warning("query_took_too_long", error=str(error)[:300])
            message = (
                f"the database was not done within {db.REQUEST_TIMEOUT_SECONDS} seconds; ask for less at once, or try again later"
            )
            return answer(Unavailable(message, code="query_took_too_long"))
        case _ if db.is_outage(error):
            log.warning("database_unavailable", error=type(error).__name__)
            return answer(Unavailable("the database does not answer; try again shortly", code="database_unavailable"))
        case _:
            log.error("unexpected_error", exc_info=error)
            return _envelope(500, "something failed on our side; the request id finds it in the logs", "server_error", None)


async def _handle(_: Request, error: Exception) -> JSONResponse:
    return answer(error)


def _envelope(status: int, message: str, type_: str, code: str | None) -> JSONResponse:
    """For what has no class of ours."""
    body = {"message": message, "type": type_, "param": None, "code": code}
    return JSONResponse({"error": body}, status_code=status)


def _unreadable(cause: Exception) -> str:
    match cause:
        case UnicodeDecodeError():
            return f"byte {cause.start + 1} is not UTF-8"
        case RecursionError():
            return "it is nested too deeply"
        case ValueError():
            return "a number has too many digits"
        case _:
            return "it could not be read"


def first_problem(problems: Sequence[Any]) -> AppError:
    """Pydantic's list of problems, told as one sentence about the first parameter that is wrong."""
    first, where = problems[0], _nearest(problems)
    match first["type"]:
        case "json_invalid":
            return BadRequest("the body is not valid JSON", code="invalid_json")
        case "missing":
            return BadRequest(f"{where or 'the body'} is required", param=where or None, code="missing_required_parameter")
        case "model_attributes_type" if not where and isinstance(first["input"], bytes):
            return BadRequest("send the body as JSON, with the header 'content-type: application/json'", code="invalid_json")
        case "extra_forbidden":
            return BadRequest(f"{where} is not a known parameter; remove it", param=where, code="unknown_parameter")
        case _:
            # a union reports each of its branches: "must be 'auto' or be greater than 0"
            wants = dict.fromkeys(_wanted(problem) for problem in problems if _parameter(problem) == where)
            return BadRequest(f"{where or 'the body'} must {' or '.join(wants)}"[:500], param=where or None)


def _wanted(problem: dict[str, Any]) -> str:
    known = _WANTED.get(problem["type"])
    wanted = known.format_map(problem.get("ctx", {})) if known else problem["msg"]
    return re.sub(r"^(Input should|must) ", "", wanted)


def _nearest(problems: Sequence[dict[str, Any]]) -> str:
    """The parameter to name: of the first one's union, the branch that came furthest is what was meant."""
    first = _parameter(problems[0])
    branches = (where for where in map(_parameter, problems) if where == first or where.startswith(f"{first}."))
    return max(branches, key=lambda where: where.count("."))


def _parameter(problem: dict[str, Any]) -> str:
    """The path of a parameter as its sender knows it, without the names of union branches."""
    parts = (str(part) for part in problem["loc"] if part not in ("body", "query", "path", "header"))
    return ".".join(part for part in parts if not _UNION_BRANCH.match(part))
