"""An SAE's latents on a text, computed once for any number of cards."""

from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import sparse
from torch import Tensor

from diagnostics.running.clean import CleanActivations, RunSettings
from interventions.edits import norm, norm_read
from interventions.errors import ResultError
from interventions.models.causal_model import CausalModel
from interventions.recording import record
from interventions.sites import Site
from interventions.texts.prompts import Prompts
from sae_models.active_latents import active_latents
from sae_models.dictionaries import Dictionary


class LatentCorpus:
    """Activations of some prompts at an SAE's site, the latents active at each token, and which tokens count.

    Usable tokens count: not the first of a prompt, special tokens, sinks (‖x‖ > sink_filter · median), nor activations that
    are not finite or of norm 0. Latents are read at all tokens, so that a text can be shown whole.
    Raises `ResultError` where no token is left.
    """

    def __init__(
        self, model: CausalModel, dictionary: Dictionary, prompts: Prompts, sink_filter: float | None, seed: int
    ):
        if dictionary.sae is None:
            raise ResultError(f"{dictionary.name!r} are directions without an encoder; a card needs an SAE")
        settings = RunSettings(sites=(dictionary.site,), sink_filter=sink_filter, seed=seed)
        self.model, self.dictionary, self.prompts, self.seed = model, dictionary, prompts, seed
        self.clean = CleanActivations(model, prompts, settings)
        x = self.clean.activations[dictionary.site]
        self.inside = np.arange(x.shape[1]) < self.clean.length[:, None]
        self.prompt, self.position = np.nonzero(self.inside)
        self.usable = self.clean.usable[self.inside]
        if not self.usable.any():
            site = dictionary.site
            raise ResultError(f"no token is left at {site}: {self.left_out}; take another text or sink filter")
        x = x[torch.from_numpy(self.inside).to(x.device)]
        finite = x.isfinite().all(dim=-1)
        self.norm = norm(x)[:, 0].double().cpu().numpy()
        active = active_latents(dictionary.sae, torch.where(finite[:, None], x, 0))
        self.z = sparse.csc_matrix(sparse.diags(finite.double().cpu().numpy()) @ active.matrix())
        """of every token, `[token, d_sae]`"""
        self.z.eliminate_zeros()

    @property
    def left_out(self) -> dict[str, int]:
        """Numbers of tokens that do not count, by the first reason that applies."""
        return self.clean.filter.left_out()

    def of(self, latent: int) -> Float[ndarray, "token"]:
        """z of a latent at every token."""
        return self.z[:, [latent]].toarray()[:, 0]

    def x(self, token: Int[ndarray, "row"]) -> Float[Tensor, "row d_model"]:
        """Activations of single tokens."""
        return self.clean.at(self.dictionary.site, self.prompt[token], self.position[token])

    def token_at(self, prompt: Int[ndarray, "row"], position: Int[ndarray, "row"]) -> Int[ndarray, "row"]:
        """The index in the corpus of the tokens at these places."""
        first = np.cumsum(self.clean.length) - self.clean.length
        return first[prompt] + position

    @cached_property
    def final_size(self) -> float:
        """Median over usable tokens of what the final norm divides by: ‖x‖ (RMSNorm) or ‖x − mean(x)‖ (LayerNorm) after the last block."""
        last, sizes = Site(self.model.n_layers - 1), []
        for shard, prompts in enumerate(self.clean.shards):
            stream = self.clean.recording(shard).activations[last]
            usable = torch.from_numpy(self.clean.usable[prompts, : stream.shape[1]]).to(stream.device)
            sizes.append(norm_read(self.model.norm_kind, stream[usable])[:, 0].cpu())
        return float(torch.cat(sizes).median())

    def elsewhere(self, dictionary: Dictionary) -> sparse.csc_matrix:
        """z of another SAE's latents at the usable tokens, `[usable token, d_sae]`, at that SAE's own site."""
        assert dictionary.sae is not None
        site = dictionary.site
        if site in self.clean.activations:
            x = self.clean.activations[site]
        else:
            x = record(self.model, self.prompts.tokens, [site], keep_cache=False).activations[site]
        x = x[torch.from_numpy(self.inside).to(x.device)][torch.from_numpy(self.usable).to(x.device)]
        return sparse.csc_matrix(active_latents(dictionary.sae, x).matrix())
