"""`tunesmith plan`: a table and a status, from arithmetic alone."""

import json
from pathlib import Path

import pytest

from app.core import catalog, memory
from app.core.spec import LoraSpec
from cli.main import main

EIGHT = "llama-3.1-8b-instruct"


def test_what_fits_is_shown_part_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", EIGHT, "--tier", "24", "--seq-length", "2048", "--rank", "32"]) == 0
    said = capsys.readouterr().out

    assert f"{EIGHT} on a GPU of 24 GB: rows of up to 2,048 tokens, rank 32, nf4\n" in said
    assert "weights of the base                 5.31 GiB  ██████████\n" in said
    assert "what a run may take there          21.12 GiB" in said
    assert said.count(" GiB  ") == 9 and said.count("(not at the peak)") == 1
    assert "It fits." in said


@pytest.mark.parametrize("model", ["llama-65b", "llama-3.3-70b-instruct"])
def test_what_does_not_fit_is_told_what_would(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert main(["plan", model, "--tier", "24", "--seq-length", "512"]) == 1
    said = capsys.readouterr().out

    assert "It does not fit. What would, each alone:\n  - a worker of 48 GB (" in said
    assert "  - the model qwen2.5-32b-instruct (" in said


def test_without_a_tier_it_is_the_smallest_that_holds_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    for model, tier in ((EIGHT, "16"), ("llama-65b", "48")):
        assert main(["plan", model, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["room"]["tier"] == tier


def test_as_json_it_is_the_planners_own_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-2-7b", "--tier", "24", "--seq-length", "32768", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)

    model = catalog.load().sized("llama-2-7b").architecture
    expected = memory.predict(model, LoraSpec(), micro_batch_tokens=32_768, is_checkpointing=True)
    assert (said["model"], said["fits"], said["is_checkpointing"], said["would_fit"]) == ("llama-2-7b", True, True, [])
    assert said["memory"] == expected.model_dump() and said["peak_bytes"] == expected.peak_bytes


def test_options_that_cost_memory_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    def parts(*more: str) -> dict[str, int]:
        main(["plan", EIGHT, "--tier", "80", "--json", *more])
        found: dict[str, int] = json.loads(capsys.readouterr().out)["memory"]
        return found

    plain = parts()
    assert parts("--dora")["layers"] > 2 * plain["layers"]
    assert parts("--optimizer", "adamw_32bit")["adapter"] > 1.5 * plain["adapter"]
    assert parts("--optimizer", "paged_adamw_8bit") == plain
    assert parts("--quantization", "fp4") == plain
    assert parts("--quantization", "none")["weights"] > 1.7 * parts("--quantization", "int8")["weights"] > 2 * plain["weights"]


def test_what_is_beside_it_leaves_less(capsys: pytest.CaptureFixture[str]) -> None:
    def usable(*more: str) -> int:
        main(["plan", EIGHT, "--tier", "24", "--json", *more])
        return int(json.loads(capsys.readouterr().out)["room"]["usable_bytes"])

    engine, trainer = usable() - usable("--beside", "engine"), usable() - usable("--beside", "trainer")
    assert engine == int(0.93 * 24 * 2**30 * 0.3)
    assert trainer == memory.waiting_bytes(catalog.load()[EIGHT].architecture)
    assert usable("--beside", "engine", "--beside", "trainer") == usable() - engine - trainer


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["llama-3.1-8b"], f"did you mean {EIGHT}?"),
        (["smollm2-135m-instruct", "--seq-length", "9000"], "reads at most 8192 tokens"),
        ([EIGHT, "--rank", "1000"], "--rank 1000: "),
        ([EIGHT, "--dropout", "1"], "--dropout 1.0: "),
        (["smollm2-135m-instruct", "--tier", "cpu", "--optimizer", "paged_adamw_8bit"], "needs a GPU"),
        (["smollm2-135m-instruct", "--tier", "cpu", "--beside", "engine"], "memory is not planned on a CPU"),
    ],
)
def test_what_cannot_be_asked_is_told_in_a_line(capsys: pytest.CaptureFixture[str], asked: list[str], why: str) -> None:
    assert main(["plan", *asked]) == 1
    said = capsys.readouterr()

    assert said.out == "" and why in said.err and said.err.count("\n") == 1


def test_an_operators_own_base_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more.toml").write_text(
        '[[size]]\nid = "house-3b"\narchitecture = { layers = 28, hidden = 3072, heads = 24, kv_heads = 8, head_dim = 128, '
        "mlp = 8192, vocab = 128256, tied = true }\n"
    )
    monkeypatch.setenv("TUNESMITH_CATALOG_FILE", str(tmp_path / "more.toml"))

    assert main(["plan", "house-3b"]) == 0
    assert "house-3b on a GPU of 16 GB" in capsys.readouterr().out
