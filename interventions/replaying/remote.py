"""Effects of rows of a model that runs remotely: full forward passes there, and a few numbers a read that travel back."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from interventions.errors import ModelError
from interventions.metrics import METRICS
from interventions.models.causal_model import CausalModel
from interventions.models.remote import envoy, placed_at
from interventions.replaying.chunks import DIRECT, FINITE, Asked
from interventions.replaying.placed import Placed
from interventions.replaying.replay import Branches
from interventions.replaying.rows import Reads, Rows

BATCH_ROWS = 16
"""Rows of equally long prompts in one pass; those of a chunk, all passes together, are one job."""


class Edit(NamedTuple):
    """Vectors put at one site, or added to what stands there."""

    block: Any
    before: bool
    """whether at what the block reads"""
    add: bool
    row: Tensor
    position: Tensor
    vectors: Tensor


class Pass(NamedTuple):
    """One forward pass: clean rows, intervened rows, and rows whose change is carried straight to the final norm."""

    tokens: Tensor
    edits: list[Edit]
    """in the order in which a pass reaches them"""
    clean: Tensor
    """the row that each comparison is with, `[comparison]`"""
    changed: Tensor
    position: Tensor


def remote_chunk(rows: Rows, chunk: np.ndarray, asked: Asked) -> tuple[Reads, dict[str, Tensor]]:
    """The effects of some rows, in one job. Numbers are formed in float64 where the model runs.

    Raises `ModelError` for metrics of tokens, which read logits, and for sites inside a block.
    """
    model = rows.recording.model
    if asked.of_tokens:
        raise ModelError(
            f"{model.name} runs remotely, and {asked.of_tokens[0].name} reads logits, which do not travel; known: "
            f"{', '.join(METRICS)}, {DIRECT}"
        )
    length = rows.recording.length.numpy()[rows.prompt[chunk]]
    passes, all_reads, direct_of = [], [], []
    for n_tokens in np.unique(length):
        alike = np.flatnonzero(length == n_tokens)
        for some in np.split(alike, np.arange(BATCH_ROWS, len(alike), BATCH_ROWS)):
            reads = rows.reads(chunk[some])
            made, own = _pass(rows, chunk[some], reads, int(n_tokens), asked.direct)
            passes.append(made)
            direct_of.append(own)
            all_reads.append(Reads(some[reads.row], reads.column, reads.position))
    names = [name for name in asked.names if name != DIRECT] + ["kl"] * asked.direct + [FINITE]
    found = _job(model.handle, model.remote, passes, list(dict.fromkeys(names)))
    wide = torch.promote_types(model.stream_dtype, torch.float32)
    parts: dict[str, list[Tensor]] = {name: [] for name in [*asked.by_name, *[DIRECT] * asked.direct]}
    for values, reads, own in zip(found, all_reads, direct_of, strict=True):
        n = len(reads.row)
        for name in asked.by_name:
            value = values[name][:n]
            parts[name].append(value.to(wide) if value.is_floating_point() else value)
        if asked.direct:
            at = torch.from_numpy(own)
            parts[DIRECT].append(torch.zeros(n, dtype=wide).index_copy(0, at, values["kl"][n:].to(wide)))
    columns = (np.concatenate(column) for column in zip(*all_reads, strict=True))
    return Reads(*columns), {name: torch.cat(values) for name, values in parts.items()}


def _pass(rows: Rows, some: np.ndarray, reads: Reads, n_tokens: int, direct: bool) -> tuple[Pass, np.ndarray]:
    """The pass of some rows whose prompts have `n_tokens`, and which reads were edited themselves (none unless `direct`)."""
    recording = rows.recording
    model, branches = recording.model, rows.branches(some)
    edits, given = rows.placed(some), rows.reference is not None
    if given:
        prompt, clean_of = rows.prompt[some], np.arange(len(some))
    else:
        prompt, clean_of = np.unique(rows.prompt[some], return_inverse=True)
    n_clean, n_rows = len(prompt), len(some)
    base = rows.placed(some, rows.reference_vectors(some)) if given else []
    put = _put(model, branches, base, 0) + _put(model, branches, edits, n_clean)
    of_row, clean = [prompt, rows.prompt[some]], clean_of[reads.row]
    changed, own = n_clean + reads.row, np.zeros(0, dtype=int)
    if direct:
        edited = branches.edited
        where = {(int(branches.row[t]), int(branches.position[t])): i for i, t in enumerate(edited)}
        which = [where.get((int(r), int(p)), -1) for r, p in zip(reads.row, reads.position, strict=True)]
        own = np.flatnonzero(np.array(which) >= 0)
        delta = (edits[0].vectors - rows.clean_at_site(some))[[which[i] for i in own]]
        row = n_clean + n_rows + np.arange(len(own))
        if given:  # these rows start from the reference
            put += _put(model, branches, base, 0, reads.row[own], n_clean + n_rows)
        last = envoy(model, model.blocks[-1])
        carried = Edit(last, False, True, torch.from_numpy(row), torch.from_numpy(reads.position[own]), delta)
        of_row.append(rows.prompt[some][reads.row[own]])
        clean, changed = np.concatenate([clean, clean[own]]), np.concatenate([changed, row])
        put.append(((model.n_layers, 0), carried))
    tokens = recording.tokens[torch.from_numpy(np.concatenate(of_row)), :n_tokens]
    position = np.concatenate([reads.position, reads.position[own]])
    ordered = [edit for _, edit in sorted(put, key=lambda each: each[0])]
    return Pass(tokens, ordered, *map(torch.from_numpy, (clean, changed, position))), own


def _put(
    model: CausalModel, branches: Branches, edits: list[Placed], first: int, rows: np.ndarray | None = None, to: int = 0
) -> list[tuple[Any, Edit]]:
    """Edits of rows that stand from line `first` on, with their place in the order of a pass; of `rows`, one line each from `to` on."""
    found = []
    for each in edits:
        row, position = branches.row[each.token], branches.position[each.token]
        line, vectors = first + row, each.vectors
        if rows is not None:  # one edited position a row
            order = np.searchsorted(row, rows)
            line, position, vectors = to + np.arange(len(rows)), position[order], vectors[torch.from_numpy(order)]
        block, before = placed_at(model, each.site)
        edit = Edit(block, before, False, torch.from_numpy(line), torch.from_numpy(position), vectors)
        found.append((each.site.rank, edit))
    return found


def _job(handle: Any, remote: Any, passes: list[Pass], names: list[str]) -> list[dict[str, Tensor]]:
    """The numbers of each pass's comparisons, by metric. The body runs where the model is."""
    import nnsight

    work: Any = [(list(map(tuple, each.edits)), *each[:1], *each[2:]) for each in passes]
    with handle.session(remote=remote):
        found = nnsight.save([])
        with torch.no_grad():
            for edits, tokens, clean, changed, position in work:
                with handle.trace(tokens):
                    for block, before, add, row, place, vectors in edits:
                        output = block.input if before else block.output
                        wrapped = isinstance(output, (tuple, list))
                        new = (output[0] if wrapped else output).clone()
                        new[row, place] = vectors.to(new) + (new[row, place] if add else 0)
                        whole = (new, *output[1:]) if wrapped else new
                        if before:
                            block.input = whole
                        else:
                            block.output = whole
                    logits = handle.output.logits
                    parts = []
                    for start in range(0, len(position), 32):
                        some = slice(start, start + 32)
                        x = logits[clean[some], position[some]].double()
                        y = logits[changed[some], position[some]].double()
                        log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
                        p, q = log_p.exp(), log_q.exp()
                        w = log_q - log_p
                        top = x.argmax(-1, keepdim=True)
                        drop = (log_p - log_q).gather(-1, top)[:, 0]
                        moved = y.gather(-1, top)[:, 0] < y.amax(-1)
                        # sum of p(e^w - 1 - w), whose terms are never negative
                        near = torch.where(
                            w.abs() < 1, p * (torch.expm1(w) - w), q - p - torch.where(p > 0, p * w, 0.0)
                        )
                        middle = torch.logaddexp(log_p, log_q) - 0.6931471805599453
                        half = torch.where(p > 0, p * (log_p - middle), 0.0) + torch.where(
                            q > 0, q * (log_q - middle), 0.0
                        )
                        sound = x.amax(-1).isfinite() & y.amax(-1).isfinite()
                        every = {
                            "kl": near.sum(-1),
                            "js": half.sum(-1) / 2,
                            "top1_changed": moved & sound,
                            "top1_drop": drop,
                            "top1": torch.where(sound, torch.where(moved, y.argmax(-1), top[:, 0]), -1),
                            "clean_top1": torch.where(x.amax(-1).isfinite(), top[:, 0], -1),
                            "clean_entropy": -torch.where(p > 0, p * log_p, 0.0).sum(-1),
                            "finite": sound,
                        }
                        parts.append(every)
                    numbers = {}
                    for name in names:
                        numbers[name] = torch.cat([part[name] for part in parts]).cpu()
                    found.append(numbers)
    return found
