"""`make screenshots`: every page, light and dark, on a desk and on a phone, with an organization's history in it."""

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import Browser, Page
from sqlalchemy import orm, select

from app import db
from app.accounts import bootstrap
from app.accounts.caller import Caller
from app.core.settings import Settings
from app.core.storage import open_storage
from app.models import Organization, Project
from migrations.upgrade import upgrade
from tests import make
from tests.browser import seeding
from tests.browser.chromium import launched
from tests.conftest import CACHE, serving_api
from worker.embedded import Servers
from worker.services import open_services
from worker.tasks.publish import publish_all

SCREENS = {"desk": {"width": 1360, "height": 850}, "phone": {"width": 390, "height": 844}}
THEMES = ("light", "dark")


@dataclass(frozen=True)
class Seeded:
    """The API with a history, and a link that signs its owner in."""

    url: str
    link: str
    paths: dict[str, str]
    go_on: Callable[[], None]  # all processes say once more that they are there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".tunesmith/screenshots"))
    parser.add_argument("--only", help="pages whose name begins so")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    logging.disable()
    chosen = asked.only or ""
    with TemporaryDirectory() as folder, seeded(Path(folder)) as site, launched() as browser:
        session = _signed_in(browser, site)
        for name, path in site.paths.items():
            if name.startswith(chosen):
                site.go_on()
                for (screen, size), theme in product(SCREENS.items(), THEMES):
                    _shoot(browser, session, site.url + path, size, theme, asked.out / f"{name}-{screen}-{theme}.png")
    print(f"{asked.out}: {len(list(asked.out.glob('*.png')))} pictures")


def _signed_in(browser: Browser, site: Seeded) -> dict[str, object]:
    context = browser.new_context()
    page = context.new_page()
    page.goto(site.url + site.link)
    page.get_by_role("button", name="Continue").click()
    page.get_by_role("heading", name="Overview").wait_for()
    state: dict[str, object] = dict(context.storage_state())
    context.close()
    return state


def _shoot(browser: Browser, session: dict[str, object], url: str, size: dict[str, int], theme: str, to: Path) -> None:
    signed_in = {} if "sign-in" in url else {"storage_state": session}
    context = browser.new_context(viewport=size, color_scheme=theme, device_scale_factor=1, **signed_in)
    page: Page = context.new_page()
    page.goto(url)
    page.wait_for_function("() => [...document.querySelectorAll('.skeleton')].every((one) => !one.checkVisibility())")
    page.wait_for_timeout(700)  # curves are drawn when they have come
    page.screenshot(path=to, full_page=True)
    context.close()


@contextmanager
def seeded(folder: Path) -> Iterator[Seeded]:
    """Servers of its own, gone at the end."""
    servers = Servers(folder / "servers", durable=False).start()
    inference = servers.settings.inference.model_copy(update={"base": make.TINY})
    settings = servers.settings.model_copy(update={"cache_dir": CACHE, "inference": inference})
    try:
        upgrade(settings.database.owner_url.get_secret_value())
        bootstrap.ensure_first_key(settings)
        link = bootstrap.sign_in_link(settings)
        sessions = db.open_sessions(settings.database.system_url)
        paths = _history(sessions, settings)
        publish_all(open_services(settings))

        def go_on() -> None:
            with sessions.begin() as session:
                seeding.service(session)

        with serving_api(settings) as url:
            yield Seeded(url, link, paths, go_on)
    finally:
        servers.stop()


def _history(sessions: orm.sessionmaker[orm.Session], settings: Settings) -> dict[str, str]:
    with sessions.begin() as session:
        organization, project = session.execute(select(Organization, Project).join(Project)).one()
        owner = Caller("user-any", organization.id, project.id, organization.slug)
        storage = open_storage(settings.storage)
        good, bad = seeding.uploads(session, owner, storage)
        support, router, failed, running, waiting, _ = seeding.history(session, owner, good)
        evaluation = seeding.evaluation(session, owner, storage, [make.TINY, str(support.fine_tuned_model)])
        endpoint, delivery = seeding.webhook(session, owner)
        return {
            "sign-in": "/sign-in",
            "overview": "/",
            "files": "/files",
            "file-valid": f"/files/{good.id}",
            "file-invalid": f"/files/{bad.id}",
            "new-job": f"/jobs/new?training_file={good.id}",
            "jobs": "/jobs",
            "job-succeeded": f"/jobs/{support.id}",
            "job-running": f"/jobs/{running.id}",
            "job-waiting": f"/jobs/{waiting.id}",
            "job-failed": f"/jobs/{failed.id}",
            "compare": f"/jobs/compare?ids={support.id}&ids={router.id}&ids={running.id}",
            "models": "/models",
            "model": f"/models/{support.fine_tuned_model}",
            "evaluations": "/evaluations",
            "new-evaluation": f"/evaluations/new?file={evaluation.file_id}&model={make.TINY}&model={support.fine_tuned_model}",
            "evaluation": f"/evaluations/{evaluation.id}",
            "playground": "/playground",
            "webhooks": "/webhooks",
            "webhook": f"/webhooks/{endpoint.id}",
            "delivery": f"/webhooks/{endpoint.id}/deliveries/{delivery.id}",
            "keys": "/keys",
            "account": "/account",
            "service": "/service",
            "not-found": "/jobs/ftjob-of-nobody",
        }


if __name__ == "__main__":
    main()
