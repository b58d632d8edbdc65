"""A unit of work: the patterns of one polarity of a latent, their precision and recall, baselines and a random direction beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from diagnostics.running.notes import summed
from diagnostics.running.text_latents import Asked, TextLatents, ask_latents, held_out_prompts, read_latents
from diagnostics.running.units import Tick, Unit, UnitResult, narrowed
from diagnostics.sampling.latents import from_strata
from diagnostics.sampling.tokens import generator, hash_keys
from diagnostics.statistics.tables import lines_of
from diagnostics.token_patterns.fitting import Example, ModelProbe, Read, fit_patterns
from diagnostics.token_patterns.tries import ANY, Pattern, best_tokens, matches, padded, trie_of
from interventions.direct_logits import token_text
from interventions.models.causal_model import CausalModel
from interventions.texts.prompts import Prompts
from sae_models.dictionaries import Dictionary

OF = ("latent", "random")
"""The latent; a control: relu(x·r − θ) of a random direction r, isotropic, θ such that it is active at as many fitting tokens."""
KINDS = ("trie", "one", "tokens_seen", "tokens_best", "one_token")
"""trie: all patterns. one: that of largest F1 on the fitting text. tokens_seen, tokens_best: single current tokens, as many as the trie has
patterns: those most frequent among the same examples, and the set of largest F1 on the fitting text. one_token: the best single one."""
PREDICTED_BY = {
    "trie": "all patterns (N2G)", "one": "best pattern", "tokens_seen": "tokens of its examples", "tokens_best": "best set of tokens",
    "one_token": "best token",
}  # fmt: skip
_KEYS = ("sae", "latent", "polarity", "of")
COUNTS = ("tp", "predicted", "active")
FIRST = (
    *("sae", "layer", "point", "latent", "polarity", "bin", "weight", "frequency", "of", "kind", "entries", "examples", "no_suffix", "no_token"),
    *(f"fit_{name}" for name in COUNTS), *COUNTS, "strong_tp", "strong", "precision", "recall", "f1",
)  # fmt: skip
PATTERNS = (*_KEYS, "pattern", "text", "examples", *(f"fit_{name}" for name in COUNTS), *COUNTS)
HELD_OUT = (*_KEYS, "kind", "prompt", *COUNTS)
TABLES = {"fits": FIRST, "patterns": PATTERNS, "held_out": HELD_OUT}
_WHOLE = (
    "layer", "latent", "polarity", "bin", "entries", "examples", "no_suffix", "no_token", "strong_tp", "strong", "prompt",
    *COUNTS, *(f"fit_{name}" for name in COUNTS),
)  # fmt: skip
STRONG = 0.5
"""Tokens of at least this share of the largest |z| on the fitting text are strong."""


@dataclass(frozen=True)
class PatternSettings:
    """What a run's numbers depend on."""

    examples: int
    longest: int
    min_active: int
    test_share: float
    pad: int
    sink_filter: float | None
    seed: int


@dataclass(frozen=True, eq=False)
class _Text:
    """One SAE's latents on the text, and the latents asked for."""

    latents: TextLatents
    test: Bool[ndarray, "token"]
    asked: list[Asked]
    said: dict[str, Any]
    rows: Float[Tensor, "asked d_model"]
    """random directions, one for each that was asked for"""

    def token(self, prompt: Bool[ndarray, "prompt pos"]) -> Bool[ndarray, "token"]:
        """A mask of the text as one of the usable tokens."""
        return prompt[self.latents.prompt, self.latents.position]


class PatternRunner:
    """Computes units; the text is read when first asked for."""

    def __init__(
        self, model: CausalModel, prompts: Prompts, dictionaries: Sequence[Dictionary], latents: int | list[int],
        settings: PatternSettings,
    ):  # fmt: skip
        self.model, self.prompts, self.settings, self.latents = model, prompts, settings, latents
        self.dictionaries = {d.name: d for d in dictionaries}
        self.tokens = padded(prompts.tokens)
        self.test = held_out_prompts(len(prompts.tokens), settings.test_share, settings.seed)

    @cached_property
    def texts(self) -> dict[str, _Text]:
        s, many = self.settings, self.latents if isinstance(self.latents, int) else 2 * len(self.latents)
        rows = {
            name: torch.randn(many, self.model.d_model, generator=generator(s.seed, "random directions", d.label))
            for name, d in self.dictionaries.items()
        }
        read = read_latents(self.model, self.prompts, list(self.dictionaries.values()), s.sink_filter, rows)
        found = {}
        for name, text in read.items():
            test = self.test[text.prompt]
            asked, said = ask_latents(text, ~test, self.dictionaries[name], self.latents, s.min_active, s.seed)
            found[name] = _Text(text, test, asked, said | {"unusable tokens": text.left_out}, rows[name])
        return found

    def units(self) -> list[Unit]:
        return [
            Unit.of(group=("", name, asked.name), sae=name, latent=asked.latent, polarity=asked.polarity)
            for name, text in self.texts.items()
            for asked in text.asked
        ]

    def prepare(self, stage: str) -> None:
        """Form what all units share."""
        assert self.texts

    @torch.no_grad()
    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        d, text = self.dictionaries[unit["sae"]], self.texts[unit["sae"]]
        place = [(a.latent, a.polarity) for a in text.asked].index((unit["latent"], unit["polarity"]))
        asked = text.asked[place]
        tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
        passes = tokens = 0
        for of in OF:
            z, read = self._activation(d, text, place) if of == "latent" else self._random(text, place)
            probe = ModelProbe(self.model, d.site, read)
            keys = {"sae": d.name, "latent": asked.latent, "polarity": asked.polarity, "of": of}
            own = _Measured(self, text, np.maximum(z, 0), probe, f"{d.label}/{asked.name}/{of}")
            about = {
                "layer": d.site.layer,
                "point": d.site.point,
                "bin": asked.bin,
                "weight": asked.weight,
                "frequency": asked.frequency,
            }
            for name, lines in own.tables().items():
                tables[name] += [keys | (about if name == "fits" else {}) | line for line in lines]
            passes, tokens = passes + probe.passes, tokens + probe.tokens
        frame = pd.concat([pd.DataFrame(lines).assign(table=name) for name, lines in tables.items() if lines])
        notes = {"drawn": text.said, "probing": {"forward_passes": passes, "tokens": tokens}}
        return narrowed(_filled(frame.reset_index(drop=True))), notes

    def _activation(self, d: Dictionary, text: _Text, place: int) -> tuple[ndarray, Read]:
        """A latent's activation at every usable token, and as a function of x; positive where it has the polarity asked for."""
        asked = text.asked[place]

        def read(x: Tensor) -> Tensor:
            return asked.polarity * d.activation(x, torch.full((len(x),), asked.latent, device=d.directions.device))[0]

        return asked.polarity * text.latents.of(asked.latent), read

    def _random(self, text: _Text, place: int) -> tuple[ndarray, Read]:
        """The same of its random direction."""
        r, z, fit = text.rows[place], text.latents.readings[:, place].astype(float), ~text.test
        limit = float(-np.sort(-z[fit])[round(text.asked[place].frequency * int(fit.sum()))])
        return z - limit, lambda x: x.to(r.dtype) @ r.to(x.device) - limit


def _filled(frame: pd.DataFrame) -> pd.DataFrame:
    """One table of several: cells that a line has no use for are 0 or empty; shares that are undefined stay so."""
    own = ("precision", "recall", "f1")
    return frame.fillna({name: "" if frame[name].dtype.kind not in "biuf" else 0 for name in frame if name not in own})


def split(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables of all units."""
    found = {}
    for name, columns in TABLES.items():
        lines = lines_of(frame, table=name).reindex(columns=list(columns)).reset_index(drop=True)
        found[name] = lines.astype({c: "int32" for c in columns if c in _WHOLE})
    return found


def joined(done: Sequence[UnitResult]) -> dict[str, Any]:
    """The units' notes as one."""
    drawn: dict[str, Any] = {}
    for one in done:
        drawn.setdefault(one.unit["sae"], one.notes["drawn"])
    return {"drawn": drawn, "probing": summed(one.notes["probing"] for one in done)}


class _Measured:
    """Patterns and baselines of one activation, and what they predict."""

    def __init__(self, runner: PatternRunner, text: _Text, z: Float[ndarray, "token"], probe: ModelProbe, label: str):
        self.runner, self.text, self.z, self.probe, self.label = runner, text, z, probe, label
        self.active = z > 0
        self.id = runner.tokens[text.latents.prompt, text.latents.position]

    def examples(self) -> list[Example]:
        """Fitting tokens at which it is active, in equal numbers from quarters of z; one of a prompt where there are enough prompts."""
        s, text = self.runner.settings, self.text.latents
        token = np.flatnonzero(self.active & ~self.text.test)
        key = hash_keys(s.seed, f"examples/{self.label}", text.prompt[token], text.position[token])
        order = np.argsort(key, kind="stable")
        _, first = np.unique(text.prompt[token[order]], return_index=True)
        some = order[first] if len(first) >= s.examples else order
        token, key = token[some], key[some]
        quarter = np.argsort(np.argsort(self.z[token], kind="stable"), kind="stable") * 4 // max(1, len(token))
        token = token[from_strata(quarter, key, s.examples).index]
        prompts = self.runner.prompts
        found = []
        for t in token.tolist():
            p, last = int(text.prompt[t]), int(text.position[t]) + 1
            special = prompts.special[p][0]
            lead = prompts.tokens[p][0] if special else s.pad
            found.append(Example(tuple(prompts.tokens[p][int(special) : last]), float(self.z[t]), lead))
        return found

    def tables(self) -> Mapping[str, list[dict[str, Any]]]:
        """Lines of each table of `TABLES`, without the keys."""
        s, tokens = self.runner.settings, self.runner.tokens
        examples = self.examples()
        fitted = fit_patterns(examples, self.probe, s.pad, s.longest)
        patterns = list(fitted.patterns)
        where = [self.text.token(matches(trie_of([p]), tokens)) for p in patterns]
        lines = []
        for pattern, here in zip(patterns, where, strict=True):
            words = [self._said(token) for token in pattern[::-1]]
            line = {"pattern": " ".join("*" if t == ANY else str(t) for t in pattern[::-1]), "text": "".join(words)}
            lines.append(line | {"examples": fitted.patterns[pattern]} | self._counts(here))
        fits, held_out = [], []
        about = {"examples": len(examples), "no_suffix": fitted.no_suffix, "no_token": fitted.no_token}
        z = self.z * ~self.text.test
        strong = self.text.test & (self.z >= STRONG * z.max())
        for kind, (entries, here) in self._predictions(patterns, where, lines, examples).items():
            line = {"kind": kind, "entries": entries, **about, **self._counts(here)}
            line |= {"strong_tp": int((here & strong).sum()), "strong": int(strong.sum())}
            fits.append(line | scores(*(line[name] for name in COUNTS)))
            held_out += [{"kind": kind} | some for some in self._by_prompt(here)]
        return {"fits": fits, "patterns": lines, "held_out": held_out}

    def _predictions(
        self, patterns: list[Pattern], where: list[ndarray], lines: list[dict[str, Any]], examples: list[Example]
    ) -> dict[str, tuple[int, Bool[ndarray, "token"]]]:
        """Of each of `KINDS`: how many entries it has, and at which tokens it says active."""
        trie = (
            self.text.token(matches(trie_of(patterns), self.runner.tokens)) if patterns else np.zeros_like(self.active)
        )
        f1 = [scores(*(line[f"fit_{name}"] for name in COUNTS))["f1"] for line in lines]
        one = where[int(np.argmax(f1))] if f1 else np.zeros_like(self.active)
        seen, count = np.unique([e.tokens[-1] for e in examples], return_counts=True)
        often = seen[np.argsort(-count, kind="stable")][: len(patterns)]
        fit = ~self.text.test
        known, at = np.unique(self.id[fit], return_inverse=True)
        hits = np.bincount(at, weights=self.active[fit], minlength=len(known)).astype(int)
        best = {m: known[best_tokens(hits, np.bincount(at), int(hits.sum()), m)] for m in (len(patterns), 1)}
        sets = {"tokens_seen": often, "tokens_best": best[len(patterns)], "one_token": best[1]}
        return {
            "trie": (len(patterns), trie), "one": (min(1, len(patterns)), one),
            **{kind: (len(some), np.isin(self.id, some)) for kind, some in sets.items()},
        }  # fmt: skip

    def _counts(self, here: Bool[ndarray, "token"]) -> dict[str, int]:
        found = {}
        for prefix, side in (("fit_", ~self.text.test), ("", self.text.test)):
            values = (here & self.active, here, self.active)
            found |= {f"{prefix}{name}": int((v & side).sum()) for name, v in zip(COUNTS, values, strict=True)}
        return found

    def _by_prompt(self, here: Bool[ndarray, "token"]) -> list[dict[str, int]]:
        """Counts of each held-out prompt in which something is predicted or active."""
        prompt, test = self.text.latents.prompt, self.text.test
        n = len(self.runner.prompts.tokens)
        values = (here & self.active, here, self.active)
        counts = np.stack([np.bincount(prompt[v & test], minlength=n) for v in values])
        return [
            {"prompt": int(p)} | {name: int(c) for name, c in zip(COUNTS, counts[:, p], strict=True)}
            for p in np.flatnonzero(counts.any(0))
        ]

    def _said(self, token: int) -> str:
        """A token as patterns show it; `[*]` for any."""
        return "[*]" if token == ANY else token_text(token, self.runner.model.tokenizer)


def scores(tp: float, predicted: float, active: float) -> dict[str, float]:
    """Precision tp/predicted (nan where nothing is predicted), recall tp/active, F1 2·tp/(predicted + active)."""
    return {
        "precision": tp / predicted if predicted else np.nan,
        "recall": tp / active if active else np.nan,
        "f1": 2 * tp / (predicted + active) if predicted + active else np.nan,
    }
