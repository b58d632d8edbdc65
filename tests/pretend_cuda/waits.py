"""On the pretended device: what it refuses, and that the host waits for it once a call, however many chunks there are."""

import pytest
import torch

from tests.pretend_cuda.calls import a_chunk, calls
from tests.pretend_cuda.device import counting, total


def test_the_device_refuses_what_cuda_refuses():
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
def test_waits_of_the_host_are_counted(does, expected):
    x = torch.ones(3, device="cuda")
    with counting() as count:
        does(x)
    assert total(count, "wait") == expected


def test_no_chunk_makes_the_host_wait():
    with torch.no_grad():
        for name, call in calls():
            chunk, call_itself = a_chunk(call)
            waits = {key: n for key, n in chunk.items() if key[0] == "wait" and n}
            assert not waits, name
            assert total(call_itself, "wait") <= 3, (
                name,
                call_itself,
            )  # for its values, at the end; checks of joint edits
            assert total(chunk, "upload") <= 18, name
