"""The machine's Chromium, as tests start it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


class NoBrowser(Exception):
    """There is none on this machine."""


@contextmanager
def launched() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find(), args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def find() -> str:
    """TUNESMITH_CHROMIUM, or what is installed."""
    named = os.environ.get("TUNESMITH_CHROMIUM")
    found = next(filter(None, [named, *map(shutil.which, NAMES)]), None)
    if found is None:
        raise NoBrowser("no Chromium was found; install one (Debian: apt install chromium), or name it in TUNESMITH_CHROMIUM")
    return found
