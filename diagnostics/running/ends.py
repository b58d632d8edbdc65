"""How units of work may end before there is a result: interrupted, or a part of them done."""

from collections.abc import Mapping
from pathlib import Path


class Interrupted(KeyboardInterrupt):
    """An interruption while units ran. Those done are in the folder; without one nothing of them is left."""

    def __init__(self, kept: int, total: int, folder: Path | None):
        super().__init__(kept, total, folder)
        self.kept, self.total, self.folder = kept, total, folder

    def __str__(self) -> str:
        if self.folder is None:
            return "interrupted"
        return (
            f"interrupted: {self.kept} of {self.total} units are kept in {self.folder}; "
            "the same command goes on from there"
        )


class PartDone(SystemExit):
    """A part of the units is kept (see `workers`), and others are missing: no result yet. A script ends here, with status 0."""

    def __init__(self, part: tuple[int, int], kept: int, missing: dict[str, int], folder: Path):
        super().__init__(0)
        self.part, self.kept, self.missing, self.folder = part, kept, missing, folder

    def __str__(self) -> str:
        i, n = self.part
        return (
            f"part {i}/{n}: {self.kept} units are kept in {self.folder}; {said_missing(self.missing)}. "
            "When all are done, the same command without --part joins them"
        )


def said_missing(missing: Mapping[str, int]) -> str:
    """What each part lacks, in words."""
    return ", ".join(f"part {part} lacks {n} unit{'s' * (n > 1)}" for part, n in missing.items())
