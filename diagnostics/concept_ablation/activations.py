"""Clean activations of concepts' texts, the tokens that count, the measured positions, and probes of classes; each computed once."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from diagnostics.concept_ablation.class_probes import ClassProbes, fit_probes
from diagnostics.concept_ablation.concepts import Concept, ConceptTexts, mask
from diagnostics.sampling.tokens import hash_keys, token_filter
from interventions.models.causal_model import CausalModel
from interventions.recording import Recording, record
from interventions.sites import Site
from interventions.spliced import Passes, checked_path


@dataclass(frozen=True)
class ConceptSettings:
    """Settings of a feature ablation, the same for every concept and SAE."""

    counts: tuple[int, ...]
    arms: tuple[str, ...]
    rankings: tuple[str, ...]
    reads: int | None
    sink_filter: float | None
    seed: int
    batch_tokens: int | None
    path: str

    @property
    def n_changes(self) -> int:
        """Conditions at each N, and `keep` at N = 0."""
        return len(self.counts) * len(self.arms) + ("keep" in self.arms)


class ConceptActivations:
    """One data set's clean activations, which tokens count, and its probes."""

    def __init__(
        self, name: str, model: CausalModel, texts: ConceptTexts, sites: list[Site], settings: ConceptSettings
    ):
        self.name, self.texts, self.settings = name, texts, settings
        self.recording: Recording = record(model, texts.tokens, list(dict.fromkeys(sites)), keep_cache=False)
        self.device = self.recording.tokens.device
        length = self.recording.length.numpy()
        some = [self.recording.activations[site] for site in dict.fromkeys(sites)]
        found = token_filter(some, length, mask(texts), settings.sink_filter)
        self.left_out = found.left_out() | {"of": int(length.sum())}
        self.counted: Bool[ndarray, "text pos"] = found.usable
        self.counted_here = torch.from_numpy(self.counted).to(self.device)
        """on the device"""
        self.text, self.position = (part.to(self.device) for part in torch.from_numpy(self.counted).nonzero().T)
        """of each token that counts"""
        self._passes: dict[Site, tuple[Passes, str | None, float]] = {}
        self._probes: dict[Site, ClassProbes] = {}

    def x(self, site: Site) -> Float[Tensor, "row d_model"]:
        """Activations of the tokens that count, text after text."""
        return self.recording.activations[site][self.text, self.position]

    def passes(self, site: Site) -> tuple[Passes, str | None, float]:
        """Passes at a site, why the blocks above do not match full forward passes (None: they do), and the largest logit difference."""
        if site not in self._passes:
            passes = Passes(self.recording, site, self.counted_here)
            self._passes[site] = passes, *checked_path(passes, self.settings.path, stacklevel=3)
        return self._passes[site]

    def pooled(self, values: Float[Tensor, "row d_model"]) -> Float[ndarray, "text d_model"]:
        """Mean over each text's tokens that count; nan where it has none."""
        total = torch.zeros(len(self.counted), values.shape[1], dtype=torch.float64, device=values.device)
        total.index_add_(0, self.text.to(values.device), values.double())
        with np.errstate(invalid="ignore"):
            return total.cpu().numpy() / self.counted.sum(1)[:, None]

    def probes(self, site: Site) -> tuple[ClassProbes, Float[ndarray, "text label"]] | None:
        """Probes of the classes and their logits at each text's mean activation; None without classes."""
        if self.texts.labels is None:
            return None
        pooled = self.pooled(self.x(site))
        if site not in self._probes:
            known = np.asarray(self.counted.any(1))
            ranking = np.array(self.texts.ranking)
            labels = [label for label, k in zip(self.texts.labels, known, strict=True) if k]
            self._probes[site] = fit_probes(pooled[known], labels, ranking[known])
        return self._probes[site], self._probes[site].logits(pooled)

    def reads(self, concept: Concept) -> Bool[Tensor, "text pos"]:
        """Where effects are read: of the tokens that count, the concept's positions in its own texts, else some by seeded hash."""
        reads = np.zeros_like(self.counted)
        n_tokens = self.counted.shape[1]
        for i in (*concept.own, *concept.others):
            where = np.flatnonzero(self.counted[i])
            if concept.positions is not None and i in concept.positions:
                where = where[np.isin(where, concept.positions[i])]
            elif self.settings.reads is not None and len(where) > self.settings.reads:
                key = hash_keys(self.settings.seed, f"reads/{self.name}", i * n_tokens + where)
                where = where[np.argsort(key, kind="stable")[: self.settings.reads]]
            reads[i, where] = True
        return torch.from_numpy(reads).to(self.device)
