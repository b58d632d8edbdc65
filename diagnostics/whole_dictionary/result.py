"""The causal effects of a whole dictionary: rows, a line for each latent, figure."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast
from urllib.parse import quote, unquote

import pandas as pd
from typing_extensions import Self

from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.results.stored import Stored
from diagnostics.statistics.tables import lines_of, of_saes, with_ends
from diagnostics.whole_dictionary.columns import LATENTS, ROWS
from diagnostics.whole_dictionary.summary import NOTE, effects_frame, first_numbers, summaries, verdicts_frame

PART = 512
"""latents in a file of rows"""


@dataclass(frozen=True)
class DictionaryEffects(Result):
    """Exact effects of removing each latent of whole SAEs at up to a quota of tokens, each beside its placebo, and what they say of it.

    On disk: `latents.parquet`, a line for each latent; `rows/sae=NAME/part-….parquet`, a data set that any reader of partitioned
    Parquet takes, 512 latents a file; `dictionary_effects.json` repeats both schemas.
    """

    latents: pd.DataFrame
    """a line for each latent of each SAE: see `columns.LATENTS`"""
    NAME: ClassVar[str] = "dictionary_effects"
    TITLE: ClassVar[str] = "Effects of a whole dictionary"
    QUESTION: ClassVar[str] = "What does removing each latent of a dictionary do, and is it more than its dose?"
    NOTE: ClassVar[str] = NOTE

    @classmethod
    def files(cls) -> tuple[str, ...]:
        """Names of the files of a result of this class."""
        return (f"{cls.NAME}.json", "latents.parquet", "tokens.npy", "rows")

    @classmethod
    def read(cls, stored: Stored) -> Self:
        """Build a result from its files. Raises `ResultError` where some are missing."""
        p = stored.provenance
        parts = []
        for file in stored.within("rows"):
            name = unquote(file.split("/")[1].removeprefix("sae="))
            parts.append(stored.table(file).assign(sae=name))
        frame = whole_table(parts, p["saes"])
        if len(frame) != p["rows"]:
            raise stored.damaged("rows", f"it holds {len(frame)} rows, {cls.NAME}.json says {p['rows']}")
        return cls(frame, stored.tokens(), p, stored.table("latents.parquet"))

    def parts(self) -> dict[str, Any]:
        """Tables and token ids by the names of their files; names of SAEs as in a URL."""
        found: dict[str, Any] = {"latents.parquet": self.latents, "tokens.npy": self.tokens}
        for name in self.saes:
            own = lines_of(self.frame, sae=name).drop(columns="sae")
            for part, some in own.groupby(own.latent // PART, sort=True):
                found[f"rows/sae={quote(name, safe='')}/part-{part:05d}.parquet"] = some.reset_index(drop=True)
        return found

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of each SAE."""
        return summaries(self.frame, self.latents, self.provenance)

    def as_dict(self) -> dict[str, Any]:
        """Summary, schemas and provenance, as they stand in the JSON file."""
        return {"summary": self.groups, "columns": {"rows": ROWS, "latents": LATENTS}, "provenance": self.provenance}

    def summary(self) -> pd.DataFrame:
        """A line for each SAE: counts of verdicts, medians with intervals."""
        return pd.DataFrame(
            [with_ends({k: v for k, v in g.items() if k != "verdicts"} | g["verdicts"]) for g in self.groups]
        )

    def headlines(self) -> Iterable[Headline]:
        """For each SAE how many latents do more than their dose, and the typical ratio to a placebo."""
        return first_numbers(self.groups)

    def plot(self) -> Any:
        """KL ÷ placebo of each latent against how often it fires, by verdict. Returns a matplotlib Figure."""
        from diagnostics.whole_dictionary.figures import plot_latents

        return plot_latents(self.latents, self.groups, self.provenance)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Latents of each SAE by verdict; typical effects."""
        return {"verdicts": verdicts_frame(self.groups), "effects": effects_frame(self.groups)}


def whole_table(parts: list[pd.DataFrame], saes: Iterable[str]) -> pd.DataFrame:
    """One table, ordered by SAE, latent, prompt, position; names as categories."""
    frame = of_saes(parts, saes)
    frame = frame.sort_values(["sae", "latent", "prompt", "position"], kind="stable", ignore_index=True)
    return cast(pd.DataFrame, frame[list(ROWS)])
