#!/usr/bin/env python
"""Seconds a map of activation patching, side by side in one run: ours, TransformerLens, and the best that one writes by hand."""

import contextlib
import importlib
import importlib.util
import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pandas as pd
import torch
from torch import Tensor
from transformers import DynamicCache

from diagnostics.commands import command
from diagnostics.commands.ranges import PositiveFloat
from interventions.errors import MechdiagError
from interventions.files import claim_folder, write_json
from interventions.models.causal_model import CausalModel
from interventions.models.compat import cache_name
from interventions.models.loading import load_model, resolve_device
from interventions.provenance import model_provenance
from interventions.texts.prompts import load_texts, tokenize

BATCH = 32  # cells in one pass of the scripts by hand
LENGTH = 128  # tokens of the long prompt
TOLERANCE = 1e-4  # of m_clean − m_corrupt: how far two ways to one cell may be apart
HEADS = ("z", "q", "k", "v", "pattern")  # get_act_patch_attn_head_by_pos_every stacks these
BLOCKS = ("resid_pre", "attn_out", "mlp_out")  # get_act_patch_block_every stacks these
EDGES = ("edge",)  # head → query of a later head, at all positions: get_act_patch_direct_path_all_sources
MAPS = {"heads, z": ("z",), "heads, z q k v pattern": HEADS, "blocks": BLOCKS, "edges, q": EDGES}
THEIRS = "TransformerLens"


@dataclass(frozen=True, kw_only=True)
class BenchOptions(command.OutputOptions):
    """Seconds a map of activation patching (denoising) for one pair of prompts: ours against TransformerLens and scripts by hand.

    Pairs: an IOI prompt with S2 replaced by IO, the same with the names swapped everywhere (they differ from token 1 on), and 128 tokens
    that differ in the last quarter. Maps: all heads (z; or z, q, k, v and pattern) or resid_pre, attn_out and mlp_out by position, and
    edges from every head into the query of every later one. By hand, each in batches of 32 cells: hooked forward passes; from the
    recorded residual stream of the patched block up; the same with keys and values of earlier tokens kept, so that only later tokens
    run. The scripts leave out cells before the first token that differs, whose effect is 0 exactly. TransformerLens runs every cell.

    Where a map takes longer than --seconds, an even sample of its cells is timed and scaled up; the table says how many. All ways
    must agree on the cells of largest effect in a sample before anything is timed.

    Example:
      scripts/bench_patching.py --out results/bench_patching
    """

    model: str = "smollm2-135m"
    """smollm2-135m (packaged), a folder, or a Hugging Face hub id of the Llama architecture"""
    pairs: tuple[str, ...] = ("S2", "early", "quarter")
    """pairs to time: S2, early, quarter"""
    seconds: PositiveFloat = 10
    """time for each way of each map; at least two batches are timed"""
    device: str | None = None
    """cpu, cuda, cuda:1 (default: cuda if available)"""
    out: Path
    """folder for bench_patching.json"""


class Pair(NamedTuple):
    """Prompts of equal length, and the two answers whose logit difference at the last position is the metric m."""

    clean: list[int]
    corrupt: list[int]
    right: int
    wrong: int

    @property
    def first(self) -> int:
        """Position of the first token that differs."""
        return next(i for i, (a, b) in enumerate(zip(self.clean, self.corrupt, strict=True)) if a != b)


class Cell(NamedTuple):
    """What is patched: a vector of one token, or the edge from head `sender` to the query of head (layer, head)."""

    kind: str
    layer: int
    position: int = -1
    head: int = 0
    sender: tuple[int, int] = (-1, -1)


class Way(Protocol):
    """One way to a map. Made anew for each map: what its making costs counts."""

    name: str

    def batches(self, kinds: Sequence[str]) -> list[list[Cell]]:
        """Cells that are computed together; empty: this way has no such map."""
        ...

    def n_cells(self, kinds: Sequence[str]) -> int:
        """How many cells it would compute for the whole map; `batches` may hold fewer."""
        ...

    def values(self, batch: Sequence[Cell]) -> list[float]:
        """The corrupt prompt's m with each cell patched from the clean one."""
        ...


@torch.no_grad()
def main(options: BenchOptions) -> command.Document:
    """Run the command: one table, with ratios of numbers from this run."""
    out = claim_folder(options.out, ["bench_patching.json"], options.overwrite)
    if unknown := set(options.pairs) - {"S2", "early", "quarter"}:
        raise MechdiagError(f"no pair {min(unknown)!r}; known: S2, early, quarter")
    device = resolve_device(options.device)
    model = load_model(options.model, dtype="float32", device=device)
    plain = load_model(options.model, dtype="float32", device=device)  # a separate copy: a bridge changes its model
    bridge = _bridge(options.model, plain)
    found = []
    for name in options.pairs:
        pair = _pair(model, name)
        makers: list[Callable[[], Way]] = [lambda p=pair: TransformerLens(bridge, p)]
        makers += [lambda p=pair, k=kind: k(model, p) for kind in (Hooked, FromLayer, KeptKeys)]
        if _built("diagnostics.patching.result"):
            makers.append(lambda p=pair: Ours(model, p))
        for title, kinds in MAPS.items():
            if (kinds == EDGES and name != "S2") or (kinds == HEADS and name == "early"):
                continue
            _check(model, makers, pair, kinds)
            rows = [_timed(make, kinds, options.seconds) for make in makers]
            theirs = next((row["seconds"] for row in rows if row and row["way"] == THEIRS), float("nan"))
            rows = [
                {
                    "pair": name,
                    "tokens": len(pair.clean),
                    "map": title,
                    **row,
                    "× TransformerLens": theirs / row["seconds"],
                }
                for row in rows
                if row
            ]
            options.say(pd.DataFrame(rows).to_string(index=False, float_format=lambda x: f"{x:.3g}") + "\n")
            found += rows
    options.say("seconds: for the whole map, scaled up from the cells timed; cells: how many the way computes for it")
    document = {"rows": found, "threads": torch.get_num_threads(), "provenance": model_provenance(model)}
    write_json(out / "bench_patching.json", document)
    options.say(f"wrote bench_patching.json into {out}")
    return {**document, "out": str(out), "files": ["bench_patching.json"]}


def _pair(model: CausalModel, name: str) -> Pair:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise MechdiagError("the model has no tokenizer, so it cannot read text; name another")
    if name == "quarter":
        return _quarter(model)
    text = "When {} and {} went to the store, {} gave a drink to"
    names = ("John", "Mary", "Mary") if name == "early" else ("Mary", "John", "Mary")
    clean, corrupt = (tokenizer(text.format(*who)).input_ids for who in (("Mary", "John", "John"), names))
    right, wrong = (tokenizer(word).input_ids[-1] for word in (" Mary", " John"))
    return Pair(clean, corrupt, right, wrong)


def _quarter(model: CausalModel) -> Pair:
    """Packaged text whose last quarter is replaced by another text's; the answers are what the model expects after each."""
    texts = load_texts("boolq", n=100).texts
    stream = [token for prompt in tokenize(texts, model.tokenizer, max_length=10**6).tokens for token in prompt]
    pieces = [stream[i : i + LENGTH] for i in range(0, len(stream) - LENGTH + 1, LENGTH)]
    kept = LENGTH * 3 // 4
    for clean, other in itertools.pairwise(pieces):
        corrupt = clean[:kept] + other[kept:]
        ids = torch.tensor([clean, corrupt], device=model.device)
        right, wrong = model.hf(input_ids=ids).logits[:, -1].argmax(-1).tolist()
        if right != wrong and clean[kept] != corrupt[kept]:
            return Pair(clean, corrupt, right, wrong)
    raise MechdiagError(f"the model expects the same after both of {len(pieces)} pairs of texts; name another model")


def _built(module: str) -> bool:
    """Whether this part of the toolkit exists in this version."""
    package = module.rpartition(".")[0]
    return (package == "diagnostics" or _built(package)) and importlib.util.find_spec(module) is not None


def _bridge(name: str, plain: CausalModel) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    architecture = "HuggingFaceTB/SmolLM2-135M-Instruct" if name == "smollm2-135m" else name
    return TransformerBridge.boot_transformers(architecture, hf_model=plain.hf, tokenizer=plain.tokenizer)


def _evenly(batches: list[list[Cell]]) -> list[list[Cell]]:
    """The same in an order of which every beginning of even length is spread evenly over the list, and balanced about its middle.

    So costs that fall from block to block are sampled without bias.
    """
    n = len(batches)
    spread = sorted(range(n), key=lambda i: (0.5 + i * 0.6180339887498949) % 1)
    return [batches[i] for i in dict.fromkeys(j for i in spread for j in (i, n - 1 - i))]


def _check(model: CausalModel, makers: list[Callable[[], Way]], pair: Pair, kinds: Sequence[str]) -> None:
    """Raise `MechdiagError` unless all ways agree on three cells of each kind: those of largest effect in a sample."""
    theirs, *others = (make() for make in makers)
    m_clean, m_corrupt = _end_points(model, pair)
    for kind in kinds:
        having = [way for way in others if way.batches([kind])]
        if not having:
            continue
        scorer = theirs if kind == "edge" and theirs.batches([kind]) else having[min(2, len(having) - 1)]
        effects: dict[Cell, float] = {}
        for batch in _evenly(scorer.batches([kind]))[: 1 if kind == "edge" else 3]:
            effects |= dict(zip(batch, scorer.values(batch), strict=True))
        chosen = sorted(effects, key=lambda cell: -abs(effects[cell] - m_corrupt))[:3]
        found = {scorer.name: [effects[cell] for cell in chosen]}
        for way in (*[theirs] * bool(theirs.batches([kind])), *having):
            if way is not scorer:
                groups = [chosen] if isinstance(way, Ours) else [[cell] for cell in chosen]
                found[way.name] = [value for group in groups for value in way.values(group)]
        table = torch.tensor(list(found.values()))
        if not (table.amax(0) - table.amin(0)).max() <= TOLERANCE * abs(m_clean - m_corrupt):
            raise MechdiagError(f"the ways disagree on {chosen}: {found}; expected the same from all")


def _end_points(model: CausalModel, pair: Pair) -> tuple[float, float]:
    """m of the clean and of the corrupt prompt."""
    logits = model.hf(input_ids=torch.tensor([pair.clean, pair.corrupt], device=model.device)).logits[:, -1]
    clean, corrupt = (logits[:, pair.right] - logits[:, pair.wrong]).tolist()
    return clean, corrupt


def _timed(make: Callable[[], Way], kinds: Sequence[str], limit: float) -> dict[str, Any] | None:
    """Seconds for the whole map, from the batches that fit into `limit` seconds, and how many cells these are."""
    start = time.perf_counter()
    way = make()
    setup = time.perf_counter() - start
    batches = _evenly(way.batches(kinds))
    n, done, seconds = way.n_cells(kinds), 0, 0.0
    for i, batch in enumerate(batches):
        if i >= 2 and i % 2 == 0 and seconds > limit:
            break
        start = time.perf_counter()
        way.values(batch)
        seconds += time.perf_counter() - start
        done += len(batch)
    if not done:
        return None
    return {"way": way.name, "seconds": setup + seconds * n / done, "cells": n, "timed": done}


def _cells(kinds: Sequence[str], layers: int, positions: range, heads: int, kv_heads: int) -> list[Cell]:
    found = []
    for kind in kinds:
        if kind == "edge":
            senders = itertools.product(range(layers), range(heads))
            found += [
                Cell("edge", layer, head=head, sender=(sender, h))
                for sender, h in senders
                for layer in range(sender + 1, layers)
                for head in range(heads)
            ]
        else:
            n = 1 if kind in BLOCKS else kv_heads if kind in ("k", "v") else heads
            found += [
                Cell(kind, layer, position, head)
                for layer, position, head in itertools.product(range(layers), positions, range(n))
            ]
    return found


class TransformerLens:
    """The functions that `transformer_lens.patching` stacks, with some of their cells: one hooked forward pass a cell."""

    name = THEIRS

    def __init__(self, bridge: Any, pair: Pair):
        self.bridge, self.pair = bridge, pair
        self.device = next(bridge.original_model.parameters()).device
        self.corrupt = torch.tensor([pair.corrupt], device=self.device)
        self.clean_cache = bridge.run_with_cache(torch.tensor([pair.clean], device=self.device))[1]

    @cached_property
    def corrupt_cache(self) -> Any:
        return self.bridge.run_with_cache(self.corrupt)[1]

    def metric(self, logits: Tensor) -> Tensor:
        return logits[0, -1, self.pair.right] - logits[0, -1, self.pair.wrong]

    def _all(self, kinds: Sequence[str]) -> list[Cell]:
        c = self.bridge.cfg
        return _cells(kinds, c.n_layers, range(len(self.pair.clean)), c.n_heads, c.n_key_value_heads or c.n_heads)

    def n_cells(self, kinds: Sequence[str]) -> int:
        return len(self._all(kinds))

    def batches(self, kinds: Sequence[str]) -> list[list[Cell]]:
        """Single cells; edges: those of each head three quarters of the way up, since each edge is one whole forward pass.

        No edges where this release has no function for them (before 4).
        """
        if "edge" not in kinds:
            return [[cell] for cell in self._all(kinds)]
        if not hasattr(importlib.import_module("transformer_lens.patching"), "get_act_patch_direct_path"):
            return []
        layer = self.bridge.cfg.n_layers * 3 // 4
        edges = [cell for cell in self._all(EDGES) if cell.sender[0] == layer]
        return [list(group) for _, group in itertools.groupby(edges, key=lambda cell: cell.sender)]

    def values(self, batch: Sequence[Cell]) -> list[float]:
        from transformer_lens import patching

        kind = batch[0].kind
        if kind == "edge":
            caches = self.clean_cache, self.corrupt_cache
            found = patching.get_act_patch_direct_path(
                self.bridge, self.corrupt, *caches, self.metric, *batch[0].sender, "q", False
            )
            return [found[cell.layer, cell.head].item() for cell in batch]
        name = kind if kind in BLOCKS else f"attn_head_{'out' if kind == 'z' else kind}_by_pos"
        function = getattr(patching, f"get_act_patch_{name}")
        rows = [(c.layer, c.position, c.head)[: 2 if kind in BLOCKS else 3] for c in batch]
        if kind == "pattern":
            rows = [(layer, head, position) for layer, position, head in rows]
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            return function(
                self.bridge,
                self.corrupt,
                self.clean_cache,
                self.metric,
                index_axis_names=None,
                index_df=pd.DataFrame(rows),
            ).tolist()


class ByHand:
    """What a careful user writes for a Llama in PyTorch: 32 cells of one block and kind in a batch, none whose effect is 0.

    Patterns are left out: the model's fused attention forms none.
    """

    name = "by hand"

    def __init__(self, model: CausalModel, pair: Pair):
        self.model, self.pair, self.first = model, pair, pair.first
        self.base: Any = model.base
        self.blocks, self.cache_name = self.base.layers, cache_name(self.base) or "cache"
        attention = self.blocks[0].self_attn
        self.width = attention.head_dim
        self.heads = attention.q_proj.out_features // self.width
        self.kv_heads = attention.k_proj.out_features // self.width
        self.tokens = torch.tensor([pair.corrupt], device=model.device)
        self.clean, _ = self._recorded(torch.tensor([pair.clean], device=model.device))
        self.recorded, self.keys = self._recorded(self.tokens)
        position = torch.arange(len(pair.clean), device=model.device)[None]
        self.cos, self.sin = self.base.rotary_emb(self.recorded["resid_pre", 0], position_ids=position)
        unembedding = model.hf.get_output_embeddings().weight
        self.direction = unembedding[pair.right] - unembedding[pair.wrong]
        self.seen = torch.ones(len(pair.clean), len(pair.clean), dtype=torch.bool, device=model.device).tril()[
            None, None
        ]
        self.writes: dict[tuple[int, int], Tensor] = {}

    def _recorded(self, tokens: Tensor) -> tuple[dict[tuple[str, int], Tensor], list[tuple[Tensor, Tensor]]]:
        found: dict[tuple[str, int], Tensor] = {}
        hooks = []
        for layer, block in enumerate(self.blocks):
            for kind in (*HEADS[:4], *BLOCKS):
                module, before = _place(block, kind)

                def see(x: Tensor, key: tuple[str, int] = (kind, layer)) -> None:
                    found[key] = x[0]

                if before:
                    hooks.append(module.register_forward_pre_hook(lambda _, args, see=see: see(args[0])))
                else:
                    hooks.append(module.register_forward_hook(lambda _, __, out, see=see: see(out)))
        cache = DynamicCache()
        self.base(input_ids=tokens, use_cache=True, **{self.cache_name: cache})
        for hook in hooks:
            hook.remove()
        layers: Any = cache.layers
        return found, [(layer.keys, layer.values) for layer in layers]

    def n_cells(self, kinds: Sequence[str]) -> int:
        return sum(map(len, self.batches(kinds)))

    def batches(self, kinds: Sequence[str]) -> list[list[Cell]]:
        if "pattern" in kinds:
            return []
        cells = _cells(kinds, len(self.blocks), range(self.first, len(self.pair.clean)), self.heads, self.kv_heads)
        found = []
        for _, group in itertools.groupby(sorted(cells), key=lambda cell: (cell.kind, cell.layer)):
            rows = list(group)
            found += [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        return found

    @contextlib.contextmanager
    def putting(self, batch: Sequence[Cell], start: int) -> Iterator[None]:
        """Hooks that patch row i of a pass as cell i says. start: position of the pass's first token."""
        layer, kind = batch[0].layer, batch[0].kind
        head = torch.tensor([cell.head for cell in batch], device=self.tokens.device)
        if kind == "edge":
            kind, values = "q", self._queries(batch, head)
            at = torch.arange(self.first, len(self.pair.clean), device=head.device).expand(len(batch), -1)
        else:
            at = torch.tensor([[cell.position] for cell in batch], device=head.device)
            values = self.clean[kind, layer][at]
            if kind not in BLOCKS:
                values = values.unflatten(-1, (-1, self.width))[torch.arange(len(batch)), :, head]
        first = torch.zeros_like(head) if kind in BLOCKS else head * self.width
        columns = first[:, None] + torch.arange(values.shape[-1], device=head.device)
        rows = torch.arange(len(batch), device=head.device)[:, None, None]

        def put(x: Tensor) -> Tensor:
            x = x.clone()
            x[rows, (at - start)[:, :, None], columns[:, None]] = values
            return x

        module, before = _place(self.blocks[layer], kind)
        if before:
            hook = module.register_forward_pre_hook(lambda _, args: (put(args[0]), *args[1:]))
        else:
            hook = module.register_forward_hook(lambda _, __, out: put(out))
        try:
            yield
        finally:
            hook.remove()

    def _queries(self, batch: Sequence[Cell], head: Tensor) -> Tensor:
        """Queries of the receiving heads where each reads its sender's clean output and else the corrupt residual stream."""
        for layer, h in {cell.sender for cell in batch} - self.writes.keys():
            columns = slice(h * self.width, (h + 1) * self.width)
            change = (self.clean["z", layer] - self.recorded["z", layer])[self.first :, columns]
            self.writes[layer, h] = change @ self.blocks[layer].self_attn.o_proj.weight[:, columns].T
        block = self.blocks[batch[0].layer]
        change = torch.stack([self.writes[cell.sender] for cell in batch])
        queries = block.self_attn.q_proj(
            block.input_layernorm(self.recorded["resid_pre", batch[0].layer][self.first :] + change)
        )
        return queries.unflatten(-1, (-1, self.width))[torch.arange(len(batch)), :, head]

    def upwards(self, batch: Sequence[Cell], start: int) -> list[float]:
        """From the recorded input of the cells' block up, tokens from `start` on, which see the kept keys of earlier ones."""
        layer = batch[0].layer
        x = self.recorded["resid_pre", layer][start:].expand(len(batch), -1, -1)
        kept = {} if start == 0 else {self.cache_name: _Kept(self.keys, start)}
        mask = None if start == 0 else self.seen[:, :, start:]
        with self.putting(batch, start):
            for block in self.blocks[layer:]:
                x = block(
                    x, attention_mask=mask, position_embeddings=(self.cos[:, start:], self.sin[:, start:]), **kept
                )
                x = x[0] if isinstance(x, tuple) else x
        return (self.base.norm(x[:, -1]) @ self.direction).tolist()

    def values(self, batch: Sequence[Cell]) -> list[float]:
        raise NotImplementedError


class Hooked(ByHand):
    name = f"by hand: {BATCH} hooked forward passes"

    def values(self, batch: Sequence[Cell]) -> list[float]:
        with self.putting(batch, 0):
            logits = self.model.hf(
                input_ids=self.tokens.expand(len(batch), -1), use_cache=False, logits_to_keep=1
            ).logits[:, -1]
        return (logits[:, self.pair.right] - logits[:, self.pair.wrong]).tolist()


class FromLayer(ByHand):
    name = "by hand: from the patched block up"

    def values(self, batch: Sequence[Cell]) -> list[float]:
        return self.upwards(batch, 0)


class KeptKeys(ByHand):
    name = "by hand: from there up, earlier keys kept"

    def values(self, batch: Sequence[Cell]) -> list[float]:
        edges = batch[0].kind == "edge"
        return self.upwards(batch, self.first if edges else min(cell.position for cell in batch))


class _Kept:
    """Stands for a cache: keys and values of the tokens before `start`, to which nothing is added."""

    def __init__(self, keys: list[tuple[Tensor, Tensor]], start: int):
        self.keys, self.start = keys, start

    def update(self, k: Tensor, v: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        earlier = (kept[:, :, : self.start].expand(len(k), -1, -1, -1) for kept in self.keys[layer])
        return tuple(torch.cat(both, 2) for both in zip(earlier, (k, v), strict=True))  # type: ignore[return-value]


def _place(block: Any, kind: str) -> tuple[Any, bool]:
    """The module that reads (True) or writes (False) what is patched."""
    attention = block.self_attn
    if kind in ("q", "k", "v"):
        return getattr(attention, f"{kind}_proj"), False
    return {
        "z": (attention.o_proj, True),
        "attn_out": (attention.o_proj, False),
        "mlp_out": (block.mlp, False),
        "resid_pre": (block, True),
    }[kind]


class Ours:
    """One call a map."""

    name = "ours"

    def __init__(self, model: CausalModel, pair: Pair):
        self.model, self.pair = model, pair
        base: Any = model.base
        attention = base.layers[0].self_attn
        self.heads = attention.q_proj.out_features // attention.head_dim
        self.kv_heads = attention.k_proj.out_features // attention.head_dim

    def n_cells(self, kinds: Sequence[str]) -> int:
        return len(self.batches(kinds)[0])

    def batches(self, kinds: Sequence[str]) -> list[list[Cell]]:
        if "edge" in kinds and not _built("diagnostics.edges"):
            return []
        return [
            _cells(kinds, self.model.n_layers, range(self.pair.first, len(self.pair.clean)), self.heads, self.kv_heads)
        ]

    def values(self, batch: Sequence[Cell]) -> list[float]:
        kinds = tuple(dict.fromkeys(cell.kind for cell in batch))
        if kinds == EDGES:
            edges = importlib.import_module("diagnostics.edges.run")
            ends = {
                "senders": sorted({cell.sender for cell in batch}),
                "receivers": sorted({(cell.layer, cell.head, "q") for cell in batch}),
            }
            frame = edges.edge_patching(
                self.model, [tuple(self.pair)], **ends, directions=("denoise",), controls=0, floor=0.0
            ).frame
            known = frame.set_index(["receiver_layer", "receiver_head", "sender_layer", "sender_head"])["m"].to_dict()
            return [known[cell.layer, cell.head, cell.sender[0], cell.sender[1]] for cell in batch]
        patching = importlib.import_module("diagnostics.patching.run")
        frame = patching.activation_patching(
            self.model,
            [tuple(self.pair)],
            sites=kinds,
            positions="each",
            directions=("denoise",),
            controls=0,
            floor=0.0,
        ).frame
        known = dict(
            zip(
                itertools.starmap(
                    Cell,
                    frame.assign(head=frame["head"].clip(0))[["site", "layer", "position", "head"]].itertuples(
                        index=False, name=None
                    ),
                ),
                frame["m"],
                strict=True,
            )
        )
        return [known[cell] for cell in batch]


if __name__ == "__main__":
    command.run(BenchOptions, main)
