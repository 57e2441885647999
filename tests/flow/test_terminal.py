"""From a file to a mixed answer without leaving the terminal."""

import json
from pathlib import Path

import pytest

from cli.main import main
from tests import make
from tests.stack import Stack


def test_a_file_becomes_a_model_that_is_mixed_into_its_base(
    stack: Stack, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.jsonl").write_bytes(make.chat_file(24))
    at = ("--data-dir", str(stack.data_dir))
    create = ("jobs", "create", str(tmp_path / "train.jsonl"), "--model", make.TINY, "--epochs", "1", "--batch-size", "8")
    assert main([*create, "--watch", *at]) == 0
    told = capfd.readouterr().out
    tuned = told.splitlines()[-1].partition("succeeded: ")[2]

    assert "Step 3/3: training loss=" in told and " tokens/s" in told and tuned.startswith("ft:")
    assert main(["chat", make.TINY, "Hello", "--adapter", f"{tuned}:0.5", "--max-tokens", "3", "--json", *at]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert (answer["model"], answer["usage"]["completion_tokens"]) == (make.TINY, 3)
