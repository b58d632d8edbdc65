"""The kernel for CUDA, by Triton's interpreter where there is no GPU: the tests of the metrics again, and its own."""

import importlib.metadata
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it comes with the test extra on Linux")

from interventions import Site, fused, measure, record
from interventions.metrics import METRICS, CleanRows, CleanSide, Comparison
from tests.interventions.test_metrics import (  # noqa: F401  (tests, collected here too)
    PINS,
    exact_js,
    gaussian,
    masked_reference,
    pairs,
    relative,
    test_divergences_of_extreme_logits_are_exact,
    test_each_edit_is_compared_with_its_own_clean_row,
    test_half_precision_logits_are_widened,
    test_identical_logits_have_zero_divergence,
    test_js_is_exact_from_1e_13_to_ln_2,
    test_kl_and_js_of_two_coins,
    test_kl_is_exact_from_1e_13_to_30,
    test_large_constant_on_one_side_keeps_precision,
    test_metrics_do_not_change_their_arguments,
    test_metrics_of_the_clean_top_token,
    test_nonfinite_logits_give_nonfinite_divergences,
    test_nonfinite_rows_are_not_counted_as_unchanged,
    test_one_clean_row_is_shared_by_several_edits,
    test_top1_changed,
)
from tests.tiny import edited, exact_kl, fresh, prompts, rows

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # the interpreter is numpy


@pytest.fixture(autouse=True)
def _runs_here(device):
    if device == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the kernel is compiled for this machine's GPU: --device cuda")


@pytest.fixture(scope="module", autouse=True)
def _kernel_everywhere():
    """On the CPU too, for every dtype that it takes."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(fused, "usable", lambda logits: logits.dtype in fused._DTYPES)
        yield


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("clean_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_strides_and_dtypes_change_nothing(block, clean_dtype, device):
    clean, intervened = pairs(97, device, 1e-3, 3.0)
    clean = torch.nn.functional.pad(clean, (0, 3))[:, :97].to(clean_dtype)
    index = torch.randint(0, 16, (16,), generator=torch.Generator().manual_seed(0)).to(device)
    found = fused.compare(intervened[:, torch.arange(97)].T.contiguous().T, clean, index, block=block)
    one = clean.float()[index]
    assert relative(found["kl"], exact_kl(one, intervened)) <= 1e-4
    assert relative(found["js"], exact_js(one, intervened)) <= 1e-4
    assert torch.equal(found["clean_top1"], one.argmax(-1)) and torch.equal(found["top1"], intervened.argmax(-1))
    drop = one.log_softmax(-1).gather(1, one.argmax(-1)[:, None]) - intervened.log_softmax(-1).gather(
        1, one.argmax(-1)[:, None]
    )
    torch.testing.assert_close(found["top1_drop"], drop[:, 0], rtol=1e-4, atol=2e-5)


def test_clean_top_token_wins_ties(device):
    clean = torch.tensor([[0.0, 2.0, 1.0, 2.0]], device=device)
    x = torch.tensor([[3.0, 3.0, 0.0, 3.0], [3.0, 2.0, 0.0, 3.0]], device=device)
    found = Comparison(CleanSide(clean), x)
    assert found.clean_top1.tolist() == [1, 1] and found.top1.tolist() == [1, 0]
    assert found.top1_changed.tolist() == [False, True]


def test_every_metric_equals_torch(device):
    clean, intervened = gaussian(0, 12, 97, scale=3.0).to(device), gaussian(1, 12, 97, scale=3.0).to(device)
    clean[2, 4:9], intervened[2, 4:9], intervened[3, 1], clean[4, 7], intervened[5, 6] = *[float("-inf")] * 4, torch.nan
    for name, metric in METRICS.items():
        fast = metric(Comparison(CleanSide(clean), intervened, js=True))
        slow = metric(Comparison(CleanSide(clean), intervened, split=False))
        if fast.is_floating_point():
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6, equal_nan=True)
        else:
            assert torch.equal(fast, slow), name


@pytest.mark.parametrize("metrics", [("kl",), ("js", "kl", "kl_direct", "top1_changed", "clean_entropy")], ids=str)
def test_measured_effects_equal_torch(metrics, device, monkeypatch):
    site = Site(3)
    recording = record(fresh("llama", device), prompts(), [site])
    prompt, position = rows()
    vectors = edited(recording, site, prompt, position)
    launched = []
    compare = fused.compare
    monkeypatch.setattr(
        fused, "compare", lambda *given, **how: launched.append(len(given[2])) or compare(*given, **how)
    )
    found = measure(recording, site, prompt, position, vectors, metrics=metrics)
    assert sum(launched) == len(prompt) * (1 + ("kl_direct" in metrics))
    monkeypatch.setattr(fused, "usable", lambda _: False)
    expected = measure(recording, site, prompt, position, vectors, metrics=metrics)
    for name in metrics:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.3, 55.0, 200.0, -300.0])
def test_divergences_of_tiny_changes_are_not_negative(constant, device):
    clean, change = gaussian(0, 8, 97, scale=3.0), torch.logspace(-8, -5, 8)[:, None] * gaussian(1, 8, 97)
    found = fused.compare((clean + constant + change).to(device), clean.to(device), torch.arange(8, device=device))
    assert (found["kl"] >= 0).all() and (found["js"] >= 0).all() and (found["kl"] < 1e-8).all()


def test_zero_rows_give_empty_results(device):
    clean = gaussian(0, 1, 97).to(device)
    found = fused.compare(clean[:0], clean, torch.zeros(0, dtype=torch.long, device=device))
    assert {len(value) for value in found.values()} == {0}


def test_gpu_without_the_kernel_warns(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(fused, "find_spec", lambda _: None)
    with pytest.warns(UserWarning, match="without the fused kernel on cuda:0: Triton is not installed"):
        assert not fused._works.__wrapped__(torch.device("cuda:0"))


@pytest.mark.parametrize("where", ["both", "clean", "intervened"])
@pytest.mark.parametrize("value", PINS)
def test_kernel_is_exact_for_pinned_logits(where, value, device):
    """As `test_pinned_logits_match_float64`, with a twentieth of the tokens pinned in two of four rows."""
    clean, some = gaussian(0, 4, 97, scale=3.0), torch.randperm(97, generator=torch.Generator().manual_seed(1))[:5]
    intervened = clean + torch.tensor([1e-4, 1e-3, 0.1, 3.0])[:, None] * gaussian(2, 4, 97)
    for side in {"both": (clean, intervened), "clean": (clean,), "intervened": (intervened,)}[where]:
        side[1::2, some] = value
    found = fused.compare(intervened.to(device), clean.to(device), torch.arange(4, device=device), block=32)
    kl, js, _ = masked_reference(clean.double().numpy(), intervened.double().numpy())
    if where == "intervened" and value == torch.finfo(torch.float32).min:  # taken as −inf, which it stands for
        kl[1::2] = np.inf
    np.testing.assert_allclose(found["kl"].cpu(), kl, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(found["js"].cpu(), js, rtol=1e-4, atol=1e-12)
    assert found["finite"].all() and torch.equal(found["top1"].cpu(), intervened.argmax(-1))


_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from interventions import fused

types = ["*fp32", "*bf16", "*i64", "*fp32", "*i64", "i32", "i32", "i32", "i32", "constexpr", "constexpr"]
kernel = fused._kernel()
source = ASTSource(kernel, dict(zip(kernel.arg_names, types, strict=True)), {"JS": True, "BLOCK": 2048})
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
print(len(made.asm["cubin"]), made.asm["ptx"].count("lg2.approx"))
"""


def test_kernel_compiles_without_a_gpu(tmp_path):
    """Compiles for an H100 or H200, and uses the logarithms that are exact near 1."""
    version = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    if version < (3, 6):
        pytest.skip("older versions of Triton compile only for a GPU that is there")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", _COMPILED],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        text=True,
        capture_output=True,
        check=True,
    )
    size, rough = map(int, found.stdout.split())
    assert size > 1000 and rough == 0


def test_nested_selections_of_rows_are_resolved(device):
    clean, intervened = pairs(97, device, 1e-3, 3.0)
    some, others = torch.tensor([3, 0, 7, 3], device=device), slice(1, 4)
    found = Comparison(CleanRows(CleanRows(CleanSide(clean), some), others), intervened[:3]).kl
    assert relative(found, exact_kl(clean[[0, 7, 3]], intervened[:3])) <= 1e-4
