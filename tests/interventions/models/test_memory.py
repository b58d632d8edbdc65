"""Recordings beyond a budget of bytes give the same bits as those within it; chunk sizes by memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from interventions import Site, measure, record
from interventions.attribution import gradients
from interventions.edits import rescale
from interventions.effects import measure_joint
from interventions.errors import MechdiagError, ModelError
from interventions.metrics import LogitDifference
from interventions.models import memory
from interventions.models.memory import Budget, free_bytes, logits_at_once, rows_at_once
from interventions.replaying.joint import Put
from interventions.spliced import spliced
from tests.tiny import D_MODEL, N_LAYERS, fresh, noise, prompts, tiny_model

SITES = (Site(1), Site(3, "attn_out"), Site(4, "z", head=1), Site(4, "pattern", head=2), Site(4, "pattern"))
LENGTHS = (9, 12, 5, 16, 7, 3, 11)
N = len(LENGTHS)
ROW = torch.arange(4 * N)
PROMPT, POSITION = ROW // 4, ROW % 3
BATCH = 2


def bytes_of_a_prompt(recording):
    tensors = (*recording.activations.values(), recording.final_hidden, *recording.keys, *recording.values)
    return sum(x[0].nbytes for x in tensors)


def recorded(device, budget=None):
    return record(tiny_model("llama", device), prompts(LENGTHS), SITES, batch_prompts=BATCH, budget=budget)


def everything(recording):
    """Numbers from every path that reads a recording."""
    for site in SITES[:4]:
        x = recording.at(site, PROMPT, POSITION)
        yield x
        metrics = ("kl", "top1", LogitDifference([3], [5]), *["kl_direct"] * (not site.inside))
        for path in ("replay", "hooks"):
            how = {"path": path, "metrics": metrics, "horizon": 1 if site.inside else "last", "batch_rows": 8}
            yield from measure(recording, site, PROMPT, POSITION, x.flip(0) if site.inside else 1.3 * x, **how).values.values()
    joint = [Put(SITES[2], ROW, POSITION, noise(len(ROW), str(x.device))[:, :8])]
    yield measure_joint(recording, PROMPT, joint, path="replay")["kl"]
    yield gradients(recording, SITES[0], PROMPT, POSITION, LogitDifference([3], [5]))[0]
    yield spliced(recording, SITES[0], {"half": lambda x: rescale(x, 0.5)}).kl["half"]
    yield recording.final_hidden
    for tensors in (recording.activations.values(), recording.keys, recording.values):
        yield from tensors


@pytest.mark.parametrize(
    ("on_device", "in_host"), [(4, N), (0, N), (4, 2), (0, 0), (6, 0)], ids="host all-host both nothing dropped".split()
)
def test_a_budget_changes_where_tensors_are_and_no_number(on_device, in_host):
    whole = recorded("cpu")
    size = bytes_of_a_prompt(whole)
    budget = Budget(device=size * on_device, host=size * in_host)
    dropped = max(0, N - on_device - in_host)
    if dropped:
        with pytest.warns(UserWarning, match=f"{dropped} of {N} prompts do not fit the budget"):
            found = recorded("cpu", budget)
    else:
        found = recorded("cpu", budget)
    assert whole.spilled is None and (found.spilled.on_device, found.spilled.in_host) == (on_device, min(in_host, N - on_device))
    assert found.cache_bytes <= size * (on_device + in_host) and found.recorded_again == 0
    for i, (one, other) in enumerate(zip(everything(found), everything(whole), strict=True)):
        assert one.dtype == other.dtype and torch.equal(one.nan_to_num(-7), other.nan_to_num(-7)), i
    assert (found.recorded_again > 0) == (dropped > 0)
