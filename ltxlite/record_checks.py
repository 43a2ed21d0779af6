"""Checks that records of a job share; each raises RequestError in one line."""

from ltxlite.errors import RequestError


def check_share(what: str, value: float) -> None:
    """Refuse what is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise RequestError(f"{what} is {value}, wanted 0 to 1")


def check_path(what: str, path: str) -> None:
    """Refuse a file without a name."""
    if not path:
        raise RequestError(f"{what.split()[0]}: no file name")


def check_stages(what: str, stages: tuple[int, ...]) -> None:
    """Refuse what is no list of stages, which count from 1."""
    if not stages or min(stages) < 1 or len(set(stages)) < len(stages):
        raise RequestError(f"{what}: stages are {stages}, wanted numbers from 1, each once")


def check_start(what: str, start: float) -> None:
    """Refuse what is no second of a file."""
    if not 0 <= start <= 1 << 20:
        raise RequestError(f"{what}: starts at {start} s, wanted 0 or more")
