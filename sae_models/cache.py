"""Where files are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$MECHDIAG_CACHE`, or `mechdiag` under the user's cache directory."""
    if "MECHDIAG_CACHE" in os.environ:
        return Path(os.environ["MECHDIAG_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechdiag"
