"""What results of edits of single latents share: SAEs by name, and their statistics as a table."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from diagnostics.results import Result


@dataclass(frozen=True)
class LatentResult(Result):
    """A table with a line for each edit, of SAEs by name. A diagnostic adds `groups` and `plot`."""

    @property
    def saes(self) -> list[str]:
        """Names of the SAEs, in the order in which they were given."""
        return list(self.provenance["saes"])

    def summary(self) -> pd.DataFrame:
        """One row a group (see `groups`), estimates with their intervals as text."""
        return pd.DataFrame([{k: str(v) if hasattr(v, "se") else v for k, v in g.items()} for g in self.groups])

    def table(self) -> str:
        """The summary as text, for a terminal, with what was dropped and what served in place of replay."""
        p = self.provenance
        said = {"rows dropped": p["rows_dropped"], "full forward passes": p["why_hooks"]}
        left = [f"{what}: {which}" for what, which in said.items() if which]
        return "\n".join([self.summary().to_string(index=False), self.NOTE, *left])

    def plot(self) -> Any:
        """Returns a matplotlib Figure."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """The figure of `plot`."""
        return {self.NAME: self.plot()}
