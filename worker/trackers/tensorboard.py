"""A job's metrics as a file that TensorBoard reads."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar, text

from app.jobs import tracking
from app.jobs.tracking import Point

NAME: Final = "events.out.tfevents"  # TensorBoard looks for `tfevents` in it
VERSION: Final = "brain.Event:2"  # of the file's format, in its first record


def event_file(points: Sequence[Point], config: Mapping[str, Any]) -> bytes:
    """A scalar for each metric and step, and the configuration as a table under `config`. Equal points give equal bytes."""
    began_at = points[0].at.timestamp() if points else 0.0
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "events"
        writer = RecordWriter(str(path))
        events = [Event(wall_time=began_at, file_version=VERSION)]
        events.append(Event(wall_time=began_at, summary=text("config", _table(config))))
        for point in points:
            at = point.at.timestamp()
            events += [Event(wall_time=at, step=point.step, summary=scalar(*metric)) for metric in point.metrics.items()]
        for event in events:
            writer.write(event.SerializeToString())
        writer.close()
        return path.read_bytes()


def _table(config: Mapping[str, Any]) -> str:
    """In Markdown, which is how TensorBoard shows texts."""
    rows = [f"| {name} | {value} |".replace("\n", " ") for name, value in tracking.flat(config).items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])
