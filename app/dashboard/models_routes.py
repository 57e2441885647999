"""Models: all of a project's, one by itself, and several asked at once."""

import json
import shlex
from collections import defaultdict
from collections.abc import Mapping

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import HTMLResponse
from sqlalchemy import orm

from app import db
from app.accounts.caller import Caller as ApiCaller
from app.adapters import aliases
from app.adapters import service as adapters
from app.core import manifest
from app.dashboard.deps import BaseUrl, get_visitor
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute
from app.deps import BaseModels, Caller, Session, Sessions, Settings, Storage
from app.evaluations import service as evaluations
from app.evaluations.schemas import EvaluationOut
from app.files import service as files
from app.inference import engines
from app.jobs import comparing
from app.jobs import service as jobs
from app.models import ModelAlias

router = APIRouter(include_in_schema=False, route_class=PageRoute, dependencies=[Depends(get_visitor)])

EVALUATIONS = 20


@router.get("/models")
def list_models(request: Request, session: Session, caller: Caller) -> HTMLResponse:
    return _listed(request, session, caller)


@router.get("/models/{name:path}/manifest")
def show_manifest(request: Request, sessions: Sessions, caller: Caller, storage: Storage, name: str) -> HTMLResponse:
    with db.organization_session(sessions, caller.organization_id) as session:
        prefix = adapters.get(session, caller, name).prefix
    said = json.loads(storage.get(f"{prefix}/{manifest.NAME}"))
    return render(request, "manifest.html", manifest=json.dumps(said, indent=2, ensure_ascii=False))


@router.get("/models/{name:path}")
def show_model(request: Request, session: Session, caller: Caller, base_url: BaseUrl, name: str) -> HTMLResponse:
    """A final model, or a checkpoint by its own name."""
    model = adapters.get(session, caller, name)
    job = jobs.get(session, caller, model.job_id)
    asking = evaluations.list_naming(session, caller, [name], limit=EVALUATIONS)
    return render(
        request,
        "model.html",
        model=model,
        job=job,
        quantization=adapters.quantization_of(session, model).scheme,
        valid_loss=adapters.valid_loss_of(session, model),
        file=files.find(session, caller, job.training_file_id),
        is_start_there=bool(job.continue_from and adapters.find(session, caller, job.continue_from)),
        calls=_calls(base_url, name),
        aliases=_aliases(session, caller).get(name, []),
        evaluations=[(EvaluationOut.of(one), comparing.grades_of(one, name)) for one in asking],
        most=EVALUATIONS,
    )


@router.delete("/models/{name:path}")
def delete_model(request: Request, session: Session, caller: Caller, catalog: BaseModels, name: str) -> HTMLResponse:
    """From the list, which is what is left then."""
    adapters.delete(session, caller, catalog, name)
    session.flush()
    return _listed(request, session, caller)


@router.post("/models/{name:path}/delete")
def delete_shown_model(session: Session, caller: Caller, catalog: BaseModels, name: str) -> Response:
    """From its own page, which there is no more then."""
    adapters.delete(session, caller, catalog, name)
    return Response(headers={"HX-Redirect": "/models"})


@router.get("/playground")
def show_playground(request: Request, session: Session, settings: Settings) -> HTMLResponse:
    live = engines.list_live(session, timeout_seconds=settings.inference.heartbeat_timeout_seconds)
    return render(request, "playground.html", served=sorted({engine.base for engine in live}))


def _listed(request: Request, session: orm.Session, caller: ApiCaller) -> HTMLResponse:
    models = adapters.list_published(session, caller)
    return render(request, "models.html", models=models, aliases=_aliases(session, caller))


def _aliases(session: orm.Session, caller: ApiCaller) -> Mapping[str, list[ModelAlias]]:
    """By the model that they stand for."""
    behind = defaultdict[str, list[ModelAlias]](list)
    for alias, _ in aliases.list_pointed(session, caller):
        behind[alias.model].append(alias)
    return behind


def _calls(base_url: str, model: str) -> dict[str, str]:
    """One question to it, by language. JSON is Python too."""
    messages = [{"role": "user", "content": "Hello"}]
    body = shlex.quote(json.dumps({"model": model, "messages": messages}))
    url = shlex.quote(f"{base_url}/chat/completions")
    return {
        "Python": f"""\
from openai import OpenAI

client = OpenAI(base_url={json.dumps(base_url)})  # OPENAI_API_KEY: one of {base_url.removesuffix("/v1")}/keys
answer = client.chat.completions.create(model={json.dumps(model)}, messages={json.dumps(messages)})
print(answer.choices[0].message.content)""",
        "curl": f"""\
curl {url} -H "Authorization: Bearer $OPENAI_API_KEY" -H 'Content-Type: application/json' -d {body}""",
    }
