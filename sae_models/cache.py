"""Where files are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$MECHDIAG_CACHE`, or `mechdiag` under the user's cache directory."""
    if given := os.environ.get("MECHDIAG_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechdiag"
