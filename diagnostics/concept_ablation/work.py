"""Units of work of `feature_ablation`: one concept through one SAE, each condition at each N."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from diagnostics.concept_ablation.activations import ConceptActivations, ConceptSettings
from diagnostics.concept_ablation.class_probes import ClassProbes
from diagnostics.concept_ablation.concepts import Concept, ConceptTexts
from diagnostics.concept_ablation.conditions import Condition, directions, dose_matched
from diagnostics.concept_ablation.ranking import (
    Encoded,
    attribution,
    best,
    mean_difference,
    probe_difference,
    target_gradient,
)
from diagnostics.running.units import Tick, Unit
from interventions.errors import ReplayError, ResultError
from interventions.models.causal_model import CausalModel
from interventions.stream_effects import Change, StreamEffects, stream_effects
from sae_models.dictionaries import Dictionary


class AblationRunner:
    """Computes units, one data set's recording and one SAE's latents in memory at a time."""

    def __init__(
        self,
        model: CausalModel,
        texts: Mapping[str, ConceptTexts],
        dictionaries: list[Dictionary],
        settings: ConceptSettings,
    ):
        for dictionary in dictionaries:
            if dictionary.sae is None:
                raise ResultError(f"{dictionary.name!r} is no SAE; only latents of an SAE can be ablated")
        self.model, self.texts, self.settings = model, dict(texts), settings
        self.dictionaries = {d.name: d for d in dictionaries}
        self._data: ConceptActivations | None = None
        self._encoded: tuple[tuple[str, str], Encoded] | None = None

    def units(self) -> list[Unit]:
        """Data set by data set, SAE by SAE, so that all concepts share recordings and latents."""
        return [
            Unit.of(
                rows=self._cost(some, concept),
                group=(data, sae),
                data=data,
                sae=sae,
                concept=concept.name,
                ranking=ranking,
            )
            for data, some in self.texts.items()
            for sae in self.dictionaries
            for concept in some.concepts
            for ranking in self.settings.rankings
        ]

    def _cost(self, some: ConceptTexts, concept: Concept) -> int:
        return self.settings.n_changes * len(some.side((*concept.own, *concept.others), False))

    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        """One concept's lines, and what is to be said of them."""
        name, dictionary = unit["data"], self.dictionaries[unit["sae"]]
        if self._data is None or self._data.name != name:
            self._data = self._encoded = None  # before other activations are recorded
            self._data = ConceptActivations(
                name, self.model, self.texts[name], [p.site for p in self.dictionaries.values()], self.settings
            )
        data = self._data
        if self._encoded is None or self._encoded[0] != (name, dictionary.name):
            assert dictionary.sae is not None
            self._encoded = None
            self._encoded = ((name, dictionary.name), Encoded.of(dictionary.sae, data.x(dictionary.site)))
        concept = next(c for c in data.texts.concepts if c.name == unit["concept"])
        work = _Concept(data, concept, dictionary, self._encoded[1], self.settings)
        first = sum(len(some.tokens) for some in list(self.texts.values())[: list(self.texts).index(name)])
        return work.lines(unit, first, tick)


class _Concept:
    """One concept through one SAE."""

    def __init__(
        self,
        data: ConceptActivations,
        concept: Concept,
        dictionary: Dictionary,
        encoded: Encoded,
        settings: ConceptSettings,
    ):
        self.data, self.concept, self.dictionary, self.settings = data, concept, dictionary, settings
        self.encoded, self.reads = encoded, data.reads(concept)
        self.passes, self.why, self.path_delta = data.passes(dictionary.site)
        self.through_blocks = settings.path != "hooks" and self.why is None
        self.n_unformed = 0
        readable = self.reads.any(1).cpu().numpy()
        every = data.texts.side((*concept.own, *concept.others), False)
        self.measured = [i for i in every if readable[i]]
        self.n_unread = len(every) - len(self.measured)

    def rows(self, texts: list[int], at: Tensor | None = None) -> Bool[Tensor, "row"]:
        """The tokens that count of some texts; at: of these places alone."""
        chosen = torch.zeros(len(self.data.counted), dtype=torch.bool, device=self.data.device)
        chosen[texts] = True
        found = chosen[self.data.text]
        return found if at is None else found & at[self.data.text, self.data.position]

    def ranked(self, ranking: str) -> tuple[Tensor, Tensor, Tensor]:
        """Latents from the best on, those active on the concept's ranking texts, and their expected dose there."""
        concept, texts = self.concept, self.data.texts
        own_texts, other_texts = texts.side(concept.own, True), texts.side(concept.others, True)
        everywhere = self.rows(own_texts)
        present = self.rows(own_texts, self.reads) if concept.positions is not None else everywhere
        own, others = self.encoded.take(present), self.encoded.take(self.rows(other_texts))
        if ranking == "mean_difference":
            score = mean_difference(own, others)
        elif ranking == "probe":
            score = probe_difference(own, others, torch.from_numpy(self._class_probes().of(concept.name)))
        else:
            if not self.through_blocks:
                raise ReplayError(
                    "attribution runs the blocks above the site alone, which is not exact here; take another ranking"
                )
            order = sorted(own_texts)
            gradient = target_gradient(
                self.passes, order, self.reads, concept.targets, batch_tokens=self.settings.batch_tokens
            )
            score = attribution(self.encoded.take(everywhere), gradient)
        found = self.encoded.take(everywhere)
        active = found.frequency > 0
        return best(score, active), active, found.dose

    def _class_probes(self) -> ClassProbes:
        found = self.data.probes(self.dictionary.site)
        if found is None:
            raise ResultError(f"{self.data.name}: its texts have no classes, so no probe; take another ranking")
        return found[0]

    def conditions(self, ranking: str) -> dict[tuple[str, int], Condition]:
        """Each condition at each N, `keep` at 0 too; what one N is given does not depend on the others."""
        order, active, dose = self.ranked(ranking)
        if not len(order):
            raise ResultError(
                f"{self.dictionary.name}: no latent is active on the texts of {self.concept.name!r} that rank"
            )
        top = order[: self.settings.counts[-1]]
        label = f"{self.data.name}/{self.concept.name}/{self.dictionary.label}/{ranking}"
        towards = self._towards(label) if "placebo" in self.settings.arms else None
        self.notes = {
            "active": int(active.sum()),
            "top": top[:10].tolist(),
        }
        found = {("keep", 0): Condition("keep", top[:0])} if "keep" in self.settings.arms else {}
        for name in self.settings.arms:
            for n in self.settings.counts:
                which = top[:n]
                if name == "random":
                    which = dose_matched(which, dose, active, self.settings.seed, f"random/{label}")
                found[name, n] = Condition(name, which, towards if name == "placebo" else None)
        return found

    def _towards(self, label: str) -> Callable[[Tensor], Tensor]:
        """What the tokens of a measured text turn to, from tokens of the texts that rank: never its own."""
        sides = self.data.texts.ranking
        pool = self.encoded.x[self.rows([i for i, ranks in enumerate(sides) if ranks])]
        found = directions(len(sides), pool, self.settings.seed, f"between/{label}")
        return lambda keep: found[self.data.text[keep]]

    def change(self, condition: Condition) -> Change:
        def delta(texts: Tensor) -> Tensor:
            # Tokens stand in ascending order of text; the engine asks for them in its own.
            ascending, place = texts.sort()
            keep = self.rows(ascending.tolist())
            found, missing = condition.delta(self.encoded, keep)
            self.n_unformed += missing
            of = torch.searchsorted(ascending, self.data.text[keep])
            return found[place[of].argsort(stable=True)].to(self.data.device)

        return delta

    def lines(self, unit: Unit, first_text: int, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        """The table of this concept and SAE, and its notes."""
        conditions = self.conditions(unit["ranking"])
        key = {place: (c.name, *c.latents.tolist()) for place, c in conditions.items()}
        # Where fewer latents than N are active, N repeats a smaller N.
        distinct = {key[place]: c for place, c in conditions.items()}
        found = stream_effects(
            self.passes,
            self.measured,
            self.reads,
            {f"{c.name} {i}": self.change(c) for i, c in enumerate(distinct.values())},
            self.concept.targets,
            through_blocks=self.through_blocks,
            batch_tokens=self.settings.batch_tokens,
            tick=tick,
        )
        tick((len(conditions) - len(distinct)) * len(self.measured))
        columns_of = dict(zip(distinct, self._columns(found), strict=True))
        site = self.dictionary.site
        keys = {"sae": unit["sae"], "layer": site.layer, "point": site.point, "data": unit["data"]}
        keys |= {"concept": self.concept.name, "ranking": unit["ranking"]}
        frames = [
            pd.DataFrame(
                {
                    **keys,
                    "arm": name,
                    "count": n,
                    "n_latents": len(condition.latents),
                    **columns,
                    **{place: columns[place] + first_text for place in ("text", "group")},
                }
            )
            for (name, n), condition in conditions.items()
            for columns in [columns_of[key[name, n]]]
        ]
        notes = {
            "site": str(site),
            "path": "blocks" if self.through_blocks else "hooks",
            "why_hooks": self.why,
            "replay_delta": self.path_delta,
            "chunks_halved": 0,
            "texts_passed": found.passed,
            "texts_untouched": found.untouched,
            "dropped": {
                "texts without a token to read at": self.n_unread,
                "placebos that do not exist: nothing is left of x, or the two tokens they turn to are alike": self.n_unformed,
                "reads whose effect is not finite": found.n_nonfinite,
            },
            "tokens_left_out": self.data.left_out,
            "probe_accuracy": {} if self.data.texts.labels is None else self._class_probes().accuracy,
            "latents": self.notes,
        }
        return pd.concat(frames, ignore_index=True), notes

    def _columns(self, found: StreamEffects) -> Iterator[dict[str, Any]]:
        """Columns of each change, text by text."""
        measured = np.array(self.measured)
        n_tokens = self.data.counted[measured].sum(1)
        fixed = {
            "text": measured,
            "group": np.array(self.data.texts.groups)[measured],
            "own": np.isin(measured, self.concept.own),
            "n_tokens": n_tokens,
        }
        for i in range(len(found.kl)):
            n_edited = found.n_edited[i].numpy()
            shift, norm_sum = found.shift[i].numpy(), found.norm_sum[i].numpy()
            with np.errstate(invalid="ignore"):
                coherence = np.linalg.norm(shift, axis=1) / norm_sum
            yield fixed | {
                "n_edited": n_edited,
                "n_reads": found.n_reads[i].numpy(),
                "delta_norm": norm_sum / np.maximum(n_edited, 1),
                "coherence": coherence,
                "delta_square": found.square_sum[i].numpy() / n_tokens,
                "kl": found.kl[i].numpy(),
                "target_fall": found.target_fall[i].numpy(),
                "other_square": found.other_square[i].numpy(),
                **self._probe_columns(measured, shift / n_tokens[:, None]),
            }

    def _probe_columns(self, measured: ndarray, shift: Float[ndarray, "text d_model"]) -> dict[str, ndarray]:
        known = self.data.probes(self.dictionary.site)
        if known is None:
            return dict.fromkeys(("class_probe_clean", "class_probe"), np.full(len(measured), np.nan))
        probes, clean = known
        assert self.data.texts.labels is not None
        own = np.array([probes.classes.index(self.data.texts.labels[i]) for i in measured])
        after, each = clean[measured] + shift @ probes.weight.T, np.arange(len(measured))
        return {"class_probe_clean": clean[measured][each, own], "class_probe": after[each, own]}
