"""What of storage is known to a row. The rest is left from whoever died between a stored object and its row."""

from collections.abc import Iterator, Sequence

from sqlalchemy import and_, or_, orm, select

from app.models import Adapter, File, Job, JobCheckpoint


def unknown(session: orm.Session, keys: Sequence[str], *, under: str) -> list[str]:
    """Those of `keys` that no row stands on; all of them lie `under` the prefix of one file or of one job."""
    match under.strip("/").split("/"):
        case _, _, "files", file_id:
            known = _of_file(session, file_id)
        case _, _, "jobs", job_id:
            known = _of_job(session, job_id)
        case _:
            raise ValueError(f"nobody knows what is kept under {under}")
    files_and_folders = tuple(known)
    return [key for key in keys if not any(key == one or key.startswith(f"{one}/") for one in files_and_folders)]


def _of_file(session: orm.Session, file_id: str) -> Iterator[str]:
    yield from session.scalars(select(File.storage_key).where(File.id == file_id))


def _of_job(session: orm.Session, job_id: str) -> Iterator[str]:
    """Its models, the states that a resume may need, its result files."""
    checkpoints = session.scalars(select(JobCheckpoint).where(JobCheckpoint.job_id == job_id)).all()
    names = [checkpoint.fine_tuned_model for checkpoint in checkpoints]
    is_its = or_(Adapter.name.in_(names), and_(Adapter.job_id == job_id, Adapter.step.is_(None)))
    yield from session.scalars(select(Adapter.prefix).where(is_its))
    yield from (f"{checkpoint.prefix}/state" for checkpoint in checkpoints if checkpoint.has_state)
    if job := session.get(Job, job_id):
        results = [job.result_file_id, *(job.further_result_file_ids or ())]
        yield from session.scalars(select(File.storage_key).where(File.id.in_(filter(None, results))))
