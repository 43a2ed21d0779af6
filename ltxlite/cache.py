"""Where ltxlite keeps what it can make again: XDG_CACHE_HOME, LOCALAPPDATA or ~/.cache."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the user's cache folder of ltxlite; it may not exist yet."""
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        value = os.environ.get(variable)
        if value:
            return Path(value) / "ltxlite"
    return Path.home() / ".cache" / "ltxlite"
