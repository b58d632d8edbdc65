"""Calls of `measure` and `measure_joint` on a small model, and what a chunk of each costs on the pretended device.

python -m tests.pretend_cuda.calls [--lines]
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import nn

from interventions import Site, measure, record
from interventions.effects import measure_joint
from interventions.metrics import LogitDifference
from interventions.models.memory import Budget
from interventions.replaying.joint import Put
from interventions.replaying.rows import Reference
from tests.pretend_cuda.device import counting, pretended_cuda, total
from tests.tiny import fresh, noise, prompts

_ROWS, _LENGTH = 12, 16
_STUDY = ("kl", "js", "clean_entropy", "top1_changed", "kl_direct")
_TOKENS = LogitDifference([3, 5], [7])
_Call = Callable[..., object]


def calls(hf: nn.Module, budget: Budget | None = None, device: str = "cuda") -> Iterator[tuple[str, _Call]]:
    """Each measures rows of one recording, `batch_rows` tokens at a time."""
    post, added, z = Site(2), Site(3, "attn_out"), Site(3, "z", head=1)
    sites = [post, added, z, Site(2, "neurons", neurons=(1, 4)), Site(3, "k", head=0), Site(3, "pattern", head=2)]
    recording = record(hf, prompts((_LENGTH,) * 4), sites, budget=budget)
    prompt = torch.arange(4).repeat_interleave(_ROWS // 4)
    position = torch.arange(_ROWS) % 3 + 3

    def row_of(site: Site, path: str = "replay", **how: object) -> _Call:
        width = recording.at(site, prompt[:1], position[:1]).shape[1]
        size = torch.linspace(0.9, 1.1, width, device=device)
        vectors = recording.at(site, prompt, position) * size
        if site.point == "pattern":
            vectors = vectors / vectors.sum(-1, keepdim=True)
        how.setdefault("metrics", ("kl",))
        return lambda **chunks: measure(recording, site, prompt, position, vectors, path=path, **how, **chunks)

    yield "kl", row_of(post)
    yield "the study's five metrics", row_of(post, metrics=_STUDY)
    yield (
        "kl, vectors on the CPU",
        lambda **chunks: measure(recording, post, prompt, position, noise(_ROWS), path="replay", **chunks),
    )
    yield "kl at eight positions", row_of(post, horizon=8)
    yield "kl at the last position", row_of(post, horizon="last")
    yield "logits of three tokens", row_of(post, metrics=(_TOKENS,))
    yield "kl beside a reference", row_of(post, reference=Reference(noise(4, device), torch.arange(_ROWS) % 4))
    yield "attn_out", row_of(added)
    yield "a head's z", row_of(z)
    yield "a head's keys, eight positions", row_of(sites[4], horizon=8)
    yield "a head's pattern", row_of(sites[5])
    yield "two neurons", row_of(sites[3])
    joint = [Put(site, torch.arange(_ROWS), position, noise(_ROWS, device)[:, :n]) for site, n in ((z, 8), (post, 32))]
    yield "joint edits", lambda **chunks: measure_joint(recording, prompt, joint, path="replay", **chunks)


def counted(call: _Call, batch_rows: int) -> tuple[Counter, int]:
    """What a call costs when everything that is asked of a model once is known, and its chunks."""
    chunks: list[int] = []
    with counting() as count:
        call(batch_rows=batch_rows, progress=chunks.append)
    return count, len(chunks)


def a_chunk(call: _Call) -> tuple[Counter, Counter]:
    """What each further chunk costs, and the call beside its chunks."""
    counted(call, 10**6)
    (one, n_one), (several, n) = counted(call, 10**6), counted(call, 4)
    assert n > n_one == 1
    each = Counter({key: (several[key] - one[key]) / (n - 1) for key in {*one, *several}})
    return each, Counter({key: one[key] - each[key] for key in one})


if __name__ == "__main__":
    print(f"{'':32s} a chunk: waits  uploads  kernels    a call: waits  uploads")
    with pretended_cuda(), torch.no_grad():
        for name, call in calls(fresh("llama", "cuda")):
            chunk, rest = a_chunk(call)
            found = [total(chunk, kind) for kind in ("wait", "upload", "kernel")]
            print(
                f"{name:32s} {found[0]:14.1f} {found[1]:8.1f} {found[2]:8.1f} {total(rest, 'wait'):16.1f} {total(rest, 'upload'):8.1f}"
            )
            for (kind, what, line), n in sorted(chunk.items(), key=lambda x: -x[1]) if "--lines" in sys.argv else ():
                if kind in ("wait", "upload") and n:
                    print(f"    {n:6.1f} {kind:6s} {what:32s} {line}")
