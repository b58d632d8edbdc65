"""Cards of latents: where a latent fires, the logits of its direction, the effect of removing it, and similar latents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray

from diagnostics import statistics
from diagnostics.cards.atlas_rows import Atlas, AtlasRows, atlas_rows
from diagnostics.cards.choice import check_exist, chosen
from diagnostics.cards.content import Histogram
from diagnostics.cards.corpus import LatentCorpus
from diagnostics.cards.effects import firing_shares, measured, summarised
from diagnostics.cards.examples import Example, choose, token_texts, tokens_shown, window
from diagnostics.cards.neighbours import Neighbour, nearest
from diagnostics.cards.result import LatentCard
from diagnostics.sampling.tokens import hash_keys
from diagnostics.statistics.tables import few_prompts
from interventions.direct_logits import direct_logits, extremes, token_text
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing, followed
from interventions.provenance import model_provenance
from interventions.sites import several
from interventions.texts.prompts import Prompts, prompts_for
from sae_models.dictionaries import Dictionary, dictionaries_of

BINS = 32


def latent_card(model: Any, sae: Any, latent: int, prompts: Any, **options: Any) -> LatentCard:
    """The card of one latent: see `latent_cards`, whose options it takes."""
    return latent_cards(model, sae, [latent], prompts, **options)[0]


@torch.no_grad()
def latent_cards(
    model: Any,
    sae: Any,
    latents: int | str | Sequence[int | str],
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    *,
    atlas: Atlas | None = None,
    others: Mapping[str, Any] | None = None,
    name: str = "sae",
    top: int = 12,
    few: int = 4,
    context_tokens: int = 40,
    n_effects: int = 256,
    n_logits: int = 10,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    path: str = "auto",
    progress: Progressing = None,
) -> list[LatentCard]:
    """Cards of some latents of an SAE, on prompts that it was not trained on; one clean pass for all of them.

    sae: anything that `as_sae` accepts, at its own site. latents: numbers, `top:5` (those with the largest summed effect at the even
    prompts of the atlas; their effects, placebos and ranks are of the other prompts, which did not choose them) or `frequent:5`.
    others: further SAEs by name in which similar latents are looked up, each at its own site. atlas: a causal atlas, or effects of a whole dictionary, of the same
    model, SAE and text (anything with its frame, tokens and provenance): effects are then those of its rows at usable tokens of the
    common prompts, the card gives the latent's rank, and the effects of the examples are measured again and compared. top: examples
    with the largest |z|, one a prompt; few: examples from each of `BANDS` (per sign); context_tokens: tokens shown of each.
    n_effects: active tokens, drawn uniformly, whose effects and placebos are measured. n_logits: tokens promoted and suppressed.
    sink_filter, seed, path, progress: as elsewhere.

    Raises `SAEError` for a latent that does not exist, `BelongingError` for an SAE of another model or site, `ResultError` for invalid
    settings, an atlas of another model, SAE or text, and a text without usable tokens. Source: ours; histograms, texts and logits as in
    common dictionary viewers.
    """
    if min(top, few, context_tokens, n_effects, n_logits) < 1:
        raise ResultError(
            f"top {top}, few {few}, context_tokens {context_tokens}, n_effects {n_effects}, n_logits {n_logits}; expected at least one of each"
        )
    model = wrap(model)
    dictionary = dictionaries_of({name: sae}, model, None)[0]
    latents = several(latents)
    check_exist(latents, name, len(dictionary))
    compared = dictionaries_of(others, model, None) if others else []
    if name in (others or {}):
        raise ResultError(f"two SAEs are called {name!r}; give the one that is compared another name")
    corpus = LatentCorpus(model, dictionary, prompts_for(model, prompts), sink_filter, seed)
    rows = None if atlas is None else atlas_rows(atlas, corpus)
    wanted = chosen(latents, corpus, rows)
    with followed(progress, "cards", "latent") as told:
        return _Cards(corpus, rows, compared, top, few, context_tokens, n_effects, n_logits, path).of(wanted, told)


@dataclass(frozen=True)
class _Cards:
    """The settings that cards of one corpus share."""

    corpus: LatentCorpus
    atlas: AtlasRows | None
    others: list[Dictionary]
    top: int
    few: int
    width: int
    n_effects: int
    n_logits: int
    path: str

    def of(self, latents: Mapping[int, str], told: Callable[..., object] | None) -> list[LatentCard]:
        """Cards of `latents`, given with what chose each. told: called with (1, number of latents) after each."""
        corpus, dictionary = self.corpus, self.corpus.dictionary
        found: dict[int, list[Neighbour]] = {i: [] for i in latents}
        for other in [dictionary, *self.others]:  # one at a time in memory
            z = corpus.z[np.flatnonzero(corpus.usable)] if other is dictionary else corpus.elsewhere(other)
            for i in found:
                found[i] += nearest(i, corpus.of(i)[corpus.usable], dictionary, other, z)
        cards = []
        for i, by in latents.items():
            cards.append(self.card(i, by, tuple(found[i])))
            if told is not None:
                told(1, len(latents))
        return cards

    def card(self, latent: int, chosen_by: str, neighbours: tuple[Neighbour, ...]) -> LatentCard:
        corpus, dictionary = self.corpus, self.corpus.dictionary
        assert dictionary.sae is not None
        z = corpus.of(latent)
        usable, active = corpus.usable, corpus.usable & (z != 0)
        own, size = z[active], corpus.norm
        quartile = np.searchsorted(np.quantile(size[usable], [0.25, 0.5, 0.75]), size)
        with few_prompts():
            frequency = statistics.share(active[usable], corpus.prompt[usable])
        picked = choose(corpus, latent, self.top, self.few)
        told = np.ones(len(z), dtype=bool)  # tokens whose effects count
        if chosen_by == "top":
            assert self.atlas is not None
            told = self.atlas.held_back[corpus.prompt]
        table, drawn, notes = self._effects(latent, z, active & told, picked)
        effects, whole = None, drawn
        if self.atlas is not None:
            rows = self.atlas.of(latent)
            if len(rows := rows.loc[told[rows.token.to_numpy(int)]]):
                whole = rows.assign(norm=size[rows.token.to_numpy(int)])
        if len(whole):
            effects = summarised(whole, drawn, corpus.prompt, "measured" if whole is drawn else "atlas")
        d = dictionary.directions[latent].float()
        w = None if dictionary.rows is None else dictionary.rows[latent].float()
        z_mean = float(np.abs(own).mean()) if len(own) else float("nan")
        logits = direct_logits(corpus.clean.recording(0), d[None], corpus.final_size)[0]
        promoted, suppressed = extremes(logits * (z_mean if len(own) else 1), self.n_logits, corpus.model.tokenizer)
        learned = dictionary.learned
        return LatentCard(
            dictionary.name,
            f"{dictionary.sae.score.kind} → {dictionary.sae.selector.kind}",
            corpus.model.name,
            str(dictionary.site),
            latent,
            chosen_by,
            len(dictionary),
            frequency,
            int(active.sum()),
            int(usable.sum()),
            int(((z != 0) & ~usable).sum()),
            z_mean,
            (float(own.min()), float(own.max())) if len(own) else (float("nan"), float("nan")),
            float(d.norm()),
            float("nan") if w is None else float(w @ d),
            float("nan") if w is None else float(torch.nn.functional.cosine_similarity(w, d, dim=0)),
            None if learned is None else float(learned[latent]),
            firing_shares(active, quartile, corpus.prompt),
            Histogram(*np.histogram(own, _z_edges(own))[::-1]),
            _norm_histograms(size[active], size[usable]),
            self._examples(picked, z, table),
            promoted,
            suppressed,
            effects,
            drawn.assign(prompt=corpus.prompt[drawn.token], position=corpus.position[drawn.token]),
            neighbours,
            None if self.atlas is None else self.atlas.summary(latent, table.kl, chosen_by),
            self._provenance(notes, len(drawn), chosen_by),
        )

    def _effects(
        self, latent: int, z: ndarray, active: ndarray, picked: list[tuple[str, int, int]]
    ) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
        """Effects of all measured tokens, by token; of those drawn uniformly; and notes."""
        corpus, where = self.corpus, np.flatnonzero(active)
        keys = hash_keys(corpus.seed, f"latent card/effects/{latent}", corpus.prompt[where], corpus.position[where])
        drawn = np.sort(where[np.argsort(keys, kind="stable")][: self.n_effects])
        shown = tokens_shown(corpus, picked, self.width, z)
        table, notes = measured(corpus, latent, np.concatenate([drawn, np.setdiff1d(shown, drawn)]), self.path)
        return table.set_index("token"), table.iloc[: len(drawn)], notes

    def _examples(self, picked: list[tuple[str, int, int]], z: ndarray, effects: pd.DataFrame) -> tuple[Example, ...]:
        corpus, found = self.corpus, []
        decoded = corpus.model.tokenizer
        for group, sign, token in picked:
            prompt, position = int(corpus.prompt[token]), int(corpus.position[token])
            ids = corpus.prompts.tokens[prompt]
            start, stop = window(position, len(ids), self.width)
            run = np.arange(token - position + start, token - position + stop)
            at = effects.loc[token]
            found.append(
                Example(
                    *(group, sign, prompt, position, start, stop, len(ids)),
                    token_texts(ids[start:stop], decoded),
                    tuple(z[run].tolist()),
                    tuple(effects.kl.reindex(run).tolist()),
                    token_text(ids[position + 1], decoded) if position + 1 < len(ids) else "",
                    token_text(int(at.clean_top1), decoded),
                    token_text(int(at.top1), decoded),
                    float(at.kl_placebo),
                    float(at.delta_norm / corpus.norm[token]),
                )
            )
        return tuple(found)

    def _provenance(self, notes: dict[str, Any], drawn: int, chosen_by: str) -> dict[str, Any]:
        corpus = self.corpus
        return {
            **model_provenance(corpus.model),
            "text": corpus.prompts.provenance,
            "prompts": len(corpus.prompts.tokens),
            "tokens": len(corpus.prompt),
            "tokens_left_out": corpus.left_out,
            "sink_filter": corpus.clean.settings.sink_filter,
            "seed": corpus.seed,
            "sae": corpus.dictionary.provenance(),
            "others": {other.name: other.provenance() for other in self.others},
            "chosen_by": chosen_by,
            "effects_drawn": drawn,
            **notes,
        }


def _z_edges(z: Float[ndarray, "active"]) -> Float[ndarray, "edge"]:
    """Bins from 0 to the largest |z| of each sign, one edge at 0."""
    top = float(np.abs(z).max(initial=0)) or 1.0
    step = top / BINS
    low, high = (int(np.ceil(max(0.0, side) / step - 1e-9)) for side in (-z.min(initial=0), z.max(initial=0)))
    return np.arange(-low, max(high, 1 - low) + 1) * step


def _norm_histograms(active: ndarray, every: ndarray) -> tuple[Histogram, Histogram]:
    low, high = float(every.min()), float(every.max())
    edges = np.geomspace(low, high if high > low else low * 1.01, BINS + 1)
    edges[[0, -1]] = low, max(high, low * 1.01)
    one, other = (Histogram(edges, np.histogram(x, edges)[0] / max(1, len(x))) for x in (active, every))
    return one, other
