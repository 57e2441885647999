"""A run waits in the queue of the smallest tier that it fits, and is refused only where it fits none."""

from dataclasses import dataclass, replace

import pytest
from sqlalchemy import orm, select

from app.accounts.caller import Caller
from app.core import catalog, tiers
from app.core.catalog import Base, Catalog
from app.core.errors import BadRequest
from app.core.settings import GpuSettings, Settings, TrainingSettings
from app.core.spec import LoraSpec, QuantizationName, Requested, Start
from app.core.storage import Storage
from app.jobs import admission
from app.jobs import service as jobs
from app.jobs.admission import Data, NoRoom, NotServed
from app.jobs.schemas import JobCreate, JobOut
from app.models import Job, JobState
from tests import make
from worker.services import Services
from worker.tasks import prepare

MIB = 2**20
# a small card and a large one, at what NVML reports of them
CARDS = {
    "T4": 15_360,
    "A10": 23_028,
    "RTX 4090": 24_564,
    "A100 40GB": 40_536,
    "L40S": 46_068,
    "RTX A6000": 49_140,
    "H100": 81_559,
}


@pytest.mark.parametrize(
    ("card", "alone", "beside_an_engine"),
    [
        ("T4", ("16",), ()),
        ("A10", ("24", "16"), ("16",)),
        ("RTX 4090", ("24", "16"), ("16",)),
        ("A100 40GB", ("40", "24", "16"), ("24", "16")),
        ("L40S", ("48", "40", "24", "16"), ("24", "16")),
        ("RTX A6000", ("48", "40", "24", "16"), ("24", "16")),
        ("H100", ("80", "48", "40", "24", "16"), ("48", "40", "24", "16")),
    ],
)
def test_a_card_holds_the_tiers_whose_promise_it_keeps(
    card: str, alone: tuple[str, ...], beside_an_engine: tuple[str, ...]
) -> None:
    total_bytes = CARDS[card] * MIB

    assert tiers.of_card(total_bytes, GpuSettings(has_engine=False)) == alone
    assert tiers.of_card(total_bytes, GpuSettings(has_engine=True)) == beside_an_engine


@pytest.mark.parametrize("gpu", [GpuSettings(), GpuSettings(has_engine=False), GpuSettings(reserved_bytes=3 * 1024 * MIB)])
def test_what_a_tier_promises_every_card_of_it_has(gpu: GpuSettings) -> None:
    for mib in CARDS.values():
        for tier in tiers.of_card(mib * MIB, gpu):
            usable, of_card = tiers.room(tier, gpu).usable_bytes, tiers.room_of_card(mib * MIB, gpu)
            assert usable is not None and of_card.usable_bytes is not None
            assert 0 < usable <= of_card.usable_bytes == tiers.trainer_bytes(mib * MIB, gpu)
            assert of_card.usable_bytes + of_card.reserved_bytes == mib * MIB


def test_the_parts_of_a_shared_card_leave_the_reserve() -> None:
    gpu, total_bytes = GpuSettings(reserved_bytes=1024 * MIB), 24_564 * MIB
    parts = tiers.trainer_bytes(total_bytes, gpu) + tiers.engine_bytes(total_bytes, gpu)

    assert total_bytes - parts == 1024 * MIB


@pytest.fixture
def base() -> Base:
    """As large as an 8B to the planner, and as cheap as the tiny one: preparing needs no weights."""
    tiny, large = catalog.load()[make.TINY], catalog.load()["llama-3.1-8b-instruct"].architecture
    architecture = large.model_copy(update={"vocab": tiny.architecture.vocab})
    return tiny.model_copy(
        update={"id": "large-random-llama", "tier": "16", "context_length": 32_768, "architecture": architecture}
    )


@dataclass
class Installation:
    """Its tiers, and the ways in which bases are held, may change between a job's creation and its preparation."""

    services: Services
    caller: Caller

    def with_tiers(self, *tiers: str) -> "Installation":
        training = TrainingSettings(tiers=frozenset(tiers))
        settings = self.services.settings.model_copy(update={"training": training})
        return replace(self, services=replace(self.services, settings=settings))

    def with_quantizations(self, *names: QuantizationName) -> "Installation":
        training = self.services.settings.training.model_copy(update={"quantizations": frozenset(names)})
        settings = self.services.settings.model_copy(update={"training": training})
        return replace(self, services=replace(self.services, settings=settings))

    def create(self, base: Base, *, answer_length: int, **asked: object) -> str:
        """A job on one row of about so many tokens: of this base, a character is one."""
        to, settings = self.services, self.services.settings
        with to.sessions.begin() as session:
            file = make.stored_file(session, self.caller, to.storage, make.chat_line("?", "a" * answer_length).encode())
            options = {"training": {"max_seq_length": 32_768}, **asked}
            request = JobCreate.model_validate({"model": base.id, "training_file": file.id, **options})
            return jobs.create(
                session,
                self.caller,
                to.catalog,
                request=request,
                tiers=settings.training.tiers,
                gpu=settings.gpu,
                quantizations=settings.training.quantizations,
            ).id

    def prepared(self, job_id: str) -> Job:
        assert prepare.prepare_next(self.services)
        with self.services.sessions() as session:
            job = session.get_one(Job, job_id)
            session.expunge_all()
        return job


@pytest.fixture
def installation(
    settings: Settings, system_sessions: orm.sessionmaker[orm.Session], storage: Storage, organization: Caller, base: Base
) -> Installation:
    with system_sessions.begin() as session:  # what other tests left to prepare is not ours
        session.query(Job).filter(Job.state == JobState.VALIDATING_FILES).update({"state": JobState.CANCELLED})
    return Installation(Services(settings, system_sessions, storage, Catalog((base,), {})), organization)


@pytest.mark.parametrize(
    ("answer_length", "tier", "tokens", "is_checkpointing"),
    [(100, "16", 2048, False), (4_000, "16", 4096, True), (30_000, "24", None, True)],
)
def test_a_run_moves_to_the_smallest_tier_with_room(
    installation: Installation, base: Base, answer_length: int, tier: str, tokens: int | None, is_checkpointing: bool
) -> None:
    here = installation.with_tiers("16", "24", "48", "80")
    job = here.prepared(here.create(base, answer_length=answer_length))

    assert (job.state, job.queue) == (JobState.QUEUED, f"train.{tier}")
    assert job.plan is not None and job.spec is not None
    assert (job.plan["tier"], job.plan["is_checkpointing"]) == (tier, is_checkpointing)
    assert job.plan["micro_batch_tokens"] == job.spec["micro_batch_tokens"] == (tokens or job.plan["tokens_per_epoch"])
    assert job.plan["predicted_peak_bytes"] <= job.plan["usable_bytes"] == tiers.room(tier, GpuSettings()).usable_bytes


def test_a_run_that_fits_no_tier_is_refused_with_what_would_fit(installation: Installation, base: Base) -> None:
    here = installation.with_tiers("16")
    job = here.prepared(here.create(base, answer_length=30_000))

    assert job.state == JobState.FAILED and job.error is not None
    assert (job.error["code"], job.error["param"]) == ("no_room", "training.max_seq_length")
    assert (
        "the largest worker, of 16 GB, has 13.9 GiB for it; what would fit: training.max_seq_length of " in job.error["message"]
    )
    fitting = int(job.error["message"].rpartition("max_seq_length of ")[2].partition(",")[0])
    shorter = here.prepared(here.create(base, answer_length=fitting - 200))
    assert shorter.state == JobState.QUEUED


def test_dropout_is_named_where_it_is_to_blame(installation: Installation, base: Base) -> None:
    here = installation.with_tiers("16")
    job = here.prepared(here.create(base, answer_length=16_000, adapter={"dropout": 0.1}))

    assert job.error is not None and job.error["param"] == "adapter.dropout"
    assert here.prepared(here.create(base, answer_length=16_000)).state == JobState.QUEUED


def test_what_no_data_could_make_fit_is_refused_at_once(installation: Installation, base: Base) -> None:
    seventy = catalog.load()["llama-3.3-70b-instruct"].model_copy(update={"tier": "24"})
    both = replace(installation, services=replace(installation.services, catalog=Catalog((seventy, base), {})))

    with pytest.raises(NoRoom, match=r"needs about 4\d\.\d GiB .* of 24 GB, .* what would fit: the model large-random-llama"):
        both.with_tiers("16", "24").create(seventy, answer_length=10)


def test_who_continues_a_model_is_offered_neither_its_base_nor_its_shape(base: Base) -> None:
    seventy = catalog.load()["llama-3.3-70b-instruct"].model_copy(update={"tier": "24"})
    asked = Requested(continue_from=Start(model="ft:a", digest="0" * 64), adapter=LoraSpec(rank=128))
    data = Data(examples=1, tokens=100, trained_tokens=10, longest=100)

    with pytest.raises(NoRoom, match="for it; continue a smaller model"):
        admission.admit(seventy, asked, data, seed=1, among={"24"}, gpu=GpuSettings(), catalog=Catalog((seventy, base), {}))


def test_a_tier_that_was_taken_away_meanwhile_is_not_waited_for(installation: Installation, base: Base) -> None:
    job_id = installation.with_tiers("24").create(base, answer_length=100)
    job = installation.with_tiers("cpu").prepared(job_id)

    assert job.error is not None and job.error["code"] == "no_worker_for_model"
    assert "needs a GPU worker of 16 GB; this installation has: cpu" in job.error["message"]


def test_the_cpu_tier_plans_no_memory(installation: Installation, base: Base) -> None:
    small = base.model_copy(update={"tier": "cpu"})
    here = replace(installation, services=replace(installation.services, catalog=Catalog((small,), {}))).with_tiers("cpu", "16")

    assert here.prepared(here.create(small, answer_length=4_000)).queue == "train.cpu"


def test_paged_optimizer_states_go_to_a_gpu_or_are_refused(installation: Installation, base: Base) -> None:
    small = base.model_copy(update={"tier": "cpu"})
    here = replace(installation, services=replace(installation.services, catalog=Catalog((small,), {})))
    asked = {"training": {"optimizer": "paged_adamw_8bit"}}

    assert here.with_tiers("cpu", "16").create(small, answer_length=100, **asked)
    with here.services.sessions() as session:
        assert session.scalars(select(Job.queue).order_by(Job.id.desc()).limit(1)).one() == "train.16"
    with pytest.raises(BadRequest, match=r"paged_adamw_8bit needs a GPU.*this installation has: cpu; use adamw_8bit"):
        here.with_tiers("cpu").create(small, answer_length=100, **asked)


def test_a_base_in_16_bits_goes_where_it_fits_once_an_engine_holds_it_so(installation: Installation, base: Base) -> None:
    asked, planned = {"answer_length": 100, "quantization": {"scheme": "none"}}, installation.with_tiers("16", "24")
    with pytest.raises(NotServed, match=r"in none, .* engines hold nf4: ask for one of these"):
        planned.create(base, **asked)
    job = planned.with_quantizations("nf4", "none").prepared(planned.with_quantizations("nf4", "none").create(base, **asked))

    assert job.queue == "train.24" and job.plan
    assert job.plan["predicted_bytes"]["weights"] > 2 * base.architecture.linear_parameters
    assert JobOut.of(job).quantization == job.spec["quantization"] == {"scheme": "none", "double_quant": False}
