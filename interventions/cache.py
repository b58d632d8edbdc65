"""Where files are kept between runs, and how a folder there comes to be: whole or not at all, by one process at a time."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import FileLock

from interventions.errors import MechdiagError, one_line

_PARTIAL = ".partial-"


def cache_folder() -> Path:
    """`$MECHDIAG_CACHE`, or `mechdiag` under the user's cache directory."""
    if given := os.environ.get("MECHDIAG_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechdiag"


@contextmanager
def making(folder: Path, error: type[MechdiagError]) -> Iterator[Path]:
    """A new folder beside `folder`, to be filled and renamed by whoever holds `folder`'s lock; removed in the end if it is still there.

    What processes that were killed left behind is removed first. Raises `error` where files cannot be written or locked.
    """
    lock = FileLock(folder.with_suffix(".lock"))
    partial = folder.with_name(f"{folder.name}{_PARTIAL}{uuid4().hex[:8]}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            for left in folder.parent.glob(f"{folder.name}{_PARTIAL}*"):
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()  # not a temporary folder, which nobody else could read
            try:
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, NotImplementedError) as reason:
        raise error(
            f"cannot write {folder} ({one_line(reason)}); free space there, ask for permission, or set MECHDIAG_CACHE to another folder"
        ) from reason
