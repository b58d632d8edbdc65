"""A two-layer attention-only GPT-2 whose weights are set by hand: it completes `A B … A` with `B`, and how is known.

The residual stream is (u, −u), so that LayerNorm's mean is 0; u has slots for the token, its position, the previous
token, the output and writes that nothing reads, and one constant so large that LayerNorm divides by nearly the same number
everywhere. Head `PREVIOUS` finds position p − 1 by position and writes its token into the slot `previous`. Head `INDUCTION`
matches its own token (q) with `previous` (k) and writes the token found (v) into `output`, all that the unembedding reads;
with no match it looks at BOS. The other heads act too: `TWINS` do the same, but write where nothing reads; the rest are random.
"""

from typing import Any, Literal, NamedTuple

import torch
import transformers

VOCAB, N_POSITIONS, N_HEADS, D_HEAD, BOS = 16, 16, 4, 40, 0
PREVIOUS, INDUCTION = (0, 1), (1, 2)
TWINS = ((0, 2), (1, 0))
HEADS = tuple((layer, head) for layer in (0, 1) for head in range(N_HEADS))
LOGIT = 10.0
"""The answer's logit: the metric (right − wrong) is 10 on clean prompts; on corrupt ones 0 (source) or −10 (answer, query)."""
INERT = 1e-3
"""Bound on shares whose truth is 0. Token and position make |u|² = 128² + 2; the two heads of the circuit add at most 2 and the
other six, which write 1/2 each, at most 3²: LayerNorm's scale varies by 11/(2 · 128²), and two norms stand on the path."""

KINDS = ("source", "answer", "query")
"""What differs: the first A (then no match), the B behind it, or the last A, which becomes C (then D follows)."""
CELLS = {
    "source": {(*PREVIOUS, "B"), (*INDUCTION, "END")},
    "answer": {(*INDUCTION, "END")},
    "query": {(*INDUCTION, "END")},
}
"""(layer, head, role) whose z alone has a share of 1, denoising and noising; all others have 0."""
EDGES = {
    "source": {("embedding", PREVIOUS, "v", "A"), (PREVIOUS, INDUCTION, "k", "B"), (INDUCTION, "logits", "", "END")},
    "answer": {("embedding", INDUCTION, "v", "B"), (INDUCTION, "logits", "", "END")},
    "query": {("embedding", INDUCTION, "q", "END"), (INDUCTION, "logits", "", "END")},
}
"""(sender, receiver, through, role of the position sent from) with a share of 1 in both directions; all others have 0."""
CIRCUITS = {"source": {PREVIOUS, INDUCTION}, "answer": {INDUCTION}, "query": {INDUCTION}}
"""Smallest faithful circuits: in the clean run, all z outside corrupt at all positions, these heads keep a share of 1 and every set
of heads that lacks one of them has 0. (Put clean into the corrupt run, `INDUCTION` alone suffices: its z holds the answer.)"""

_HALF = N_HEADS * D_HEAD // 2
_CONSTANT, _SHARP = 128.0, 40.0
_SLOTS = ("token", "position", "previous", "output", "unread")


class Pair(NamedTuple):
    kind: str
    clean: list[int]
    corrupt: list[int]
    right: int
    wrong: int
    roles: dict[str, int]
    """BOS, A, B, C, D and END: their positions"""


def _slot(name: str) -> slice:
    start = 16 * _SLOTS.index(name)
    return slice(start, min(start + 16, _HALF - 1))  # the last of u is the constant


def induction_model(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The model: 2 layers of 4 heads, zero MLPs, learned positions, LayerNorm."""
    config = transformers.GPT2Config(
        **{"vocab_size": VOCAB, "n_positions": N_POSITIONS, "n_embd": 2 * _HALF, "n_layer": 2, "n_head": N_HEADS},
        **{"n_inner": 16, "bos_token_id": BOS, "eos_token_id": BOS, "tie_word_embeddings": False},
    )
    config.architectures = ["GPT2LMHeadModel"]
    with torch.random.fork_rng(devices=[]):
        hf: Any = transformers.GPT2LMHeadModel(config)
    hf.to(dtype=dtype).eval().requires_grad_(False)
    for weight in hf.parameters():
        weight.zero_()
    one = torch.eye(16, dtype=dtype)
    hf.transformer.wte.weight[:, _slot("token")] = one
    hf.transformer.wte.weight[:, _HALF - 1] = _CONSTANT
    hf.transformer.wpe.weight[:, _slot("position")] = one
    hf.lm_head.weight[:, _slot("output")] = LOGIT * one
    for weight in (hf.transformer.wte.weight, hf.transformer.wpe.weight):
        weight[:, _HALF:] = -weight[:, :_HALF]
    for norm in (*(n for b in hf.transformer.h for n in (b.ln_1, b.ln_2)), hf.transformer.ln_f):
        norm.weight.fill_(_CONSTANT / _HALF**0.5)  # the norm's output is about (u, −u)
    generator = torch.Generator().manual_seed(0)
    for layer, head in HEADS:
        attention = hf.transformer.h[layer].attn
        reads, bias = _reads(attention, head)
        write = attention.c_proj.weight[head * D_HEAD : (head + 1) * D_HEAD]
        target = "unread"
        if (layer, head) in (PREVIOUS, TWINS[0]):
            reads["q"][_slot("position"), :16] = _SHARP * D_HEAD**0.5 * one
            reads["k"][_slot("position"), 1:17] = one
            target = "previous" if (layer, head) == PREVIOUS else target
        elif (layer, head) in (INDUCTION, TWINS[1]):
            reads["q"][_slot("token"), :16] = _SHARP * D_HEAD**0.5 * one
            reads["k"][_slot("previous"), :16] = one
            bias["q"][16] = _SHARP / 2 * D_HEAD**0.5
            reads["k"][BOS, 16] = 1
            target = "output" if (layer, head) == INDUCTION else target
        else:
            for through in "qk":
                reads[through][: _HALF - 1] = torch.randn(_HALF - 1, D_HEAD, generator=generator).to(dtype)
        reads["v"][_slot("token"), :16] = one
        width = len(range(*_slot(target).indices(_HALF)))
        write[:width, _slot(target)] = torch.eye(width, dtype=dtype) * (0.5 if target == "unread" else 1)
        write[:, _HALF:] = -write[:, :_HALF]
    return hf.to(device)


def _reads(attention: Any, head: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    at = {through: _columns(through, head) for through in "qkv"}
    weight, bias = attention.c_attn.weight, attention.c_attn.bias
    return {t: weight[:_HALF, s] for t, s in at.items()}, {t: bias[s] for t, s in at.items()}


def _columns(through: str, head: int) -> slice:
    start = ("qkv".index(through) * N_HEADS + head) * D_HEAD
    return slice(start, start + D_HEAD)


def pairs(n: int = 4, lengths: tuple[int, ...] = (8, 10, 13), kinds: tuple[str, ...] = KINDS) -> list[Pair]:
    """n pairs of each kind and length ≥ 6: BOS, `A B` and `C D` in random order among fillers, A; all tokens differ but A."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for kind in kinds:
        for length in lengths:
            for _ in range(n):
                words = (1 + torch.randperm(VOCAB - 1, generator=generator)).tolist()
                blocks = [words[:2], words[2:4], *([w] for w in words[4 : length - 2])]
                order = torch.randperm(len(blocks), generator=generator).tolist()
                clean = [BOS, *(w for i in order for w in blocks[i]), words[0]]
                roles = {
                    "BOS": 0,
                    **{r: clean.index(w) for r, w in zip("ABCD", words, strict=False)},
                    "END": length - 1,
                }
                changed = {"source": "A", "answer": "B", "query": "END"}[kind]
                corrupt = list(clean)
                corrupt[roles[changed]] = words[2] if kind == "query" else words[-1]
                wrong = words[-1] if kind == "answer" else words[3]
                found.append(Pair(kind, clean, corrupt, words[1], wrong, roles))
    return found


class Run(NamedTuple):
    """What a forward pass by plain torch hooks leaves; lists have an entry for each layer."""

    logits: torch.Tensor
    """[pos, vocab]"""
    z: list[torch.Tensor]
    """[pos, head * d_head]"""
    qkv: list[torch.Tensor]
    """[pos, 3 * head * d_head]"""

    def metric(self, pair: Pair) -> float:
        return float(self.logits[-1, pair.right] - self.logits[-1, pair.wrong])


@torch.no_grad()
def forward(hf: Any, tokens: list[int], *, z=None, qkv=None, seen=None) -> Run:
    """One forward pass of one prompt. z, qkv: {layer: change}, a function of what stands there, `[pos, width]`, that returns what
    to put; seen: the same for what a norm alone reads (`ln_1` of that layer, or `ln_f` at "logits")."""
    z, qkv, seen, kept = z or {}, qkv or {}, seen or {}, {}
    handles = []
    for layer, block in enumerate(hf.transformer.h):

        def put(_, args, layer=layer):
            kept["z", layer] = z.get(layer, lambda x: x)(args[0][0])
            return (kept["z", layer][None],)

        def project(_, __, output, layer=layer):
            kept["qkv", layer] = qkv.get(layer, lambda x: x)(output[0])
            return kept["qkv", layer][None]

        handles += [
            block.attn.c_proj.register_forward_pre_hook(put),
            block.attn.c_attn.register_forward_hook(project),
        ]
    for place, change in seen.items():
        norm = hf.transformer.ln_f if place == "logits" else hf.transformer.h[place].ln_1
        handles.append(norm.register_forward_pre_hook(lambda _, args, change=change: (change(args[0][0])[None],)))
    try:
        logits = hf(input_ids=torch.tensor([tokens], device=hf.lm_head.weight.device)).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    layers = range(len(hf.transformer.h))
    return Run(logits, [kept["z", i] for i in layers], [kept["qkv", i] for i in layers])


Direction = Literal["denoise", "noise"]
Edge = tuple[Any, Any, str]
"""sender, receiver, through"""


class Slow:
    """A pair's shares by one plain forward pass each: (m − m_base)/(m_source − m_base), base the run that is changed."""

    def __init__(self, hf: Any, pair: Pair, direction: Direction = "denoise") -> None:
        prompts = (pair.corrupt, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupt)
        self.hf, self.pair, (self.tokens, other) = hf, pair, prompts
        self.base, self.source = forward(hf, self.tokens), forward(hf, other)
        wte = hf.transformer.wte.weight
        self.embedded = wte[torch.tensor(other)] - wte[torch.tensor(self.tokens)]

    def share(self, run: Run) -> float:
        low, high = self.base.metric(self.pair), self.source.metric(self.pair)
        return (run.metric(self.pair) - low) / (high - low)

    def joint(self, cells) -> float:
        """z of all (layer, head, position) at once from the source run; position None: all positions."""
        cells = list(cells)

        def change(layer: int):
            def put(z):
                z = z.clone()
                for _, head, at in (c for c in cells if c[0] == layer):
                    here, width = slice(None) if at is None else at, slice(head * D_HEAD, (head + 1) * D_HEAD)
                    z[here, width] = self.source.z[layer][here, width]
                return z

            return put

        return self.share(forward(self.hf, self.tokens, z={layer: change(layer) for layer in (0, 1)}))

    def cell(self, layer: int, head: int, position: int | None) -> float:
        return self.joint([(layer, head, position)])

    def edge(self, sender: Any, receiver: Any, through: str, position: int | None = None) -> float:
        """The receiver alone (head, by its q, k or v; or "logits") sees what the sender (head or "embedding") writes at
        `position` (None: at all) as in the source run; all else is base, and everything runs on from the receiver."""
        if sender == "embedding":
            delta = self.embedded
        else:
            layer, head = sender
            width = slice(head * D_HEAD, (head + 1) * D_HEAD)
            delta = (self.source.z[layer] - self.base.z[layer])[:, width]
            delta = delta @ self.hf.transformer.h[layer].attn.c_proj.weight[width]
        if position is not None:
            delta = delta * (torch.arange(len(delta), device=delta.device) == position)[:, None]
        place: Any = receiver if receiver == "logits" else receiver[0]
        read = forward(self.hf, self.tokens, seen={place: lambda x: x + delta})
        if receiver == "logits":
            return self.share(read)
        at = _columns(through, receiver[1])

        def put(x):
            x = x.clone()
            x[:, at] = read.qkv[place][:, at]
            return x

        return self.share(forward(self.hf, self.tokens, qkv={place: put}))

    def edges(self) -> list[Edge]:
        """Every (sender, receiver, through) that there can be."""
        heads = [
            (s, r, t) for s in ("embedding", *HEADS) for r in HEADS for t in "qkv" if s == "embedding" or s[0] < r[0]
        ]
        return [*heads, *((s, "logits", "") for s in ("embedding", *HEADS))]
