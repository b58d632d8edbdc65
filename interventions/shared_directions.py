"""Edits along the same few directions, many times over: x + c·d. Each direction's logits are computed once.

A final norm n (RMSNorm or LayerNorm) and a linear head U carry a change of the stream to logits by a plane: with b = n(0),

    n(x + c·d) − b = α·(n(x) − b) + β·(n(d) − b),      so      U n(x + c·d) = U b + α·(U n(x) − U b) + β·(U n(d) − U b)

α and β follow from hidden states alone, by least squares whose residual says whether the plane holds. So a direct effect costs a sum
over the vocabulary in place of a product with the unembedding.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.errors import EditError
from interventions.models.uploads import upload
from interventions.recording import Recording
from interventions.replaying.placed import placed
from interventions.replaying.replay import Branches, replayed, unembed
from interventions.replaying.replay_check import logits_differ
from interventions.sites import Site

TABLE_BYTES, TABLE_BYTES_GPU = 2**30, 2**33
"""Of logits of directions, at most; beyond that direct effects are unembedded one by one."""
_BLOCK, _BLOCK_GPU = 2**20, 2**27  # logits formed at once: on the CPU what fits its caches
_RESIDUAL = 1e-5  # of ‖n(x + c·d) − b‖: some 50 units in the last place of float32


@dataclass(eq=False)
class Directions:
    """Directions that edits go along; keep the object where many calls edit along them, it keeps their logits."""

    matrix: Float[Tensor, "direction d_model"]
    _tables: dict[Any, tuple[Tensor, Tensor] | None] = field(default_factory=dict, repr=False)

    def times(self, coefficient: Float[Tensor, "row"], index: Int[Tensor, "row"]) -> "Along":
        """c_r·d[i_r] added at each row's token. Raises `EditError` for what does not fit."""
        return Along(self, index, coefficient)

    def table(self, recording: Recording) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, "n vocab"]] | None:
        """n(d) of each direction, and last n(0); their logits. None where they would take too much memory."""
        model = recording.model
        most = TABLE_BYTES if model.device.type == "cpu" else TABLE_BYTES_GPU
        if (len(self.matrix) + 1) * model.vocab_size * 4 > most or model.dtype not in (torch.float32, torch.float64):
            return None
        key = recording.fingerprint, model.device
        if key not in self._tables:
            d = self.matrix.to(model.device, model.dtype)
            size = d.norm(dim=-1, keepdim=True).clamp(min=1e-30) / d.shape[-1] ** 0.5  # so that no epsilon matters
            rows = torch.cat([d / size, torch.zeros_like(d[:1])])
            alone = Branches.single(np.zeros(len(rows), dtype=int), np.zeros(len(rows), dtype=int))
            last = placed(recording, Site(model.n_layers - 1), alone.edited, rows)
            hidden = replayed(recording, alone, [last]).hidden
            self._tables[key] = hidden, torch.cat([unembed(recording, some) for some in hidden.split(512)])
        return self._tables[key]


class Along:
    """Edited vectors x_r + c_r·d[i_r], as `measure` takes them: one edited token a row."""

    def __init__(self, directions: Directions, index: Int[Tensor, "row"], coefficient: Float[Tensor, "row"]):
        n = len(directions.matrix)
        if index.shape != coefficient.shape or index.ndim != 1:
            raise EditError(
                f"{list(index.shape)} directions and {list(coefficient.shape)} coefficients; give one a row"
            )
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < n:
            raise EditError(f"directions from {int(index.min())} to {int(index.max())}; there are {n}, from 0")
        self.directions, self.index, self.coefficient = directions, index.cpu(), coefficient

    def change(self, rows: Int[Tensor, "some_row"]) -> Float[Tensor, "some_row d_model"]:
        """c_r·d[i_r]."""
        matrix = self.directions.matrix
        scale = self.coefficient[upload(rows, self.coefficient.device)].to(matrix)
        return scale[:, None] * matrix[upload(self.index[rows], matrix.device)]

    @torch.no_grad()
    def logits(
        self,
        recording: Recording,
        rows: Int[Tensor, "some_row"],
        moved: Float[Tensor, "some_row d_model"],
        clean: Float[Tensor, "clean d_model"],
        clean_logits: Float[Tensor, "clean vocab"],
        of: Int[Tensor, "some_row"],
    ) -> Float[Tensor, "some_row vocab"] | None:
        """Logits of final hidden states `moved`, reached from clean ones by the rows' changes; None where the plane does not hold.

        of: the clean state of each row. The row that moved furthest is compared with the model's own head.
        """
        known = self.directions.table(recording)
        if known is None or not len(rows):
            return None
        hidden, logits = known
        which = upload(self.index[rows], hidden.device)
        base, axis, target = (x.double() - hidden[-1].double() for x in (clean[of], hidden[which], moved))
        aa, ab, bb = (base * base).sum(-1), (base * axis).sum(-1), (axis * axis).sum(-1)
        at, bt = (base * target).sum(-1), (axis * target).sum(-1)
        det = torch.where(bb > 0, aa * bb - ab * ab, 1.0)
        alpha = torch.where(bb > 0, (at * bb - bt * ab) / det, at / aa)  # a direction of 0 changes nothing
        beta = torch.where(bb > 0, (bt * aa - at * ab) / det, 0.0)
        left = (target - alpha[:, None] * base - beta[:, None] * axis).norm(dim=-1)
        shift = (1 - alpha - beta).to(logits)[:, None]
        alpha, beta = alpha.to(logits)[:, None], beta.to(logits)[:, None]
        found = logits.new_empty(len(rows), logits.shape[1])
        few = max(1, (_BLOCK if logits.device.type == "cpu" else _BLOCK_GPU) // logits.shape[1])
        for start in range(0, len(rows), few):
            some = slice(start, start + few)
            part = found[some]
            torch.mul(clean_logits[of[some]], alpha[some], out=part).addcmul_(logits[which[some]], beta[some])
            part.addcmul_(logits[-1:], shift[some])
        furthest = (moved - clean[of]).norm(dim=-1).argmax()
        own = unembed(recording, moved[furthest][None])[0]
        good = (left <= _RESIDUAL * target.norm(dim=-1)).all()
        delta, allowed = logits_differ(found[furthest][None], own[None], recording.model.dtype)
        return found if bool(good) and delta <= allowed else None
