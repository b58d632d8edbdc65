"""Where files are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$MECHDIAG_CACHE`, or `mechdiag` under the user's cache directory."""
    if found := os.environ.get("MECHDIAG_CACHE"):  # empty: as if it were not set
        return Path(found)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechdiag"
