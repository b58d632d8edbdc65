"""Measures of an SAE on recorded activations: one pass through it, splicing, and lines with intervals."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from diagnostics.sampling.counted import ALL, NO_SINKS, QUARTILES, Tokens
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.jackknife import from_deletions
from diagnostics.statistics.tables import few_prompts
from interventions.recording import Recording
from interventions.spliced import Spliced, spliced
from sae_models.sae import SAE

MEASURES = {
    "fve": "fraction of variance explained, 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the mean of the line's own tokens",
    "mse": "mean over tokens of ‖x − x̂‖², the squared error summed over d_model",
    "l0": "mean number of active latents a token",
    "cosine": "mean cosine of x and x̂",
    "norm_ratio": "mean ‖x̂‖/‖x‖",
    "kl": "KL(clean ‖ spliced) of the next-token distribution, nats: x̂ in place of x at every position counted",
    "kl_zero": "the same with 0 in place of x",
    "kl_mean": "the same with the mean of the site's tokens that are no sinks in place of x",
    "kl_score": "1 − Σ kl / Σ kl_zero",
    "kl_score_mean": "1 − Σ kl / Σ kl_mean",
    "ce": "cross-entropy of the next token, spliced, nats",
    "ce_clean": "the same, clean",
    "ce_zero": "the same with 0 in place of x",
    "ce_mean": "the same with that mean in place of x",
    "ce_score": "loss recovered, (Σ ce_zero − Σ ce) / (Σ ce_zero − Σ ce_clean)",
    "ce_score_mean": "the same against the mean: (Σ ce_mean − Σ ce) / (Σ ce_mean − Σ ce_clean)",
}
"""What a line holds, each with a delete-one-prompt jackknife interval."""
ZERO, MEAN = " zero", " mean"
"""Names of the reference edits beside those of SAEs."""
CHUNK, CHUNK_GPU = 2**23, 2**26
"""Latents held at once, of all tokens together."""
Splices = dict[str, Spliced]
_COSINE_FLOOR = 1e-12


def counted(provenance: Mapping[str, Any]) -> str:
    """The tokens of figures and of the table of latents: `no sinks`, or `all` without a sink filter."""
    return NO_SINKS if provenance["sink_filter"] else ALL


@dataclass(frozen=True)
class Encoded:
    """One pass of all tokens through an SAE."""

    numbers: dict[str, Float[ndarray, "token"]]
    """`mse`, `l0`, `cosine`, `norm_ratio` of each token"""
    fired: dict[str, Int[ndarray, "quartile d_sae"]]
    """number of tokens of each quartile on which a latent is active, by which tokens count"""
    activation: Float[ndarray, "d_sae"]
    """its sum over the tokens that are no sinks"""
    prompts: Int[ndarray, "2 d_sae"]
    """the first and the second prompt in which a latent is active on such a token; -1: none"""


class WithoutEach(NamedTuple):
    """A statistic on all prompts, and without each of the prompts that have one of its tokens."""

    value: float
    without: Float[ndarray, "some"]
    prompts: Int[ndarray, "some"]
    sizes: Int[ndarray, "some"]
    """tokens of each"""

    def estimate(self) -> Estimate:
        """The value with its delete-one-prompt jackknife interval."""
        with few_prompts(), np.errstate(all="ignore"):  # few prompts: their number stands beside each interval
            return from_deletions(self.value, self.without, self.sizes)

    def of_each(self, n_prompts: int) -> Float[ndarray, "prompt"]:
        """The statistic without each of all prompts: the value itself for one that has none of its tokens."""
        found = np.full(n_prompts, self.value)
        found[self.prompts] = self.without
        return found


def passes(sae: SAE, x: Float[Tensor, "token d_model"]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks of tokens: their indices, latents z, and reconstructions in float32 or float64. Memory: a few times `CHUNK` numbers."""
    many = max(1, (CHUNK if sae.device.type == "cpu" else CHUNK_GPU) // sae.d_sae)
    for start in range(0, len(x), many):
        some = slice(start, start + many)
        z = sae.encode(x[some])
        yield some, z, (z @ sae.W_dec + sae.offset(x[some])).to(torch.promote_types(sae.dtype, torch.float32))


def reconstructed(sae: SAE, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
    """x̂ as an edit of the residual stream, in bounded memory."""
    return torch.cat([found for _, _, found in passes(sae, x)]) if len(x) else x


def encoded(sae: SAE, tokens: Tokens) -> Encoded:
    """All tokens of a site through an SAE, a chunk at a time."""
    numbers = {name: np.empty(len(tokens.x)) for name in ("mse", "l0", "cosine", "norm_ratio")}
    fired = {name: torch.zeros(4, sae.d_sae, dtype=torch.long) for name in tokens.counted}
    activation = torch.zeros(sae.d_sae, dtype=torch.float64)
    in_prompt = torch.zeros(len(tokens.inside), sae.d_sae, dtype=torch.bool)
    for some, z, found in passes(sae, tokens.x):
        x, active = tokens.x[some].to(found), z != 0
        norm, size = x.norm(dim=-1), found.norm(dim=-1)
        for name, value in (
            ("mse", (x - found).square().sum(-1)),
            ("l0", active.sum(-1)),
            ("cosine", (x * found).sum(-1) / (norm * size).clamp(min=_COSINE_FLOOR)),
            ("norm_ratio", size / norm.clamp(min=_COSINE_FLOOR)),
        ):
            numbers[name][some] = value.cpu().double().numpy()
        active = active.to(found)
        for name, quartile in tokens.quartile.items():
            among = torch.from_numpy(quartile[some, None] == np.arange(1, 5)).to(found)
            fired[name] += (among.T @ active).round().long().cpu()
        keep = torch.from_numpy(tokens.counted[tokens.strict][some]).to(found)
        here, of = np.unique(tokens.prompt[some], return_inverse=True)
        member = torch.nn.functional.one_hot(torch.from_numpy(of), len(here)).to(keep) * keep[:, None]
        in_prompt[torch.from_numpy(here)] |= (member.T @ active > 0).cpu()
        activation += (keep @ z.to(found).nan_to_num()).cpu().double()
    fires = {name: n.numpy() for name, n in fired.items()}
    return Encoded(numbers, fires, activation.numpy(), _first_two(in_prompt.numpy()))


def _first_two(member: Bool[ndarray, "prompt d_sae"]) -> Int[ndarray, "2 d_sae"]:
    """Numbers of the first and second prompt of each latent; -1: none."""
    count, rest = member.sum(0), member.copy()
    first = rest.argmax(0)
    rest[first, np.arange(len(first))] = False
    return np.stack([np.where(count > 0, first, -1), np.where(count > 1, rest.argmax(0), -1)])


def spliced_stream(
    tokens: Tokens,
    saes: Mapping[str, SAE],
    n_prompts: int | None,
    splice_sinks: bool,
    path: str,
    progress: Callable[[int], object],
) -> Splices:
    """KL and cross-entropy of the site's SAEs and of the reference edits on the first prompts, by which tokens count."""
    n = min(n_prompts or len(tokens.inside), len(tokens.inside))
    mean = tokens.mean.to(tokens.x)
    edits: dict[str, Callable[[Tensor], Tensor]] = {
        ZERO: torch.zeros_like,
        MEAN: lambda x: mean.to(x).expand_as(x),
        **{name: (lambda x, sae=sae: reconstructed(sae, x).to(x)) for name, sae in saes.items()},
    }
    some = first_prompts(tokens.recording, n)
    found: Splices = {}
    masks = {name: tokens.mask(ALL if splice_sinks else name, n) for name in tokens.counted}
    for name, mask in masks.items():
        same = next((other for other in found if torch.equal(masks[other], mask)), None)
        if same is not None:  # no sinks: one pass for both
            found[name] = found[same]
            progress(n * len(edits))
            continue
        found[name] = spliced(
            some, tokens.site, edits, where=mask, path=path, progress=lambda done: progress(done * len(edits))
        )
    return found


def first_prompts(recording: Recording, n: int) -> Recording:
    """The recording of the first n of its prompts, without keys and values."""
    return replace(
        recording,
        tokens=recording.tokens[:n],
        length=recording.length[:n],
        activations={site: values[:n] for site, values in recording.activations.items()},
        final_hidden=recording.final_hidden[:n],
        keys=None,
        values=None,
    )


def lines(tokens: Tokens, passed: Encoded, splices: Splices, name: str) -> Iterator[dict[str, Any]]:
    """The lines of an SAE at its site: which tokens, quartile, counts, and every measure as `WithoutEach`."""
    for counted in tokens.counted:
        effects = _effects(tokens, splices[counted], name)
        for quartile in QUARTILES:
            member = tokens.members(counted, quartile)
            norm = tokens.norm[member]
            fired = passed.fired[counted]
            fired = fired.sum(0) if quartile == QUARTILES[0] else fired[QUARTILES.index(quartile) - 1]
            line: dict[str, Any] = {
                "tokens": counted,
                "quartile": quartile,
                "norm_low": norm.min() if len(norm) else np.nan,
                "norm_high": norm.max() if len(norm) else np.nan,
                "d_sae": len(fired),
                "dead": int((fired == 0).sum()),
                "dead_share": float((fired == 0).mean()),
            }
            yield line | _reconstruction(tokens, passed, counted, quartile, member) | _scores(tokens, effects, member)


class _Sums:
    """Sums over the tokens of each prompt, and statistics of them without each prompt."""

    def __init__(self, tokens: Tokens, member: Bool[ndarray, "token"], columns: Mapping[str, Float[ndarray, "token"]]):
        prompt, n = tokens.prompt[member], len(tokens.inside)
        self.column = {name: np.bincount(prompt, x[member], n) for name, x in columns.items()}
        self.n = np.bincount(prompt, minlength=n)
        self.there = np.flatnonzero(self.n)

    def __getitem__(self, name: str) -> Float[ndarray, "prompt"]:
        return self.column[name]

    def of(self, statistic: Callable[[Bool[ndarray, "prompt"]], float]) -> WithoutEach:
        """A statistic of the kept prompts, and without each; prompts without a token do not count."""
        keep = self.n > 0
        with np.errstate(all="ignore"):
            value = float(statistic(keep)) if keep.any() else np.nan
            without = np.empty(len(self.there))
            for i, prompt in enumerate(self.there):
                keep[prompt] = False
                without[i] = statistic(keep)
                keep[prompt] = True
        return WithoutEach(value, without, self.there, self.n[self.there])

    def mean(self, name: str) -> WithoutEach:
        """Over tokens."""
        column = self[name]
        return self.of(lambda keep: column[keep].sum() / self.n[keep].sum())

    def recovered(self, worst: str, own: str, best: str | None) -> WithoutEach:
        """(Σ worst − Σ own) / (Σ worst − Σ best), best None: 0; nan where the two are the same."""
        most, some = self[worst], self[own]
        least = np.zeros_like(most) if best is None else self[best]

        def score(keep: ndarray) -> float:
            span = most[keep].sum() - least[keep].sum()
            return (most[keep].sum() - some[keep].sum()) / span if span else np.nan

        return self.of(score)


def _reconstruction(
    tokens: Tokens, passed: Encoded, counted: str, quartile: str, member: Bool[ndarray, "token"]
) -> dict[str, WithoutEach]:
    sums = _Sums(tokens, member, passed.numbers)
    square, gram = tokens.variance(counted, quartile)

    def fve(keep: ndarray) -> float:
        spread = square[keep].sum() - keep @ gram @ keep / sums.n[keep].sum()
        return 1 - sums["mse"][keep].sum() / spread if spread > 0 else np.nan

    return {"fve": sums.of(fve), **{name: sums.mean(name) for name in passed.numbers}}


def _effects(tokens: Tokens, found: Spliced, name: str) -> dict[str, dict[str, Float[ndarray, "token"]]]:
    """The KLs and cross-entropies of each token, all nan where one of a kind is not finite."""
    kl = {"kl": found.kl[name], "kl_zero": found.kl[ZERO], "kl_mean": found.kl[MEAN]}
    ce = {
        "ce": found.loss[name],
        "ce_clean": found.clean_loss,
        "ce_zero": found.loss[ZERO],
        "ce_mean": found.loss[MEAN],
    }
    effects = {}
    for kind, tables in (("kl", kl), ("ce", ce)):
        flat = {key: tokens.flat(table) for key, table in tables.items()}
        good = np.logical_and.reduce([np.isfinite(x) for x in flat.values()])
        effects[kind] = {key: np.where(good, x, np.nan) for key, x in flat.items()}
    return effects


def _scores(
    tokens: Tokens, effects: dict[str, dict[str, ndarray]], member: Bool[ndarray, "token"]
) -> dict[str, WithoutEach]:
    found: dict[str, WithoutEach] = {}
    for kind, best in (("kl", None), ("ce", "ce_clean")):
        sums = _Sums(tokens, member & np.isfinite(effects[kind][kind]), effects[kind])
        found |= {name: sums.mean(name) for name in effects[kind]}
        found[f"{kind}_score"] = sums.recovered(f"{kind}_zero", kind, best)
        found[f"{kind}_score_mean"] = sums.recovered(f"{kind}_mean", kind, best)
    return found
