"""A job's metrics as TensorBoard's own reader finds them."""

from datetime import UTC, datetime
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.jobs.tracking import Point
from worker.trackers import tensorboard

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
POINTS = [
    Point(1, BEGAN, {"train_loss": 2.0}),
    Point(2, BEGAN, {"train_loss": 1.5, "rewards/margin": 0.25}),
]


def test_tensorboard_reads_every_point_and_the_configuration(tmp_path: Path) -> None:
    written = tensorboard.event_file(POINTS, {"spec": {"lora": {"rank": 8}}})
    (tmp_path / f"ftjob-1-{tensorboard.NAME}").write_bytes(written)  # as its owner downloads it
    read = EventAccumulator(str(tmp_path)).Reload()

    assert [(one.step, one.value, one.wall_time) for one in read.Scalars("train_loss")] == [
        (1, 2.0, BEGAN.timestamp()),
        (2, 1.5, BEGAN.timestamp()),
    ]
    assert [(one.step, one.value) for one in read.Scalars("rewards/margin")] == [(2, 0.25)]
    (table,) = read.Tensors("config/text_summary")
    assert b"| spec.lora.rank | 8 |" in table.tensor_proto.string_val[0]
    assert tensorboard.event_file(POINTS, {"spec": {"lora": {"rank": 8}}}) == written


def test_a_job_without_metrics_has_a_file_too(tmp_path: Path) -> None:
    (tmp_path / tensorboard.NAME).write_bytes(tensorboard.event_file([], {}))

    assert EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"] == []
