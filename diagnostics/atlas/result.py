"""A causal atlas: its table, statistics and figure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd
from typing_extensions import Self

from diagnostics.atlas.columns import COLUMNS
from diagnostics.atlas.depth import PLANS
from diagnostics.atlas.draws import draws_frame
from diagnostics.atlas.summary import NOTE, effects_frame, first_numbers, scores_frame, summaries, summary_frame
from diagnostics.atlas.work import PROMPTS
from diagnostics.figures.by_depth import DepthPlan
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.results.stored import Stored
from diagnostics.statistics.tables import of_saes
from interventions.errors import ResultError
from interventions.sites import Site

_SAME = ("model", "weights_sha256", "dtype", "sink_filter", "path_share", "steps", "samples", "placebo_share", "seed")


@dataclass(frozen=True)
class CausalAtlas(Result):
    """Exact effects of removing each active latent at each usable token, beside cheap scores.

    The table is stored in shards of eight prompts, `atlas/SAE-PART.parquet`; `atlas.json` repeats the schema.
    """

    NAME: ClassVar[str] = "atlas"
    TITLE: ClassVar[str] = "Causal atlas"
    QUESTION: ClassVar[str] = "What is the effect of removing each active latent, and which cheap score predicts it?"
    NOTE: ClassVar[str] = NOTE
    DEPTH: ClassVar[Mapping[str, DepthPlan]] = PLANS

    @classmethod
    def files(cls) -> tuple[str, ...]:
        """Names of the files of an atlas."""
        return (f"{cls.NAME}.json", "tokens.npy", cls.NAME)

    @classmethod
    def read(cls, stored: Stored) -> Self:
        """Build an atlas from its shards. Raises `ResultError` where some are missing."""
        p = stored.provenance
        frame = of_saes([stored.table(shard) for shard in stored.within(cls.NAME)], p["saes"])
        if len(frame) != p["rows"]:
            raise stored.damaged(cls.NAME, f"it holds {len(frame)} rows, {cls.NAME}.json says {p['rows']}")
        return cls(frame, stored.tokens(), p)

    def parts(self) -> dict[str, Any]:
        """The shards and the token ids by the names of their files."""
        shards = {}
        for number, name in enumerate(self.saes):
            own = self.frame.loc[self.frame.sae == name]
            for part, some in own.groupby(own.prompt // PROMPTS, sort=True):
                shards[f"{self.NAME}/{number:02d}-{part:05d}.parquet"] = some.reset_index(drop=True)
        return shards | {"tokens.npy": self.tokens}

    @classmethod
    def joined(cls, atlases: Sequence["CausalAtlas"]) -> "CausalAtlas":
        """Join atlases of several SAEs; some may have fewer of the same prompts. Where two SAEs have the same name, all names get their
        block: `15/cosine`.

        Raises `ResultError` where model, text or settings differ, or two SAEs still have the same name.
        """
        if not atlases:
            raise ResultError("no atlas to join; give at least one")
        longest = max(atlases, key=lambda atlas: len(atlas.tokens))
        tokens = longest.tokens
        first = {name: value for name, value in longest.provenance.items() if name not in ("command", "call")}
        for atlas in atlases:
            p = atlas.provenance
            if differ := [name for name in _SAME if p[name] != first[name]]:
                raise ResultError(
                    f"{differ[0]} is {first[differ[0]]} in one atlas, {p[differ[0]]} in another; join such as agree"
                )
            if atlas.tokens != tokens[: len(atlas.tokens)]:
                raise ResultError("the atlases are of other prompts; join such as begin with the same ones")
        if len({name for atlas in atlases for name in atlas.saes}) < sum(len(atlas.saes) for atlas in atlases):
            atlases = [atlas._with_blocks() for atlas in atlases]
        names = [name for atlas in atlases for name in atlas.saes]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ResultError(f"two SAEs have the name {twice[0]!r}; join atlases of different ones")
        every = [atlas.provenance for atlas in atlases]
        both: dict[str, Any] = {
            name: {key: value for p in every for key, value in p[name].items()} for name in ("saes", "atlas", "path")
        }
        both |= {
            "rows": sum(p["rows"] for p in every),
            "sites": list(dict.fromkeys(site for p in every for site in p["sites"])),
            "why_hooks": sorted({why for p in every for why in p["why_hooks"] or []}) or None,
            "replay_delta": max((p["replay_delta"] for p in every if p["replay_delta"] is not None), default=None),
            "chunks_halved": sum(p.get("chunks_halved", 0) for p in every),
            "joined": [{key: value for key, value in p.items() if value != first.get(key)} for p in every],
        }
        return cls(of_saes([atlas.frame for atlas in atlases], both["saes"]), tokens, first | both)

    def _with_blocks(self) -> "CausalAtlas":
        """A copy with each SAE's block before its name, where it is missing."""
        p = self.provenance
        blocks = {name: str(Site.parse(p["atlas"][name]["site"]).layer) for name in self.saes}
        new = {name: name if name.startswith(f"{n}/") else f"{n}/{name}" for name, n in blocks.items()}
        renamed = {part: {new[name]: value for name, value in p[part].items()} for part in ("saes", "atlas", "path")}
        return replace(
            self, frame=self.frame.assign(sae=self.frame.sae.cat.rename_categories(new)), provenance=p | renamed
        )

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of each SAE."""
        return summaries(self.frame, self.provenance)

    def as_dict(self) -> dict[str, Any]:
        """Summary, schema and provenance, as they stand in the JSON file."""
        return {"summary": self.groups, "columns": COLUMNS, "provenance": self.provenance}

    def summary(self) -> pd.DataFrame:
        """A line for each SAE and score: rank correlation with KL, recall, false negatives, with intervals."""
        return summary_frame(self.groups)

    def headlines(self) -> Iterable[Headline]:
        """For each SAE the ratio to its placebo, and the rank correlation of doses."""
        return first_numbers(self.groups)

    def plot(self) -> Any:
        """Predicted against exact effects, and how well each score ranks latents, by depth. Returns a matplotlib Figure."""
        from diagnostics.atlas.figures import plot_atlas

        return plot_atlas(self.frame, self.groups, self.provenance)

    def plot_draws(self) -> Any:
        """Rank correlation of the sampled Fisher form with KL by number of draws, up to the exact form. Returns a matplotlib Figure."""
        from diagnostics.atlas.figures import plot_draws

        return plot_draws(self.groups, self.provenance)

    def figures(self) -> dict[str, Any]:
        """The calibration figure, and rank correlation by number of draws."""
        found = {f"{self.NAME}_calibration": self.plot()}
        return found | ({f"{self.NAME}_draws": self.plot_draws()} if any(g.get("draws") for g in self.groups) else {})

    def tables(self) -> dict[str, pd.DataFrame]:
        """Effects of each SAE's latents, how well each score finds them, and the sampled Fisher form by number of draws."""
        found = {"effects": effects_frame(self.groups), "scores": scores_frame(self.groups)}
        return found | ({"draws": draws} if len(draws := draws_frame(self.groups)) else {})
