"""Which tokens an evaluation counts, and the quartile of the norm each belongs to."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from interventions.errors import ResultError
from interventions.recording import Recording
from interventions.sites import Site

ALL, NO_SINKS = "all", "no sinks"
"""Which tokens are counted and replaced. `all`: every one. `no sinks`: not those with ‖x‖ above `sink_filter` times the site's median,
nor each prompt's first (`skip_first`), nor special tokens; in the spliced stream these stay as they are."""
QUARTILES = ("all", "Q1", "Q2", "Q3", "Q4")
"""Of ‖x‖ over the tokens counted at a site."""
Groups = dict[str, Int[ndarray, "token"]]


class Tokens:
    """The tokens of a recording at one site, prompt after prompt, and which of them count."""

    def __init__(
        self,
        recording: Recording,
        site: Site,
        special: list[list[bool]],
        sink_filter: float | None,
        skip_first: int = 1,
    ):
        self.recording, self.site = recording, site
        values = recording.activations[site]
        self.inside = torch.arange(values.shape[1]) < recording.length[:, None]
        self.x: Float[Tensor, "token d_model"] = values[self.inside.to(values.device)]
        self.prompt = np.repeat(np.arange(len(recording.length)), recording.length.numpy())
        norm = self.x.to(torch.promote_types(values.dtype, torch.float32)).norm(dim=-1).cpu().double().numpy()
        usable = np.isfinite(norm) & (norm > 0)
        if not usable.any():
            raise ResultError(f"none of {len(norm)} activations at {site} is finite and not 0; look at the model")
        marked = np.concatenate([np.asarray(flags, dtype=bool) for flags in special])
        counted = {ALL: usable}
        self.left_out = {"not finite or of norm 0": int((~usable).sum())}
        if sink_filter is not None:
            sink = usable & (norm > sink_filter * np.median(norm[usable]))
            first = np.concatenate([np.arange(n) < skip_first for n in recording.length.tolist()])
            counted[NO_SINKS] = usable & ~sink & ~marked & ~first
            self.left_out |= {
                "sinks": int(sink.sum()),
                "special tokens": int((usable & ~sink & marked).sum()),
                f"first {skip_first} of a prompt": int((usable & ~sink & ~marked & first).sum()),
            }
            if not counted[NO_SINKS].any():
                raise ResultError(
                    f"no token is left at {site}: {self.left_out} of {len(norm)}; take another text or sink filter"
                )
        self.norm, self.counted = norm, counted
        self.strict = list(counted)[-1]
        """the tokens that latents are counted on, and the mean is taken of"""
        self.quartile: Groups = {name: _quartiles(norm, keep) for name, keep in counted.items()}
        keep = torch.from_numpy(counted[self.strict]).to(self.x.device)
        self.mean = self.x[keep].mean(dim=0, dtype=torch.float64)
        """`[d_model]`, of the tokens that are no sinks"""
        self._spread = {name: self._moments(quartile) for name, quartile in self.quartile.items()}

    def mask(self, counted: str, prompts: int) -> Bool[Tensor, "prompt pos"]:
        """The tokens counted among the first prompts, as they stand in the recording."""
        found = torch.zeros(self.inside.shape, dtype=torch.bool)
        found[self.inside] = torch.from_numpy(self.counted[counted])
        return found[:prompts]

    def flat(self, table: Float[Tensor, "prompt pos"]) -> Float[ndarray, "token"]:
        """A table of the first prompts as one number a token; nan for the other prompts."""
        whole = torch.full(self.inside.shape, torch.nan, dtype=torch.float64)
        whole[: len(table), : table.shape[1]] = table
        return whole[self.inside].numpy()

    def members(self, counted: str, quartile: str) -> Bool[ndarray, "token"]:
        """The tokens of a line."""
        place = self.quartile[counted]
        return place > 0 if quartile == QUARTILES[0] else place == QUARTILES.index(quartile)

    def variance(self, counted: str, quartile: str) -> tuple[Float[ndarray, "prompt"], Float[ndarray, "prompt prompt"]]:
        """Of a line's tokens, about a fixed centre: Σ‖x − c‖² of each prompt, and the Gram matrix of the prompts' Σ(x − c)."""
        which = (
            slice(0, 4) if quartile == QUARTILES[0] else slice(QUARTILES.index(quartile) - 1, QUARTILES.index(quartile))
        )
        square, total = (part[which].sum(0) for part in self._spread[counted])
        return square.numpy(), (total @ total.T).numpy()

    def _moments(self, quartile: Int[ndarray, "token"]) -> tuple[Tensor, Tensor]:
        n_prompts, d_model = len(self.recording.length), self.x.shape[1]
        square = torch.zeros(5 * n_prompts, dtype=torch.float64)
        total = torch.zeros(5 * n_prompts, d_model, dtype=torch.float64)
        where = torch.from_numpy(quartile * n_prompts + self.prompt)
        for start in range(0, len(where), 4096):
            some = slice(start, start + 4096)
            x = (self.x[some].double() - self.mean).cpu()
            x[torch.from_numpy(quartile[some] == 0)] = 0
            square.index_add_(0, where[some], x.square().sum(-1))
            total.index_add_(0, where[some], x)
        return square.view(5, n_prompts)[1:], total.view(5, n_prompts, d_model)[1:]


def _quartiles(norm: Float[ndarray, "token"], keep: Bool[ndarray, "token"]) -> Int[ndarray, "token"]:
    """1 to 4 by norm among the tokens kept, 0 for the others; a norm on an edge belongs below it."""
    edges = np.quantile(norm[keep], (0.25, 0.5, 0.75))
    return np.where(keep, 1 + np.searchsorted(edges, np.where(keep, norm, 0.0), side="left"), 0)
