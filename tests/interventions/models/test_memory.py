"""Recordings beyond a budget of bytes give the same bits as those within it; chunk sizes by memory."""

import pickle
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diagnostics.running.notes import how_measured, noted
from interventions import Site, measure, record, wrap
from interventions.attribution import gradients
from interventions.edits import rescale
from interventions.effects import measure_joint
from interventions.errors import MechdiagError, ModelError
from interventions.metrics import LogitDifference
from interventions.models.memory import Budget, free_bytes, logits_at_once, rows_at_once
from interventions.models.sizes import examples, sizes, table
from interventions.replaying.joint import Put
from interventions.spliced import spliced
from tests.tiny import fresh, noise, prompts, tiny_model

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
            yield from measure(
                recording, site, PROMPT, POSITION, x.flip(0) if site.inside else 1.3 * x, **how
            ).values.values()
    joint = [Put(SITES[2], ROW, POSITION, noise(len(ROW), str(x.device))[:, :8])]
    yield measure_joint(recording, PROMPT, joint, path="replay")["kl"]
    yield gradients(recording, SITES[0], PROMPT, POSITION, LogitDifference([3], [5]))[0]
    yield spliced(recording, SITES[0], {"half": lambda x: rescale(x, 0.5)}).kl["half"]
    yield recording.final_hidden
    for tensors in (recording.activations.values(), recording.keys, recording.values):
        yield from tensors


@pytest.mark.parametrize(
    ("on_device", "in_host"),
    [(4, N), (4, 2), pytest.param(0, 0, marks=pytest.mark.long)],
    ids=["to the host", "to nowhere", "all to nowhere"],
)
def test_memory_budget_moves_tensors_and_keeps_values(on_device, in_host):
    whole = recorded("cpu")
    size, dropped = bytes_of_a_prompt(whole), max(0, N - on_device - in_host)
    said = (
        pytest.warns(UserWarning, match=f"{dropped} of {N} prompts do not fit the budget") if dropped else nullcontext()
    )
    with said:
        found = recorded("cpu", Budget(device=size * on_device, host=size * in_host))
    assert whole.spilled is None and found.spilled.on_device == on_device and found.spilled.kept == N - dropped
    assert found.cache_bytes <= size * (on_device + in_host)
    before = found.recorded_again
    for i, (one, other) in enumerate(zip(everything(found), everything(whole), strict=True)):
        assert one.dtype == other.dtype and torch.equal(one.nan_to_num(-7), other.nan_to_num(-7)), i
    assert (found.recorded_again > before) == (dropped > 0)


def test_prompts_recorded_again_are_counted_in_the_notes():
    with pytest.warns(UserWarning, match="recorded again each time"):
        recording = recorded("cpu", Budget(0, 0))
    x = recording.at(SITES[0], PROMPT, POSITION)
    effects = measure(recording, SITES[0], PROMPT, POSITION, 1.3 * x, path="replay")
    assert effects.recorded_again >= N
    notes: dict = {}
    noted(notes, effects)
    assert how_measured([("here", notes)])["recorded_again"] == effects.recorded_again
    within = recorded("cpu")
    effects, notes = measure(within, SITES[0], PROMPT, POSITION, 1.3 * x, path="replay"), {}
    noted(notes, effects)
    assert effects.recorded_again == 0 and "recorded_again" not in {**notes, **how_measured([("here", notes)])}


def test_copied_recording_reruns_its_own_model():
    with pytest.warns(UserWarning, match="do not fit"):
        recording = record(fresh("llama"), prompts(LENGTHS), SITES[:1], batch_prompts=BATCH, budget=Budget(0, 0))
    copied = pickle.loads(pickle.dumps(recording))
    expected = recording.of(SITES[0])
    recording.model.hf.model.norm.weight.mul_(2)
    assert torch.equal(copied.of(SITES[0]), expected)


def test_recordings_under_user_hooks_are_kept_in_memory():
    """User hooks may count passes, so their recordings are kept; a changed model raises instead of being run again."""
    hf, passes = fresh("llama"), []
    handle = hf.model.layers[2].register_forward_hook(lambda *_: passes.append(1))
    recording = record(hf, prompts(LENGTHS), SITES[:1], budget=Budget(0, 0))
    assert recording.spilled is not None and recording.spilled.in_host == N
    handle.remove()
    with pytest.warns(UserWarning, match="do not fit"):
        recording = record(hf, prompts(LENGTHS), SITES[:1], budget=Budget(0, 0))
    hf.model.norm.weight.mul_(2)
    with pytest.raises(ModelError, match="weights changed"):
        recording.at(SITES[0], PROMPT, POSITION)


def test_budgets_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("MECHDIAG_DEVICE_BYTES", "0")
    monkeypatch.setenv("MECHDIAG_HOST_BYTES", "1e9")
    found = recorded("cpu").spilled
    assert found is not None and (found.on_device, found.in_host) == (0, N)
    monkeypatch.setenv("MECHDIAG_HOST_BYTES", "half")
    with pytest.raises(MechdiagError, match=r"'half' bytes .MECHDIAG_HOST_BYTES.; expected a number"):
        recorded("cpu")


def test_free_memory_is_plausible():
    assert 2**24 < free_bytes(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(("total", "rows", "logits"), [(80e9, 4096, 2**28), (24e9, 1024, 2**25), (17e9, 512, 2**23)])
def test_chunk_size_depends_only_on_total_gpu_memory(total, rows, logits, monkeypatch):
    """A 16 GB model on GPUs of 80, 24 and 17 GB. Sizes are powers of 2, whatever a driver takes."""
    cuda = torch.device("cuda", 0)
    weight = SimpleNamespace(nbytes=int(8e9))
    config = SimpleNamespace(num_attention_heads=32, intermediate_size=14336)
    model = SimpleNamespace(
        device=cuda,
        dtype=torch.bfloat16,
        d_model=4096,
        config=config,
        hf=SimpleNamespace(parameters=lambda: [weight, weight]),
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=int(total)))
    assert (rows_at_once(model, 1024), logits_at_once(model)) == (rows, logits)
    model.device = torch.device("cpu")
    assert (rows_at_once(model, 1024), logits_at_once(model)) == (512, 2**25)


def test_sizes_match_a_model_and_its_recording():
    model = wrap(fresh("llama", dtype=torch.bfloat16))
    recording, found = record(model, [[1, 2, 3, 4]], [Site(2)]), sizes(model.hf.config)
    assert found.parameters == sum(p.numel() for p in model.hf.parameters())
    assert found.weights["bf16"] == sum(p.nbytes for p in model.hf.parameters())
    assert found.token == bytes_of_a_prompt(recording) // 4
    assert found.logits == 4096 * model.vocab_size * 2


def test_documented_table_of_sizes_is_current():
    """Parameter counts match the published 8.03, 8.19 and 27.2 billion."""
    known = {name: sizes(config).parameters for name, config in examples().items()}
    assert known == {"Llama-3-8B": 8_030_261_248, "Qwen3-8B": 8_190_735_360, "Gemma-2-27B": 27_227_128_320}
    assert table(examples()) in (Path(__file__).parents[3] / "docs" / "scale.md").read_text(encoding="utf-8")
