"""Where a run fits and how: on the smallest tier, the fastest way that its memory allows, or not at all with what would help."""

import pytest

from app.core import catalog, planner, tiers
from app.core.errors import NotFound
from app.core.memory import GIB
from app.core.planner import Room, Run
from app.core.settings import GpuSettings
from app.core.spec import QUANTIZATIONS, LoraSpec

GPU = GpuSettings()
KNOWN = catalog.load()


def run(model: str, *, longest: int = 2048, rank: int = 16, dropout: float = 0.0, batch_size: int = 16) -> Run:
    return Run(
        model=KNOWN.sized(model).architecture,
        lora=LoraSpec(rank=rank, dropout=dropout),
        longest_tokens=longest,
        mean_tokens=longest / 2,
        batch_size=batch_size,
    )


def rooms(*names: str, **options: int) -> list[Room]:
    return [tiers.room(name, GPU, **options) for name in names or tiers.GPUS]


@pytest.mark.parametrize(
    ("model", "tier"),
    [
        ("qwen2.5-0.5b-instruct", "16"),
        ("llama-2-7b", "16"),
        ("llama-3.1-8b-instruct", "16"),
        ("llama-2-13b", "16"),
        ("llama-33b", "24"),
        ("qwen2.5-32b-instruct", "40"),
        ("llama-65b", "48"),
        ("llama-3.3-70b-instruct", "80"),
    ],
)
def test_models_find_the_smallest_tier_that_holds_them(model: str, tier: str) -> None:
    made = planner.plan(run(model), rooms())

    assert made.fits and made.room.tier == tier
    assert made.room.usable_bytes is not None and made.memory.peak_bytes <= made.room.usable_bytes


@pytest.mark.parametrize("model", ["llama-65b", "llama-2-70b", "llama-3.3-70b-instruct"])
def test_65b_and_70b_are_refused_on_24_gb_with_what_would_fit(model: str) -> None:
    asked, (small,) = run(model, longest=512), rooms("24")
    refused = planner.plan(asked, [small])

    assert not refused.fits and refused.memory.weights > 24e9
    found = {remedy.param: remedy.value for remedy in planner.remedies(asked, small, larger=rooms(), bases=KNOWN.values())}
    assert found == {"tier": "48", "model": "qwen2.5-32b-instruct"}


def test_tokens_are_given_up_before_layers_are_computed_again() -> None:
    asked = run("llama-3.1-8b-instruct", longest=256)
    plans = [planner.plan(asked, rooms(tier)) for tier in ("80", "24", "16")]

    assert [(made.micro_batch_tokens, made.is_checkpointing) for made in plans] == [(4096, False), (4096, False), (2048, False)]
    assert [made.accumulation for made in plans] == [1, 1, 1]
    long = planner.plan(run("llama-3.1-8b-instruct", longest=4096), rooms("16"))
    assert long.fits and (long.micro_batch_tokens, long.is_checkpointing) == (4096, True)


def test_a_7b_at_a_context_of_32k_fits_24_gb_only_because_layers_are_computed_again() -> None:
    made = planner.plan(run("llama-2-7b", longest=32_768, batch_size=1), rooms("24"))

    assert made.fits and made.is_checkpointing
    assert made.memory.layers < made.memory.checkpoints


@pytest.mark.parametrize("model", ["llama-3.1-8b-instruct", "gemma-3-1b-it"])
def test_rows_are_never_cut(model: str) -> None:
    for longest in (100, 5000, 30_000):
        assert planner.plan(run(model, longest=longest), rooms("80")).micro_batch_tokens >= longest


def test_what_shares_the_card_is_left_free() -> None:
    asked = run("llama-3.1-8b-instruct")
    alone, beside = rooms("16")[0], rooms("16", beside_bytes=8 * GIB)[0]

    assert alone.usable_bytes is not None and beside.usable_bytes is not None
    assert alone.usable_bytes - beside.usable_bytes == beside.reserved_bytes - alone.reserved_bytes == 8 * GIB
    assert planner.plan(asked, [alone]).fits
    assert not planner.plan(asked, [beside]).fits


def test_every_remedy_is_enough_alone() -> None:
    asked, (small,) = run("llama-2-13b", longest=20_000, rank=128, dropout=0.1), rooms("16")
    assert not planner.plan(asked, [small]).fits
    found = planner.remedies(asked, small, larger=rooms(), bases=KNOWN.values())

    by_param = {remedy.param: remedy for remedy in found}
    assert list(by_param) == ["training.max_seq_length", "tier", "model"]  # neither less rank nor no dropout would do alone
    shorter = asked.model_copy(update={"longest_tokens": int(by_param["training.max_seq_length"].value)})
    longer = shorter.model_copy(update={"longest_tokens": shorter.longest_tokens + 64})
    assert planner.plan(shorter, [small]).fits and not planner.plan(longer, [small]).fits
    model = asked.model_copy(update={"model": KNOWN[by_param["model"].value].architecture})
    assert planner.plan(model, [small]).memory.peak_bytes == by_param["model"].peak_bytes
    other = tiers.room(by_param["tier"].value, GPU)
    assert planner.plan(asked, [other]).fits


def test_a_pair_that_does_not_fit_is_told_the_length_of_each_side() -> None:
    asked, (small,) = run("llama-2-13b", longest=20_000), rooms("16")
    alone, pair = (
        int(next(planner.remedies(made, small)[n].value for n in (0,)))
        for made in (asked, asked.model_copy(update={"documents": 2}))
    )

    assert pair == alone // 2


def test_a_smaller_rank_or_no_dropout_is_offered_where_that_helps() -> None:
    tight = Room(tier="16", device="cuda", usable_bytes=int(7.5 * GIB), reserved_bytes=0)
    asked = run("llama-2-7b", longest=512, rank=128, dropout=0.1)
    found = {remedy.param: remedy.value for remedy in planner.remedies(asked, tight)}

    assert not planner.plan(asked, [tight]).fits
    assert found == {"adapter.rank": "64"}
    assert planner.plan(run("llama-2-7b", longest=512, rank=64, dropout=0.1), [tight]).fits
    long = run("llama-2-7b", longest=2048, rank=64, dropout=0.1)
    assert {remedy.param for remedy in planner.remedies(long, tight)} >= {"adapter.dropout"}


def test_who_has_no_choice_is_told_only_whether_layers_are_computed_again() -> None:
    prepared = run("llama-3.1-8b-instruct").model_copy(update={"micro_batch_tokens": 4096})
    wide, narrow = (Room(tier="card", device="cuda", usable_bytes=gib * GIB, reserved_bytes=0) for gib in (23, 12))

    assert [planner.plan(prepared, [room]).micro_batch_tokens for room in (wide, narrow)] == [4096, 4096]
    assert [planner.plan(prepared, [room]).is_checkpointing for room in (wide, narrow)] == [False, True]


def test_the_cpu_is_not_planned_for() -> None:
    made = planner.plan(run("smollm2-135m-instruct"), rooms("cpu", "16"))

    assert made.fits and (made.room.tier, made.micro_batch_tokens, made.is_checkpointing) == ("cpu", 2048, False)


def test_an_unknown_name_is_told_the_names_near_to_it() -> None:
    assert KNOWN.sized("HuggingFaceTB/SmolLM2-135M-Instruct") is KNOWN["smollm2-135m-instruct"]
    with pytest.raises(NotFound, match=r"did you mean llama-3\.1-8b-instruct\?"):
        KNOWN.sized("Llama-3.1-8B")
    with pytest.raises(NotFound, match=r"did you mean mistral-7b-instruct-v0\.3"):
        KNOWN.sized("mistral-7b-v0.2-instruct")
    with pytest.raises(NotFound, match=r"there are: smollm2-135m-instruct, .*llama-65b"):
        KNOWN.sized("?????")


def test_dora_is_named_where_it_is_to_blame() -> None:
    plain, (room,) = run("llama-3.1-8b-instruct", longest=20_000, batch_size=1), rooms("24")
    asked = plain.model_copy(update={"lora": LoraSpec(use_dora=True)})

    assert planner.plan(plain, [room]).fits and not planner.plan(asked, [room]).fits
    assert planner.remedies(asked, room)[0].param == "adapter.use_dora"


def test_a_base_in_more_bits_takes_a_larger_tier_and_nf4_is_named_where_none_is() -> None:
    plain = run("llama-3.1-8b-instruct")
    found = {}
    for name, held in QUANTIZATIONS.items():
        made = planner.plan(plain.model_copy(update={"quantization": held}), rooms())
        found[name] = made.room.tier
    asked, (small,) = plain.model_copy(update={"quantization": QUANTIZATIONS["none"]}), rooms("16")
    remedy = planner.remedies(asked, small)[0]

    assert found == {"nf4": "16", "nf4-single": "16", "fp4": "16", "fp4-single": "16", "int8": "16", "none": "24"}
    assert not planner.plan(asked, [small]).fits
    assert (remedy.param, remedy.value) == ("quantization.scheme", "nf4")
    assert remedy.peak_bytes == planner.plan(plain, [small]).memory.peak_bytes


def test_the_adapter_that_a_run_began_with_is_counted_where_it_stays() -> None:
    plans = [
        planner.plan(run("llama-3.1-8b-instruct").model_copy(update={"keeps_start": keeps}), rooms()) for keeps in (False, True)
    ]
    without, kept = (plan.memory.adapter for plan in plans)

    assert kept - without == pytest.approx(4 * 41_943_040, rel=1e-6)  # fp32, of rank 16
