"""On the pretended device: what it refuses, and that the host waits for it once a call, however many chunks there are."""

import pytest
import torch

from interventions import Site, record, wrap
from interventions.effects import intervened_logits
from interventions.models.memory import Budget
from tests.pretend_cuda.calls import a_chunk, calls
from tests.pretend_cuda.device import counting, total
from tests.pretend_cuda.spread import spread
from tests.tiny import TOLERANCE, all_alone, fresh, prompts, rows, tiny_model


def test_pretend_device_raises_where_cuda_does():
    here, there, other = torch.ones(3), torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1")
    for wrong in (lambda: here + there, lambda: there + other, lambda: torch.cat([there, here])):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    with pytest.raises(RuntimeError, match="indices"):
        here[torch.tensor([0], device="cuda")]
    assert there.device == torch.device("cuda:0") and (2 * there + 1.0).tolist() == [3.0] * 3


@pytest.mark.parametrize(
    ("does", "expected"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x[torch.tensor([0])], 1),
        (lambda x: torch.ones(3).to("cuda"), 1),
        (lambda x: torch.ones(3).to("cuda", non_blocking=True), 1),
        (lambda x: torch.ones(3).pin_memory().to("cuda", torch.float64, non_blocking=True), 1),
        (lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True), 0),
        (lambda x: x.to("cpu", non_blocking=True), 0),
        (lambda x: (x + 1).index_select(0, torch.zeros(2, dtype=torch.long, device="cuda")), 0),
    ],
)
def test_host_waits_are_counted(does, expected):
    x = torch.ones(3, device="cuda")
    with counting() as count:
        does(x)
    assert total(count, "wait") == expected


@pytest.mark.parametrize("where", ["one device", "two devices", "keys in host memory"])
def test_no_chunk_makes_the_host_wait(where):
    hf = spread("llama") if where == "two devices" else fresh("llama", "cuda")
    with torch.no_grad():
        for name, call in calls(hf, Budget(device=0, host=10**9) if where == "keys in host memory" else None):
            if where != "one device" and name not in ("the study's five metrics", "a head's pattern", "joint edits"):
                continue
            chunk, call_itself = a_chunk(call)
            waits = {key: n for key, n in chunk.items() if key[0] == "wait" and n}
            assert not waits, name
            assert total(call_itself, "wait") <= 3, (
                name,
                call_itself,
            )  # for its values, at the end; checks of joint edits
            assert where != "one device" or total(chunk, "upload") <= 18, name


@torch.no_grad()
@pytest.mark.parametrize(("name", "attention"), [("llama", "grouped"), ("gemma3", "masked")])
def test_two_devices_give_the_results_of_one(name, attention):
    """Replay and hooks over two devices must equal full forward passes on the CPU with torch hooks."""
    model, plain = wrap(spread(name)), tiny_model(name)
    model.replay_attention = attention
    sites = [Site(1), Site(3, "resid_pre"), Site(4, "attn_out"), *[Site(3, "resid_mid")] * (name == "llama"), Site(5)]
    recording = record(model, prompts(), sites)
    assert [k.device.index for k in recording.keys] == [0, 0, 0, 1, 1, 1]
    prompt, position = rows()
    for site in sites:
        x = recording.at(site, prompt, position)
        assert x.device == model.device == recording.final_hidden.device == torch.device("cuda:0")
        vectors = x + x.flip(-1)
        expected = all_alone(name, plain, prompts(), site, prompt, position, vectors.cpu())
        for path in ("replay", "hooks"):
            found = intervened_logits(recording, site, prompt, position, vectors, path=path)
            assert found.device == model.device and (found.cpu() - expected).abs().max() <= TOLERANCE
