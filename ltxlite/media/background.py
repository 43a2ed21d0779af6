"""One thread that works while the caller makes the next piece."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

WAITING_CALLS = 2


class Background:
    """Runs calls one after the other on a second thread, with at most two of them under way.

    The bound holds memory: a third call waits, in the caller's thread, until the first is done.
    An error in a call is raised to the caller by the next `submit` or by `finish`.
    Leaving the `with` block by an error drops the calls not begun and waits for the running one.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ltxlite-media")
        self._under_way: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, call: Callable[[], None]) -> None:
        """Queue one call, waiting while two are under way; raise what an earlier one raised."""
        while len(self._under_way) >= WAITING_CALLS:
            self._under_way.popleft().result()
        self._under_way.append(self._pool.submit(call))

    def finish(self) -> None:
        """Wait for all calls; raise the first error among them."""
        while self._under_way:
            self._under_way.popleft().result()
