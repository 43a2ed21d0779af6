"""Progress and results on the terminal: progress to stderr, results to stdout."""

import json
import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ltxlite.progress import Report


class SecondsPerStep(ProgressColumn):
    """Shows the mean seconds of a finished step."""

    def render(self, task: Task) -> Text:
        """Return "1.23 s/step", or nothing before the first step is done."""
        elapsed = task.finished_time or task.elapsed
        if not task.completed or elapsed is None:
            return Text("")
        return Text(f"{elapsed / task.completed:.2f} s/step")


class Terminal(Report):
    """Shows a run as one progress bar a part; as a context manager it owns the terminal."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.description:16}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            SecondsPerStep(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=quiet,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        if not self._quiet:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, part: str, steps: int) -> None:
        """Complete the last bar and begin the next."""
        self.finish()
        self._task = self._progress.add_task(part, total=steps)

    def advance(self, done: int) -> None:
        """Move the current bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=done)

    def finish(self) -> None:
        """Complete the last bar."""
        if self._task is not None:
            total = self._progress.tasks[self._task].total
            self._progress.update(self._task, completed=total)
            self._progress.stop_task(self._task)
        self._task = None


def print_result(text: str, values: dict[str, Any], as_json: bool) -> None:
    """Print a result: text for people, or one JSON object for machines."""
    line = json.dumps(values, ensure_ascii=False) if as_json else text
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
