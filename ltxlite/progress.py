"""How a run tells its caller what it is doing, and how long each part took."""

import time


class Report:
    """What a caller may override to follow a run; the default tells nobody."""

    def note(self, text: str) -> None:
        """Take a line that the user should read."""

    def begin(self, part: str, steps: int) -> None:
        """Learn that a part of the work, `steps` steps long, begins; the one before has ended."""

    def advance(self, done: int) -> None:
        """Learn that `done` steps of the current part are finished."""

    def finish(self) -> None:
        """Learn that the last part has ended."""


class Clock:
    """Passes progress on and keeps the seconds that each part took."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.seconds: dict[str, float] = {}
        self._part: str | None = None
        self._since = 0.0

    def begin(self, part: str, steps: int) -> None:
        """End the current part and begin another."""
        self._end()
        self._part, self._since = part, time.perf_counter()
        self.report.begin(part, steps)

    def advance(self, done: int) -> None:
        """Pass on that `done` steps of the part are finished."""
        self.report.advance(done)

    def note(self, text: str) -> None:
        """Pass on a line for the user."""
        self.report.note(text)

    def finish(self) -> dict[str, float]:
        """End the last part; return all seconds by part, in order."""
        self._end()
        self.report.finish()
        return self.seconds

    def _end(self) -> None:
        if self._part is not None:
            elapsed = time.perf_counter() - self._since
            self.seconds[self._part] = self.seconds.get(self._part, 0.0) + elapsed
        self._part = None
