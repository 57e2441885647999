"""The API's image without a container engine: its files and its `pip install`s, in a fresh environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy import compose

INSTALL_SECONDS = 900


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What /srv is in the image, with the environment beside it in `venv`."""
    root = tmp_path_factory.mktemp("image")
    srv, venv = root / "srv", root / "venv"
    srv.mkdir()
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    for name, argument in compose.instructions("Dockerfile.api"):
        if name == "COPY":
            *sources, target = argument.removeprefix("--from=assets /srv/").split()  # `make assets` has built the same here
            for source in sources:
                _copy(compose.ROOT / source, srv / target / source if target == "./" else srv / target)
        elif name == "RUN" and argument.startswith("pip install"):
            _run(srv, venv, "sh", "-c", _quickly(argument))
    return root


@pytest.mark.timeout(INSTALL_SECONDS)
def test_the_api_starts_in_its_image_and_nothing_else_is_there(image: Path) -> None:
    program = (
        "import importlib.util as u; from app.main import create_app; print(create_app().title, *("
        "name for name in ('torch', 'transformers', 'celery', 'worker', 'pytest') if u.find_spec(name)))"
    )

    assert _in_image(image, "python", "-c", program) == "Tunesmith\n"


def test_the_command_is_in_the_image(image: Path) -> None:
    assert _in_image(image, "tunesmith", "version")
    assert "--first-key" in _in_image(image, "tunesmith", "migrate", "--help")


def test_the_image_has_the_versions_of_the_lock(image: Path) -> None:
    locked = set((compose.ROOT / "requirements.lock").read_text().splitlines())
    installed = {line.lower().replace("_", "-") for line in _in_image(image, "python", "-m", "pip", "freeze").splitlines()}
    strangers = {line for line in installed - locked if not line.startswith("tunesmith")}

    assert not strangers


def test_a_change_of_code_installs_no_dependency_again() -> None:
    for dockerfile in ("Dockerfile.api", "Dockerfile.worker"):
        steps = compose.instructions(dockerfile)
        first_code = steps.index(("COPY", "app app"))
        later = [argument for name, argument in steps[first_code:] if name == "RUN"]

        assert later == ["pip install --no-cache-dir --no-deps --force-reinstall ."]


def _quickly(argument: str) -> str:
    """What this machine has downloaded for another environment is taken from where pip keeps it."""
    return argument.replace(" --no-cache-dir", "").replace("pip install", "python -m pip install --quiet --no-compile", 1)


def _in_image(image: Path, *command: str) -> str:
    """Run outside of /srv, so that what is imported is what was installed."""
    return _run(image, image / "venv", *command)


def _run(cwd: Path, venv: Path, *command: str) -> str:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("TUNESMITH_", "PYTHON"))}
    environment = ours | {
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "TUNESMITH_KEY_PEPPER": "a",
        "TUNESMITH_ENGINE_TOKEN": "b",
    }
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _copy(source: Path, target: Path) -> None:
    """Without what .dockerignore keeps back."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "node_modules", "static"))
    else:
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source, target)
