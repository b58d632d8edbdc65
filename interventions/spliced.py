"""Whole residual streams passed through an edit, such as an SAE: KL and cross-entropy at every token."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interventions.errors import EditError, MechdiagError, ReplayError, SiteError, is_out_of_memory
from interventions.metrics import CleanSide, Comparison
from interventions.models.anatomy import at_site, check_site
from interventions.models.fingerprint import depends_on_batch
from interventions.models.rotary import forget_longer_passes
from interventions.recording import Recording
from interventions.replaying.hooks import Edit, hooked_logits
from interventions.replaying.replay import entering_at, unembed
from interventions.replaying.replay_check import logits_differ
from interventions.sites import Site, SiteLike, as_site

PATHS = ("auto", "blocks", "hooks")
_TRIAL_TOKENS = 128  # logits of more would fill the memory
LOGITS, LOGITS_GPU = 2**24, 2**26  # formed at once, of each edit; a comparison holds several times as many numbers
COMPARED = 2**18  # on the CPU: what fits its caches is several times faster


@dataclass(frozen=True)
class Spliced:
    """Effects of passing the residual stream of every prompt through an edit; tensors on the CPU, float32 (float64 for a float64
    model)."""

    kl: dict[str, Float[Tensor, "prompt pos"]]
    """KL(clean ‖ spliced) of the next-token distribution, nats, for each edit; nan beyond the prompt's end"""
    loss: dict[str, Float[Tensor, "prompt pos"]]
    """cross-entropy of the next token, spliced, nats; nan at the prompt's last token and beyond"""
    clean_loss: Float[Tensor, "prompt pos"]
    """the same, clean"""
    path: str
    """`blocks` (the blocks above the site alone) or `hooks` (full forward passes)"""
    delta: float
    """largest logit difference seen between the two on the longest prompt (nan: not compared)"""
    why_hooks: str | None
    """why hooks were used in place of the blocks, or None"""
    n_nonfinite: dict[str, int]
    """tokens whose KL is not finite, for each edit"""


@torch.no_grad()
def spliced(
    recording: Recording,
    site: SiteLike,
    edits: Mapping[str, Edit],
    *,
    where: Bool[Tensor, "prompt pos"] | None = None,
    path: str = "auto",
    batch_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Spliced:
    """Pass the residual stream of each prompt through an edit at `site` at all positions, and measure the effect at all of them.

    edits: by name; each maps the activations of some tokens, `[token, d_model]`, to as many new ones. where: which tokens are
    edited (default: all); effects are measured at all. An edit costs a pass through the blocks above the site and one unembedding
    a token; the clean unembedding is shared. path: `auto` (the blocks above the site, if they match a full forward pass on the
    longest prompt, else hooks), `blocks` (an error if they do not match) or `hooks`. batch_tokens: tokens in one pass (default 1024
    on the CPU, 8192 elsewhere). progress: called with the number of prompts that are done.
    Raises `SiteError` for a site that the model lacks or that was not recorded, `EditError` for an edit that returns another
    shape, `ReplayError` where `blocks` do not match.
    """
    if path not in PATHS or (batch_tokens is not None and batch_tokens < 1):
        raise MechdiagError(
            f"path {path!r}, batch_tokens {batch_tokens}; expected one of {', '.join(PATHS)}, and 1 token or more"
        )
    if not edits:
        raise EditError("no edits; give at least one, by name")
    model, site = recording.model, as_site(site)
    check_site(model, site)
    passes = Passes(recording, site, where)
    with recording.held():
        return _spliced(passes, edits, path, batch_tokens, progress)


class Passes:
    """Residual streams of a recording's prompts passed through edits, a batch of prompts at a time."""

    def __init__(self, recording: Recording, site: Site, where: Tensor | None):
        self.recording, self.site, self.model = recording, site, recording.model
        self.tokens, self.device = recording.tokens, recording.tokens.device
        self.length = recording.length.to(self.device)
        real = torch.arange(self.tokens.shape[1], device=self.device) < self.length[:, None]
        if where is not None and (where.dtype != torch.bool or where.shape != real.shape):
            raise EditError(
                f"where of dtype {where.dtype} and shape {list(where.shape)}; expected truth values {list(real.shape)}"
            )
        self.edited = real if where is None else real & where.to(self.device)
        if not bool(self.edited.any()):
            raise EditError("where leaves no token to edit; give at least one")

    def batches(
        self, tokens: int | None, through_blocks: bool, n_edits: int, among: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Batches of prompts, the longest first, so that memory runs out at once if it does.

        among: some of the prompts; batches then hold indices into it.
        """
        cpu = self.device.type == "cpu"
        most = tokens or (1024 if cpu else 8192)
        if not through_blocks:  # all logits of a batch are held
            most = min(most, 8 * (LOGITS if cpu else LOGITS_GPU) // ((n_edits + 1) * self.model.vocab_size))
        length = self.length if among is None else self.length[among]
        alone = depends_on_batch(self.model.hf, int(length.max()))
        order = length.argsort(descending=True, stable=True)
        while len(order):
            size = 1 if alone else max(1, most // int(length[order[0]]))
            yield order[:size]
            order = order[size:]

    def read(self, prompts: Tensor, edits: Mapping[str, Edit], through_blocks: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt and position of each token of some prompts, and its clean loss, then KL and loss of each edit, `[number, token]`."""
        width = int(self.length[prompts].max())
        row, position = (torch.arange(width, device=self.device) < self.length[prompts, None]).nonzero(as_tuple=True)
        if through_blocks:
            clean = self.recording.final_hidden[prompts[row], position]
            found = [self.above(prompts, width, name, edit)[row, position] for name, edit in edits.items()]
        else:
            clean = self.full(prompts, width)[row, position]
            found = [self.full(prompts, width, name, edit)[row, position] for name, edit in edits.items()]
        prompt, last = prompts[row], position + 1 == self.length[prompts[row]]
        target = self.tokens[prompt, torch.where(last, position, position + 1)]
        numbers = self.compared(clean, found, target, hidden=through_blocks)
        numbers[0::2, last] = torch.nan  # nothing follows: no loss
        return prompt, position, numbers

    def above(self, prompts: Tensor, width: int, name: str, edit: Edit) -> Float[Tensor, "prompt pos d_model"]:
        """Final hidden states of the stream passed through an edit, by the blocks above the site alone."""
        recording, site = self.recording, self.site
        if site.entry not in recording.activations:
            raise SiteError(
                f"site {site.entry} was not recorded; recorded: {', '.join(map(str, recording.activations)) or 'none'}"
            )
        change = self.change(prompts, width, name, edit)
        value = recording.activations[site.entry][prompts, :width]
        with recording.held(), ExitStack() as stack:
            if site.entry == site:
                value = change(value)
            stack.enter_context(entering_at(recording, site.first_block, value))
            if site.entry != site:
                stack.enter_context(at_site(self.model, site, change))
            forget_longer_passes(self.model.hf)
            return self.model.base(input_ids=self.tokens[prompts, :width], use_cache=False).last_hidden_state.to(
                self.device
            )

    def full(
        self, prompts: Tensor, width: int, name: str = "", edit: Edit | None = None
    ) -> Float[Tensor, "prompt pos vocab"]:
        """Logits of full forward passes with an edit at the site (none: clean), by the wrapper's own hooks."""
        edits = [] if edit is None else [(self.site, self.change(prompts, width, name, edit))]
        return hooked_logits(self.model, self.tokens[prompts, :width], edits)

    def change(self, prompts: Tensor, width: int, name: str, edit: Edit) -> Edit:
        """A function of the activations at the site, `[prompt, pos, d_model]`, that applies `edit` at the tokens to be edited."""
        which = self.edited[prompts, :width].nonzero(as_tuple=True)

        def change(value: Tensor) -> Tensor:
            old = value[which]
            new = edit(old) if len(old) else old
            if new.shape != old.shape:
                raise EditError(
                    f"edit {name!r} gave shape {list(new.shape)}; expected {list(old.shape)}, a vector for each token"
                )
            return value.index_put(which, new.to(value))

        return change

    def compared(
        self, clean: Tensor, edited: list[Tensor], target: Int[Tensor, "token"], hidden: bool
    ) -> Float[Tensor, "number token"]:
        """Clean loss, then KL and loss of each edit, from logits or final hidden states; the clean side is computed once.

        With d = log q − log p + c, c such that Σ p·d = 0:  KL = log Σ p·exp(d), and −log q = −log p − d + KL.
        """
        cpu, vocab = self.device.type == "cpu", self.model.vocab_size
        many = max(1, (LOGITS if cpu else LOGITS_GPU) // vocab)
        few = max(1, COMPARED // vocab) if cpu else many
        head: Callable[[Tensor], Tensor] = partial(unembed, self.recording) if hidden else lambda logits: logits
        parts = []
        for start in range(0, len(clean), many):
            some = slice(start, start + many)
            sides = [CleanSide(part) for part in head(clean[some]).split(few)]
            targets = target[some, None].split(few)
            loss = torch.cat([-side.log_p.gather(1, next_)[:, 0] for side, next_ in zip(sides, targets, strict=True)])
            numbers = [loss]
            for one in edited:
                kl, change = [], []
                for side, part, next_ in zip(sides, head(one[some]).split(few), targets, strict=True):
                    comparison = Comparison(side, part)
                    kl.append(comparison.kl)
                    change.append(comparison.d.gather(1, next_)[:, 0])
                numbers += [torch.cat(kl), loss - torch.cat(change) + torch.cat(kl)]
            parts.append(torch.stack(numbers))
        return torch.cat(parts, dim=1)


def _spliced(
    passes: Passes,
    edits: Mapping[str, Edit],
    path: str,
    batch_tokens: int | None,
    progress: Callable[[int], object] | None,
) -> Spliced:
    recording = passes.recording
    why, delta = checked_path(passes, path, stacklevel=5)
    through_blocks = path != "hooks" and why is None
    dtype = torch.promote_types(passes.model.dtype, torch.float32)
    values = torch.full((1 + 2 * len(edits), *recording.tokens.shape), torch.nan, dtype=dtype)
    for prompts in passes.batches(batch_tokens, through_blocks, len(edits)):
        prompt, position, numbers = passes.read(prompts, edits, through_blocks)
        values[:, prompt.cpu(), position.cpu()] = numbers.cpu()
        if progress is not None:
            progress(len(prompts))
    real = torch.arange(values.shape[2]) < recording.length[:, None]
    return Spliced(
        dict(zip(edits, values[1::2], strict=True)),
        dict(zip(edits, values[2::2], strict=True)),
        values[0],
        "blocks" if through_blocks else "hooks",
        delta,
        why,
        {name: int((~kl.isfinite() & real).sum()) for name, kl in zip(edits, values[1::2], strict=True)},
    )


def checked_path(passes: Passes, path: str, stacklevel: int) -> tuple[str | None, float]:
    """`why_not_blocks`, unless the path is `hooks`. Warns where `auto` falls back to hooks; raises `ReplayError` for `blocks`."""
    why, delta = (None, float("nan")) if path == "hooks" else why_not_blocks(passes)
    if why is not None:
        message = f"the blocks above {passes.site} alone do not give what full forward passes give: {why}"
        if path == "blocks":
            raise ReplayError(f"{message}; use path='auto' or 'hooks'")
        warnings.warn(f"{message}; these are used instead", stacklevel=stacklevel)
    return why, delta


def why_not_blocks(passes: Passes) -> tuple[str | None, float]:
    """Why the blocks above the site do not match full forward passes (None: they do), and the largest logit difference.

    Tested on the longest prompt, since a sliding window shows only there, with noise of 0.3 times the activations' size at every
    token: with an SAE's edit, rounding could move a latent across its threshold.
    """
    model, longest = passes.model, passes.length.argmax()[None]
    width = int(passes.length[longest])

    def noise(x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        return x + 0.3 * x.float().pow(2).mean(-1, keepdim=True).sqrt().to(x) * drawn

    everywhere = Passes(passes.recording, passes.site, None)
    slow = everywhere.full(longest, width, "noise", noise)[0, -_TRIAL_TOKENS:]
    if bool((slow.amax(-1).isinf() | slow.isnan().any(-1)).any()):
        return "the model's own logits are not finite", float("nan")
    try:
        hidden = everywhere.above(longest, width, "noise", noise)[0, -_TRIAL_TOKENS:]
        fast = unembed(passes.recording, hidden)
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        if isinstance(error, MechdiagError) or is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0]}", float("nan")
    delta, allowed = logits_differ(fast, slow, model.dtype)
    return (None if delta <= allowed else f"logits differ by {delta:.1e}, allowed {allowed:.1e}"), delta
