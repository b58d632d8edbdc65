"""Path patching by torch hooks set here, one edge and three full forward passes at a time; see `tests/inside.py`."""

from contextlib import ExitStack

import torch
from torch import nn

from interventions import Site
from tests import inside
from tests.tiny import N_LAYERS, changed_in


class Paths:
    """One pair in one direction: the base run's tokens, and what senders write in the source run."""

    def __init__(self, name: str, hf: nn.Module, base: list[int], source: list[int]):
        self.name, self.hf, self.base = name, hf, base
        self.there = {tuple(tokens): self._streams(tokens) for tokens in (base, source)}
        self.here, self.other = self.there[tuple(base)], self.there[tuple(source)]
        self.z = {i: inside.clean(name, hf, source, Site(i, "z")) for i in range(N_LAYERS)}

    def _pass(self, tokens: list[int], edits: dict[Site, torch.Tensor], seen: dict, sites) -> torch.Tensor:
        """Logits [pos, vocab]; edits: whole values, [pos, width]; what stands at `sites` is kept in `seen`."""

        def at(site: Site):
            def change(x):
                x = edits[site].view(x.shape) if site in edits else x
                seen[site] = x.reshape(len(tokens), -1)
                return x

            return change

        with ExitStack() as stack, torch.no_grad():
            for site in dict.fromkeys([*edits, *sites]):
                if site.inside:
                    stack.enter_context(inside.seen(self.name, self.hf, site, at(site)))
                else:
                    stack.callback(changed_in(self.name, self.hf, site, at(site)))
            return self.hf(input_ids=torch.tensor([tokens])).logits[0]

    def _streams(self, tokens: list[int]) -> dict[Site, torch.Tensor]:
        seen: dict = {}
        points = ("resid_pre", "attn_out", "mlp_out", "resid_post")
        seen["logits"] = self._pass(tokens, {}, seen, [Site(i, p) for i in range(N_LAYERS) for p in points])
        return seen

    def write(self, sender: Site) -> torch.Tensor:
        """What the sender writes in the source run less what it writes in the base run."""
        if sender.point != "z":
            return self.other[sender] - self.here[sender]
        z = inside.clean(self.name, self.hf, self.base, sender.whole)
        own = slice((sender.head or 0) * inside.D_HEAD, ((sender.head or 0) + 1) * inside.D_HEAD)
        z[:, own] = self.z[sender.layer][:, own]
        seen: dict = {}
        out = Site(sender.layer, "attn_out")
        self._pass(self.base, {sender.whole: z}, seen, [out])
        return seen[out] - self.here[out]

    def logits(
        self, sender: Site, receiver: Site, positions=None, mlps: str = "frozen", later: str = "run"
    ) -> torch.Tensor:
        """Logits [pos, vocab] where the receiver alone sees the sender's change, at some positions of its own (None: all).

        later="frozen": what is written above the receiver is that of the base run.
        """
        edits = {Site(i, "attn_out"): self.here[Site(i, "attn_out")] for i in range(N_LAYERS)}
        if mlps == "frozen":
            edits |= {Site(i, "mlp_out"): self.here[Site(i, "mlp_out")] for i in range(N_LAYERS)}
        out = Site(sender.layer, {"resid_pre": "resid_pre", "z": "attn_out", "mlp_out": "mlp_out"}[sender.point])
        edits[out] = self.here[out] + self.write(sender)
        if receiver.point == "mlp_out":
            edits.pop(receiver, None)
        if receiver.point in "qkv":
            edits.pop(Site(receiver.layer, "attn_out"))
        seen: dict = {}
        self._pass(self.base, edits, seen, [receiver.whole])
        new, old = seen[receiver.whole], {}
        self._pass(self.base, {}, old, [receiver.whole])
        own = slice(None)
        if receiver.head is not None:
            own = slice(receiver.head * inside.D_HEAD, (receiver.head + 1) * inside.D_HEAD)
        at = list(range(len(self.base))) if positions is None else positions
        whole = old[receiver.whole].clone()
        whole[at, own] = new[at, own]
        edits = {receiver.whole: whole}
        if later == "frozen":
            above = range(receiver.layer + 1, N_LAYERS)
            written = [Site(i, point) for i in above for point in ("attn_out", "mlp_out")]
            written += [Site(receiver.layer, "mlp_out")] if receiver.point in "qkv" else []
            edits |= {site: self.here[site] for site in written}
        return self._pass(self.base, edits, {}, [])
