"""What is in the wheel is all there is: installed elsewhere, without the checkout, the stack comes up and answers."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from openai import OpenAI

from tests import make
from tests.stack import running_stack

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tunesmith` of a fresh environment that holds our wheel, and sees the dependencies that are installed here."""
    folder = tmp_path_factory.mktemp("elsewhere")
    source = folder / "source"  # a build leaves things beside the code
    ignored = shutil.ignore_patterns(".*", "build", "tests", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)], check=True, cwd=folder)
    (wheel,) = folder.glob("tunesmith-*.whl")
    environment = folder / "venv"
    venv.create(environment)
    subprocess.run([*pip, "--python", str(environment), "install", "--no-deps", str(wheel)], check=True, cwd=folder)
    site_packages = next(environment.glob("lib/python*/site-packages"))
    # a path file inside a folder that a path file names is not read: the editable install here stays unseen
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin" / "tunesmith"


def test_the_wheel_brings_code_templates_migrations_and_data(command: Path, bases_dir: Path, tmp_path: Path) -> None:
    where = (
        "import app, cli, worker, migrations; print(app.__path__[0], cli.__path__[0], worker.__path__[0], migrations.__path__[0])"
    )
    found = subprocess.run([command.parent / "python", "-c", where], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout.count(str(command.parents[1])) == 4, found.stdout

    environment = {"PATH": "/usr/bin:/bin:/usr/sbin", "HOME": str(tmp_path)}
    with (
        running_stack(tmp_path / "data", bases_dir, command=[command], environment=environment, cwd=tmp_path) as stack,
        OpenAI(base_url=stack.base_url, api_key=stack.api_key) as client,
    ):
        reply = client.chat.completions.create(model=make.TINY, messages=[{"role": "user", "content": "Hi"}], max_tokens=3)
    assert reply.usage is not None and reply.usage.completion_tokens > 0
