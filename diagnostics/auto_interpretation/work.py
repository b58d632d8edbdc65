"""Units of work: a latent explained by the judges, then its held-out snippets scored."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch

from diagnostics.auto_interpretation.judges import Judge, explanation_of, scores_of
from diagnostics.auto_interpretation.snippets import Snippets, window
from diagnostics.running.text_latents import Asked, TextLatents, ask_latents, held_out_prompts, read_latents
from diagnostics.running.units import Tick, Unit, UnitResult
from diagnostics.sampling.tokens import hash_keys
from interventions.direct_logits import token_text
from interventions.errors import ResultError
from interventions.models.causal_model import CausalModel
from interventions.texts.prompts import Prompts
from sae_models.dictionaries import Dictionary

OF = ("own", "shuffled")
"""The latent's own explanation; a control: that of another latent of the same SAE."""
_KEYS = ("sae", "latent", "polarity", "judge")
SNIPPETS = (*_KEYS, "of", "prompt", "position", "active", "score")
EXPLANATIONS = (*_KEYS, "explanation", "examples")


@dataclass(frozen=True)
class JudgingSettings:
    """What a run's numbers depend on, beside the judges."""

    top: int
    more: int
    snippets: int
    width: int
    min_active: int
    test_share: float
    sink_filter: float | None
    seed: int


@dataclass(frozen=True, eq=False)
class _Text:
    latents: TextLatents
    asked: list[Asked]
    said: dict[str, Any]
    partner: list[int]
    """of each asked latent: the place of the one whose explanation is its control"""


class JudgingRunner:
    """Computes units; the text is read when first asked for."""

    def __init__(
        self, model: CausalModel, prompts: Prompts, dictionaries: Sequence[Dictionary], latents: int | list[int],
        settings: JudgingSettings, judges: Mapping[str, Judge],
    ):  # fmt: skip
        self.model, self.prompts, self.settings, self.latents = model, prompts, settings, latents
        self.dictionaries, self.judges = {d.name: d for d in dictionaries}, dict(judges)
        self.length = np.array([len(tokens) for tokens in prompts.tokens])
        self.test = held_out_prompts(len(self.length), settings.test_share, settings.seed)
        self.explanations: dict[tuple[str, int, int, str], Any] = {}
        """by SAE, latent, polarity and judge: set between the two parts"""

    @cached_property
    def texts(self) -> dict[str, _Text]:
        s, found = self.settings, {}
        for name, text in read_latents(
            self.model, self.prompts, list(self.dictionaries.values()), s.sink_filter
        ).items():
            d = self.dictionaries[name]
            asked, said = ask_latents(text, ~self.test[text.prompt], d, self.latents, s.min_active, s.seed)
            if len(asked) < 2:
                raise ResultError(
                    f"one latent of {name}; its control is another one's explanation: ask for two or more"
                )
            order = np.argsort(hash_keys(s.seed, f"shuffled/{d.label}", np.arange(len(asked))), kind="stable")
            partner = np.empty(len(asked), dtype=int)
            partner[order] = np.roll(order, -1)
            found[name] = _Text(text, asked, said | {"unusable tokens": text.left_out}, partner.tolist())
        return found

    def units(self, part: str) -> list[Unit]:
        """Those of a part: `explain`, then `score`."""
        return [
            Unit.of(group=("", name, asked.name), part=part, sae=name, latent=asked.latent, polarity=asked.polarity)
            for name, text in self.texts.items()
            for asked in text.asked
        ]

    def explain(self, unit: Unit, judge: str, explanation: str) -> None:
        """Take the JSON that a unit of the first part gave."""
        self.explanations[unit["sae"], unit["latent"], unit["polarity"], judge] = json.loads(explanation)

    def prepare(self, stage: str) -> None:
        """Form what all units share."""
        assert self.texts

    @torch.no_grad()
    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        text = self.texts[unit["sae"]]
        place = [(a.latent, a.polarity) for a in text.asked].index((unit["latent"], unit["polarity"]))
        s, label = self.settings, self.dictionaries[unit["sae"]].label
        own = Snippets(
            text.latents, self.test[text.latents.prompt], text.asked[place], self.length, s.width, s.seed, label
        )
        keys = {"sae": unit["sae"], "latent": unit["latent"], "polarity": unit["polarity"]}
        return self._explained(own, keys) if unit["part"] == "explain" else self._scored(own, keys, text, place)

    def _explained(self, own: Snippets, keys: dict[str, Any]) -> tuple[pd.DataFrame, dict[str, Any]]:
        examples = []
        for t in own.examples(self.settings.top, self.settings.more).tolist():
            prompt, position = int(own.text.prompt[t]), int(own.text.position[t])
            run = window(position, int(self.length[prompt]), self.settings.width)
            examples.append({"tokens": self._words(prompt, run), "activations": own.at[prompt, run].tolist()})
        lines = [
            keys | {"judge": name, "explanation": json.dumps(explanation_of(judge, name, examples), ensure_ascii=False)}
            for name, judge in self.judges.items()
        ]
        return pd.DataFrame(lines).assign(examples=len(examples)), {}

    def _scored(
        self, own: Snippets, keys: dict[str, Any], text: _Text, place: int
    ) -> tuple[pd.DataFrame, dict[str, Any]]:
        found, matched = own.held_out(self.settings.snippets)
        shown = [
            self._words(s.prompt, window(s.position, int(self.length[s.prompt]), self.settings.width)) for s in found
        ]
        lines = []
        for of, asked in zip(OF, (text.asked[place], text.asked[text.partner[place]]), strict=True):
            for name, judge in self.judges.items():
                explanation = self.explanations[keys["sae"], asked.latent, asked.polarity, name]
                scores = scores_of(judge, name, explanation, shown)
                lines += [
                    keys
                    | {
                        "judge": name,
                        "of": of,
                        "prompt": s.prompt,
                        "position": s.position,
                        "active": s.active,
                        "score": score,
                    }
                    for s, score in zip(found, scores, strict=True)
                ]
        return pd.DataFrame(lines), {"drawn": text.said, "unmatched": int(not matched)}

    def _words(self, prompt: int, run: slice) -> list[str]:
        """Tokens as judges read them."""
        return [token_text(t, self.model.tokenizer) for t in self.prompts.tokens[prompt][run]]

    def about(self) -> pd.DataFrame:
        """A line for each latent asked: its bin, weight, frequency, alignment <w, d> and the cosine of w and d (nan without encoder rows)."""
        lines = []
        for name, text in self.texts.items():
            d = self.dictionaries[name]
            if d.rows is None:
                inner = cosine = np.full(len(d), np.nan)
            else:
                w, v = d.rows.double(), d.directions.double()
                dot = (w * v).sum(-1)
                inner = dot.cpu().numpy()
                cosine = (dot / (w.norm(dim=-1) * v.norm(dim=-1)).clamp(min=1e-30)).cpu().numpy()
            for a, partner in zip(text.asked, text.partner, strict=True):
                lines.append(
                    {"sae": name, "layer": d.site.layer, "point": d.site.point, "latent": a.latent, "polarity": a.polarity, "bin": a.bin,
                     "weight": a.weight, "frequency": a.frequency, "alignment": float(inner[a.latent]),
                     "alignment_cosine": float(cosine[a.latent]), "shuffled_with": text.asked[partner].name}
                )  # fmt: skip
        return pd.DataFrame(lines)


def joined(done: Sequence[UnitResult]) -> dict[str, Any]:
    """The notes of scoring units as one."""
    drawn: dict[str, Any] = {}
    for one in done:
        drawn.setdefault(one.unit["sae"], dict(one.notes["drawn"]) | {"unmatched": 0})["unmatched"] += one.notes[
            "unmatched"
        ]
    return {"drawn": drawn}
