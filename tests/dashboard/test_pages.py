"""Every page, for whoever is signed in: whole, of their own organization, and nothing of what strangers write is markup."""

import html
import json
import re
from datetime import timedelta
from urllib.parse import quote

import httpx
import pytest
from fastapi import Request
from sqlalchemy import func, select, update

from app import processes, standing
from app.accounts import users
from app.accounts.caller import Caller
from app.core import ids
from app.core.engine import Heartbeat
from app.core.events import Stepped
from app.core.settings import Settings
from app.core.storage import Storage
from app.dashboard.deps import get_base_url
from app.dashboard.rendering import POLICY
from app.files import service as files
from app.inference import engines
from app.jobs import curves, events
from app.jobs import service as jobs
from app.models import Adapter, Job, SignIn, Snapshot, User
from tests import make
from tests.browser import seeding
from tests.dashboard.conftest import Open, Page, Sessions, link_of
from tests.embedded.patience import PATIENCE_SECONDS

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


@pytest.fixture
def paths(system_sessions: Sessions, organization: Caller, storage: Storage) -> list[str]:
    """Of all pages, in an organization with a history."""
    with system_sessions.begin() as session:
        uploaded = seeding.uploads(session, organization, storage)
        jobs = seeding.history(session, organization, uploaded[0])
        done, other = jobs[:2]
        evaluation = seeding.evaluation(session, organization, storage, [make.TINY, str(done.fine_tuned_model)])
        endpoint, delivery = seeding.webhook(session, organization)
        return [
            *seeding.PAGES,
            *(f"/files/{file.id}" for file in uploaded),
            *(f"/jobs/{job.id}" for job in jobs),
            *(f"/jobs/{job.id}/state" for job in jobs),
            *(f"/jobs/{job.id}/outcome" for job in jobs),
            f"/jobs/{done.id}/examples",
            f"/jobs/compare?ids={done.id}&ids={other.id}",
            f"/evaluations/{evaluation.id}",
            f"/models/{done.fine_tuned_model}",
            f"/webhooks/{endpoint.id}",
            f"/webhooks/{endpoint.id}/deliveries/{delivery.id}",
        ]


def test_every_page_is_whole_and_forbids_what_is_not_ours(page: Page, paths: list[str]) -> None:
    for path in paths:
        answer = page.get(path)
        assert answer.status_code == 200, (path, answer.text)
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["cache-control"] == "no-store"
        assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|javascript:", answer.text), path
        assert "{{" not in answer.text and "None" not in answer.text, path


def test_an_organization_without_anything_is_told_what_to_do_next(page: Page) -> None:
    for path, advice in (("/", "Upload a file"), ("/jobs", "upload one first"), ("/models", "New job"), ("/files", "Drop a")):
        assert advice in page.get(path).text


def test_a_stranger_sees_none_of_it(strange_page: Page, paths: list[str]) -> None:
    for path in paths:
        answer = strange_page.get(path)
        assert answer.status_code == (200 if path in seeding.PAGES else 404), path
        told = answer.text.replace(path.removeprefix("/models/"), "")  # what was asked for may be named
        assert not re.search("support-tone|support-chats|Deploy on success", told), path


def test_markup_in_names_and_rows_is_text(page: Page, system_sessions: Sessions, organization: Caller, storage: Storage) -> None:
    with system_sessions.begin() as session:
        file_id = ids.new("file-")
        content = f'{{"messages": [{{"role": "{MARKUP}'.encode()
        stored = storage.put(files.key_for(organization, file_id), content)
        file = files.add(session, organization, file_id=file_id, filename=MARKUP, purpose="fine-tune", stored=stored)
        seeding.examined(session, file, content)
        job = make.queued_job(session, organization)
        events.append(session, job, MARKUP)
        job.suffix = MARKUP
        endpoint, _ = seeding.webhook(session, organization)
        endpoint.name = MARKUP
        paths = (f"/files/{file.id}", "/files", f"/jobs/{job.id}", "/jobs", "/", "/webhooks", f"/webhooks/{endpoint.id}")
    assert page.ask("POST", "/keys", data={"name": MARKUP}).status_code == 200
    for path in (*paths, "/keys"):
        told = page.get(path).text
        assert "&lt;script&gt;alert(1)" in told, path
        assert "<script>alert" not in told and "<img src=x" not in told, path


def test_a_missing_page_is_a_page(page: Page) -> None:
    answer = page.get("/jobs/ftjob-of-nobody")
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html") and "does not exist or is not yours" in answer.text


def test_an_address_that_nobody_has_is_a_page_to_people_and_an_error_to_programs(open_page: Open) -> None:
    stranger = open_page()
    seen = stranger.http.get("/nowhere", headers={"accept": "text/html,*/*"})
    assert (seen.status_code, seen.headers["content-security-policy"]) == (404, POLICY)
    assert "there is no page at this address" in seen.text and 'href="/"' in seen.text
    for path, accept in (("/nowhere", "application/json"), ("/v1", "*/*")):
        told = stranger.http.get(path, headers={"accept": accept})
        assert (told.status_code, told.json()["error"]["code"]) == (404, "unknown_url")
    of_programs = stranger.http.get("/v1/nowhere", headers={"accept": "text/html"})
    assert (of_programs.status_code, of_programs.json()["error"]["code"]) == (401, "missing_api_key")


def test_what_a_part_asks_in_vain_is_told_in_a_header(page: Page) -> None:
    answer = page.ask("POST", "/jobs/ftjob-ü/cancel")
    assert answer.status_code == 404
    part = page.http.get("/jobs/ftjob-\u00fc\u4e16/state", headers={"hx-request": "true"})
    assert part.status_code == 404 and "does not exist or is not yours" in part.headers["x-problem"]


def test_a_part_that_is_signed_out_leads_to_the_form(page: Page) -> None:
    page.submit("/sign-out")
    part = page.http.get("/jobs/any/state", headers={"hx-request": "true"})
    assert (part.status_code, part.headers["hx-redirect"]) == (401, "/sign-in")


def test_a_job_is_paused_resumed_and_cancelled(page: Page, system_sessions: Sessions, organization: Caller) -> None:
    with system_sessions.begin() as session:
        job = make.queued_job(session, organization)
    for action, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        answer = page.ask("POST", f"/jobs/{job.id}/{action}")
        assert answer.status_code == 200 and f'class="badge {state}"' in answer.text


def test_the_form_makes_the_job_that_it_says(page: Page, system_sessions: Sessions, organization: Caller) -> None:
    with system_sessions.begin() as session:
        file = make.valid_file(session, organization)
    form = {"model": make.TINY, "training_file": file.id, "n_epochs": "3", "learning_rate": "2e-4", "rank": "8", "suffix": "mine"}
    made = page.ask("POST", "/jobs", data=form | {"batch_size": "", "seed": "5", "method": "supervised"})
    assert made.status_code == 200, made.text
    job_id = made.headers["hx-redirect"].removeprefix("/jobs/")

    with system_sessions() as session:
        job = session.get_one(Job, job_id)
        assert (job.suffix, job.seed, job.organization_id) == ("mine", 5, organization.organization_id)
        assert job.request["hyperparameters"]["n_epochs"] == 3 and job.request["hyperparameters"]["batch_size"] == "auto"
        assert (job.request["adapter"]["rank"], job.request["training"]["learning_rate"]) == (8, 2e-4)


@pytest.mark.parametrize(
    ("field", "value"), [("n_epochs", "many"), ("learning_rate", "-1"), ("rank", "1000"), ("model", "gpt-9")]
)
def test_a_wrong_field_is_told_where_the_plan_is(
    page: Page, system_sessions: Sessions, organization: Caller, field: str, value: str
) -> None:
    with system_sessions.begin() as session:
        file = make.valid_file(session, organization)
    form = {"model": make.TINY, "training_file": file.id} | {field: value}
    plan = page.ask("POST", "/jobs/new/plan", data=form)
    assert plan.status_code == 200 and 'role="alert"' in plan.text
    assert page.ask("POST", "/jobs", data=form).status_code in (400, 404)


def test_another_job_like_it_begins_with_its_settings(page: Page, system_sessions: Sessions, organization: Caller) -> None:
    with system_sessions.begin() as session:
        asked = {
            "adapter": {"rank": 4},
            "hyperparameters": {"n_epochs": 2},
            "training": {"learning_rate": 1e-4, "validation_split": 2},
        }
        job = make.queued_job(session, organization, suffix="first", **asked)
        job_id, file_id = job.id, job.training_file_id
    told = page.get(f"/jobs/{job_id}").text
    assert "<dt>adapter.rank</dt>" in told and "<dt>hyperparameters.n_epochs</dt>" in told and "adapter.alpha" not in told
    form = page.get(f"/jobs/new?again={job_id}").text
    values = re.search(r'data-values="([^"]*)"', form)
    assert values is not None
    given = json.loads(html.unescape(values[1]))
    wanted = {"rank": "4", "n_epochs": "2", "learning_rate": "0.0001", "validation_split": "2", "suffix": "first"}
    assert given == wanted | {"model": make.TINY, "training_file": file_id, "method": "supervised"}
    assert page.get("/jobs/new?again=ftjob-of-nobody").status_code == 404


def test_an_endpoint_is_disabled_enabled_and_signs_anew(page: Page, system_sessions: Sessions, organization: Caller) -> None:
    with system_sessions.begin() as session:
        endpoint, _ = seeding.webhook(session, organization)
        path, old = f"/webhooks/{endpoint.id}", endpoint.secret
    assert "Enable it again" in page.ask("POST", f"{path}/disable").text
    assert "Enable it again" not in page.ask("POST", f"{path}/enable").text
    told = page.ask("POST", f"{path}/rotate").text
    assert "whsec_" in told and old not in told


def test_keys_are_made_work_and_are_revoked(page: Page, api_url: str) -> None:
    told = page.ask("POST", "/keys", data={"name": "CI"}).text
    secret = re.search(r"ts-[\w-]{49}", told)
    assert secret is not None and secret[0] not in page.get("/keys").text
    bearer = {"authorization": f"Bearer {secret[0]}"}
    assert page.http.get("/v1/models", headers=bearer).status_code == 200

    (key_id,) = re.findall(r'hx-delete="/keys/(key_\w+)"', told)
    assert "revoked" in page.ask("DELETE", f"/keys/{key_id}").text


def test_a_long_curve_is_drawn_together(system_sessions: Sessions, organization: Caller) -> None:
    with system_sessions.begin() as session:
        job = make.queued_job(session, organization)
        for step in [*range(1, 401), *range(390, 1001)]:  # a resumed attempt goes over steps again
            events.record(session, job, stepped(step, loss=1000.0 - step + (step == 500) * 50, attempt=step > 400))
        session.flush()
        told = curves.of_job(session, organization, job.id, points=100)

    assert len(told.train) == 100 and [point.step for point in told.train] == list(range(10, 1001, 10))
    assert (told.train[0].low, told.train[0].high, told.train[0].loss) == (990, 999, 994.5)
    assert told.train[49].high == 550  # the one that stands out is not lost
    assert told.last_event_id and not told.validation


def stepped(step: int, *, loss: float, attempt: bool) -> Stepped:
    rate = 1e-4 * (1 + attempt)
    return Stepped(
        step=step, total_steps=1000, train_loss=loss, train_mean_token_accuracy=0.5, learning_rate=rate, grad_norm=1.0,
        tokens=10, labelled_tokens=5, tokens_left=0, tokens_per_second=1.0,
    )  # fmt: skip


def test_assets_are_kept_for_ever_under_names_of_their_content(page: Page) -> None:
    told = page.get("/keys").text
    names = re.findall(r'"(/static/[^"]+)"', told)
    assert len(names) >= 3
    for name in names:
        answer = page.get(name)
        assert answer.status_code == 200 and "immutable" in answer.headers["cache-control"]
    assert page.get("/static/manifest.jsonx").status_code == 404


def test_hardest_rows_are_shown_as_they_stand_in_the_file(
    page: Page, system_sessions: Sessions, organization: Caller, storage: Storage
) -> None:
    with system_sessions.begin() as session:
        good, _ = seeding.uploads(session, organization, storage)
        done, _, _, running, *_ = seeding.history(session, organization, good)
        job_id, file_id, not_over = done.id, good.id, running.id
    told = page.get(f"/jobs/{job_id}/examples").text
    assert told.index("line 2") < told.index("line 7") < told.index("line 3")  # by their loss
    assert "the base knew it better" in told and "Can I change the size after ordering?" in told

    assert page.get(f"/jobs/{not_over}/examples").status_code == 404

    assert page.ask("DELETE", f"/files/{file_id}").status_code == 200
    left = page.get(f"/jobs/{job_id}/examples").text
    assert "line 2" in left and "Can I change the size" not in left


def test_a_manifest_is_shown_while_there_is_a_model(
    page: Page, system_sessions: Sessions, organization: Caller, storage: Storage
) -> None:
    with system_sessions.begin() as session:
        made = make.queued_job(session, organization)
        make.complete(session, make.claim(session, made))
        adapter = session.scalars(select(Adapter).where(Adapter.job_id == made.id)).one()
        storage.put(f"{adapter.prefix}/manifest.json", make.manifest(made.id).to_bytes())
        job_id, name = made.id, made.fine_tuned_model
    assert "&#34;dataset_sha256&#34;: " in page.get(f"/models/{name}/manifest").text

    page.ask("DELETE", f"/models/{name}")
    assert page.get(f"/models/{name}/manifest").status_code == 404
    assert "deleted" in page.get(f"/jobs/{job_id}/outcome").text


def test_a_model_tells_where_it_comes_from_how_it_did_and_how_it_is_called(
    page: Page, strange_page: Page, system_sessions: Sessions, organization: Caller, storage: Storage
) -> None:
    with system_sessions.begin() as session:
        good, _ = seeding.uploads(session, organization, storage)
        done, *_ = seeding.history(session, organization, good)
        name, job_id = str(done.fine_tuned_model), done.id
        evaluation_id = seeding.evaluation(session, organization, storage, [make.TINY, name]).id
        checkpoint = jobs.list_checkpoints(session, organization, job_id, after=None, limit=1)[0][0]
    told = page.get(f"/models/{name}").text
    assert f'href="/jobs/{job_id}"' in told and "support-chats.jsonl" in told and f'href="/evaluations/{evaluation_id}"' in told
    assert "<dd>0.48</dd>" in told and f"model=&#34;{name}&#34;" in told and page.url + "/v1" in told
    assert name in page.get("/models").text
    assert f"at step {checkpoint.step}" in page.get(f"/models/{checkpoint.fine_tuned_model}").text
    form = page.get(f"/evaluations/new?model={make.TINY}&model={checkpoint.fine_tuned_model}").text
    assert f'value="{checkpoint.fine_tuned_model}" checked' in form
    assert strange_page.get(f"/models/{name}").status_code == 404

    assert strange_page.ask("POST", f"/models/{name}/delete").status_code == 404
    assert page.ask("POST", f"/models/{name}/delete").headers["hx-redirect"] == "/models"
    assert page.get(f"/models/{name}").status_code == 404


def test_what_a_model_came_from_may_be_gone(page: Page, system_sessions: Sessions, organization: Caller) -> None:
    with system_sessions.begin() as session:
        start = make.tuned_model(session, organization)
        job = make.queued_job(session, organization, continue_from=start)
        make.complete(session, make.claim(session, job))
        name, file_id = str(job.fine_tuned_model), job.training_file_id
    assert f'href="/models/{quote(start)}"' in page.get(f"/models/{name}").text
    for gone in (f"/models/{start}", f"/files/{file_id}"):
        assert page.ask("DELETE", gone).status_code == 200
    told = page.get(f"/models/{name}").text
    assert told.count("which is deleted") == 2 and f'href="/models/{quote(start)}"' not in told


def test_programs_are_told_the_address_that_people_are(settings: Settings) -> None:
    seen = Request({"type": "http", "scheme": "http", "server": ("10.0.0.5", 8000), "path": "/keys", "headers": []})
    assert get_base_url(seen, settings) == "http://10.0.0.5:8000/v1"
    at = settings.model_copy(update={"dashboard": settings.dashboard.model_copy(update={"url": "https://tune.example"})})
    assert get_base_url(seen, at) == "https://tune.example/v1"


def test_jobs_are_compared_by_what_differs(page: Page, system_sessions: Sessions, organization: Caller, storage: Storage) -> None:
    with system_sessions.begin() as session:
        good, _ = seeding.uploads(session, organization, storage)
        one, other, *_ = (job.id for job in seeding.history(session, organization, good))
    told = page.get(f"/jobs/compare?ids={one}&ids={other}").text
    assert "training.learning_rate" in told and "hyperparameters.n_epochs" not in told
    drawn = page.get(f"/jobs/compare/curves?ids={one}&ids={other}").json()
    assert drawn.keys() == {one, other} and all(curves["train"] and curves["validation"] for curves in drawn.values())

    alone = page.get(f"/jobs/compare?ids={one}")
    assert alone.status_code == 400 and "name 2 to 20" in alone.text


def test_an_evaluation_tells_of_every_model_and_is_cancelled_while_it_runs(
    page: Page, system_sessions: Sessions, organization: Caller, storage: Storage
) -> None:
    with system_sessions.begin() as session:
        tuned = make.tuned_model(session, organization)
        over = seeding.evaluation(session, organization, storage, [make.TINY, tuned]).id
        runs = make.evaluation(session, organization, make.TINY)[0].id
    told = page.get(f"/evaluations/{over}").text
    assert told.count(tuned) >= 3 and "Against the first model" in told and "I do not know." in told
    assert "My parcel says delivered" in told and "to be answered: I am sorry." in told
    assert "higher than" in told and "So few rows say little." in told

    assert 'class="badge cancelled"' in page.ask("POST", f"/evaluations/{runs}/cancel").text


def test_a_password_is_set_and_signs_in(page: Page, open_page: Open) -> None:
    """The browser that sets it stays signed in, and its old cookie is worth nothing."""
    email = re.search(r"[\w.-]+@example\.org", page.get("/account").text)
    assert email is not None
    old = dict(page.http.cookies)
    refused = page.ask("POST", "/account/password", data={"password": "short"})
    assert "10 to 256 characters" in refused.text
    made = page.ask("POST", "/account/password", data={"password": "correct horse"})
    assert made.headers["hx-redirect"] == "/account?is_changed=true", made.text
    assert "Your password is set" in page.get("/account?is_changed=true").text
    wrong = page.ask("POST", "/account/password", data={"password": "battery staple", "current": "no"})
    assert "is wrong" in wrong.text

    assert old != dict(page.http.cookies)
    assert httpx.get(f"{page.url}/account", cookies=old, timeout=PATIENCE_SECONDS).status_code == 303
    elsewhere = open_page()
    assert elsewhere.submit("/sign-in", email=email[0], password="correct horse").url.path == "/"


def test_whoever_has_just_come_by_a_link_replaces_a_forgotten_password(
    page: Page, open_page: Open, system_sessions: Sessions, settings: Settings
) -> None:
    """A browser that was left signed in does not, nor does an old sign-in by a link."""
    page.ask("POST", "/account/password", data={"password": "correct horse"})
    email = re.search(r"[\w.-]+@example\.org", page.get("/account").text)
    assert email is not None and 'name="current"' in page.get("/account").text

    def by_link() -> Page:
        pepper = settings.key_pepper.get_secret_value().encode()
        with system_sessions.begin() as session:
            user = session.scalars(select(User).where(User.email == email[0])).one()
            link = f"/sign-in/{users.make_link(session, user, pepper=pepper)}"
        opened = open_page()
        opened.submit(link)
        return opened

    late = by_link()
    with system_sessions.begin() as session:
        an_hour_ago = func.clock_timestamp() - users.LINK_PROVES_FOR
        session.execute(update(SignIn).where(SignIn.by_link).values(created_at=an_hour_ago))
    assert "is wrong" in late.ask("POST", "/account/password", data={"password": "battery staple"}).text

    fresh = by_link()
    assert 'name="current"' not in fresh.get("/account").text
    assert "hx-redirect" in fresh.ask("POST", "/account/password", data={"password": "battery staple"}).headers
    assert 'name="current"' in fresh.get("/account").text
    assert open_page().submit("/sign-in", email=email[0], password="battery staple").url.path == "/"


def test_an_operator_sees_how_the_installation_stands(
    page: Page, open_page: Open, system_sessions: Sessions, settings: Settings, organization: Caller
) -> None:
    assert page.get("/service").status_code == 404 and "/service" not in page.get("/").text
    operator = open_page()
    operator.submit(link_of(system_sessions, settings, organization, is_operator=True))
    beat = Heartbeat(
        engine_id="engine-seen",
        url="http://x",
        base=make.TINY,
        base_digest="d",
        running=3,
        waiting=1,
        adapters={"slots": 2, "memory": 7},
    )
    with system_sessions.begin() as session:
        engines.record(session, beat)
        processes.record(session, "relay-seen", kind="relay", broker_seconds=2)
        processes.record(session, "worker-seen", kind="train", queues=["train.cpu"], broker_seconds=1)
        standing.keep(session, standing.read(session, engine_timeout_seconds=60))
    told = operator.get("/service").text
    assert all(word in told for word in ("engine-seen", "2 slots, 7 memory", "relay-seen", "worker-seen", "train.cpu"))
    assert 'role="alert"' not in told

    with system_sessions.begin() as session:
        session.execute(update(Snapshot).values(taken_at=func.clock_timestamp() - timedelta(minutes=5)))
    assert "it is not running, or does not reach the database" in operator.get("/service").text
