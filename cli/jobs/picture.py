"""A job on a terminal, drawn anew as it goes on."""

import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.jobs.sparkline import sparkline
from cli.jobs.watch import OVER, Event, Job, standing_of
from cli.output import clock_time

SHOWN_EVENTS, CURVE_WIDTH = 8, 40
STYLES = {"warn": "yellow", "error": "bold red"}
COLOURS = {"running": "cyan", "succeeded": "green", "failed": "red", "cancelled": "red"}


class Picture:
    """A Teller. While it is entered it redraws itself; what it was last stays on the screen."""

    def __init__(self, job: Job, console: Console) -> None:
        self._job = job
        self._events = deque[Event](maxlen=SHOWN_EVENTS)
        self._losses, self._valid_losses = dict[int, float](), dict[int, float]()  # by step: an attempt repeats some
        self._total_steps: int | None = None
        self._step = 0
        self._tokens_per_second = 0.0
        self._trouble = ""
        self._live = Live(get_renderable=self._drawn, console=console, refresh_per_second=4)

    def __enter__(self) -> "Picture":
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def look(self, job: Job) -> None:
        self._job, self._trouble = job, ""

    def trouble(self, why: str) -> None:
        self._trouble = why

    def tell(self, event: Event) -> None:
        self._trouble, data = "", event["data"] or {}
        if "train_loss" in data:
            self._step, self._total_steps = data["step"], data["total_steps"]
            self._losses[self._step] = data["train_loss"]
            self._tokens_per_second = data["tokens_per_second"]
        elif "valid_loss" in data:
            self._valid_losses[data["step"]] = data["valid_loss"]
        else:
            self._events.append(event)

    def _drawn(self) -> RenderableType:
        return Group(*self._parts())

    def _parts(self) -> Iterator[RenderableType]:
        standing = standing_of(self._job), COLOURS.get(self._job["status"], "")
        yield Text.assemble((self._job["id"], "bold"), "  ", self._job["model"], "  ", standing)
        if self._total_steps:
            yield self._progress(self._total_steps)
        if self._losses:
            yield self._curves()
        for event in self._events:
            yield Text(f"{clock_time(event['created_at'])}  {event['message']}", STYLES.get(event["level"], "dim"))
        if self._trouble:
            yield Text(f"{self._trouble} Going on as soon as it does.", "yellow")

    def _progress(self, total: int) -> RenderableType:
        row = Table.grid(padding=(0, 1))
        words = f"step {self._step}/{total}  {self._step / total:4.0%}  {self._left()}"
        row.add_row(ProgressBar(total=total, completed=self._step, width=CURVE_WIDTH), words)
        return row

    def _left(self) -> str:
        ends_at = self._job["estimated_finish"]
        if self._job["status"] in OVER or not ends_at:
            return ""
        minutes, seconds = divmod(max(0, int(ends_at - time.time())), 60)
        return f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}"

    def _curves(self) -> RenderableType:
        rows = Table.grid(padding=(0, 1))
        for name, curve in (("loss", self._losses), ("validation", self._valid_losses)):
            if curve:
                values = [curve[step] for step in sorted(curve)]
                rows.add_row(name, sparkline(values, CURVE_WIDTH), f"{values[-1]:.4f}")
        rows.add_row("speed", f"{self._tokens_per_second:,.0f} tokens/s")
        return rows
