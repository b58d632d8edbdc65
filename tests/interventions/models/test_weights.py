"""Weights that are kept away until a block runs, and weights of 8 and 4 bits: the numbers are those of full forward passes, and the hash
covers every byte."""

import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

from interventions import Site, measure, record, wrap
from interventions.attribution import gradients
from interventions.direct_logits import direct_logits
from interventions.errors import ModelError
from interventions.metrics import LogitDifference
from interventions.models import load_model, weights
from interventions.models.causal_model import CausalModel
from interventions.models.fingerprint import described
from interventions.models.weights import unembedding
from tests.tiny import D_MODEL, TOLERANCE, VOCAB, all_alone, exact_kl, fresh, prompts, rows, tiny_model

SITES = (Site(1), Site(3, "attn_out"), Site(4, "z", head=1), Site(2, "neurons"))
CPU = torch.device("cpu")


def offloaded(where, folder):
    hf = fresh("llama")
    if where == "host":
        cpu_offload(hf, execution_device=CPU)
    else:
        disk_offload(hf, str(folder), execution_device=CPU)
    assert all(p.is_meta for p in hf.parameters())
    return hf


@pytest.mark.parametrize("where", ["host", "disk"])
def test_offloaded_weights_give_identical_results(where, tmp_path):
    model, plain = wrap(offloaded(where, tmp_path)), tiny_model("llama")
    found, expected = (record(m, prompts(), SITES) for m in (model, plain))
    assert (model.device, model.weights_hash) == (CPU, wrap(plain).weights_hash) and model.weights_covered is None
    assert described(model.hf) == described(plain)
    prompt, position = rows()
    for site in SITES:
        x = found.at(site, prompt, position)
        metrics = ("kl", LogitDifference([3], [5]), *["kl_direct"] * (not site.inside))
        for path in ("replay", "hooks"):
            one, other = (
                measure(r, site, prompt, position, 1.3 * x, metrics=metrics, path=path) for r in (found, expected)
            )
            assert all(torch.equal(one[name], other[name]) for name in other.values), (site, path)
    objective = LogitDifference([3], [5])
    one, other = (gradients(r, SITES[0], prompt, position, objective)[0] for r in (found, expected))
    assert torch.equal(one, other)
    one, other = (direct_logits(r, torch.eye(D_MODEL)[:2], 3.0) for r in (found, expected))
    assert torch.equal(one, other)


def test_device_auto_loads_the_same_weights(tmp_path):
    fresh("llama").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no tokenizer"):
        model = load_model(tmp_path, device="auto")
    assert model.device == CPU and model.weights_hash == wrap(tiny_model("llama")).weights_hash


def test_changed_offloaded_weight_is_noticed():
    hf = fresh("llama")
    state = {name: value.detach().clone() for name, value in hf.state_dict().items()}
    cpu_offload(hf, execution_device=CPU, state_dict=state)
    recording = record(hf, prompts(), [Site(1)])
    state["model.layers.3.mlp.up_proj.weight"].mul_(2)
    with pytest.raises(ModelError, match="weights changed"):
        measure(recording, Site(1), *rows(), torch.zeros(len(rows()[0]), D_MODEL))
    assert wrap(hf).weights_hash != wrap(tiny_model("llama")).weights_hash


def test_missing_weights_raise():
    hf = fresh("llama")
    hf.model.layers[2].mlp.up_proj.weight = nn.Parameter(torch.empty(64, D_MODEL, device="meta"), False)
    with pytest.raises(ModelError, match="weight is empty, and accelerate keeps it nowhere"):
        wrap(hf)


class _Packed(nn.Module):
    """A linear layer as GPTQ and AWQ keep it: codes of 4 bits, two in a byte, and scales; no weight."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        scales = weight.abs().amax(1, keepdim=True) / 7
        codes = (weight / scales).round().clamp(-7, 7).to(torch.int8) + 8
        self.register_buffer("qweight", codes[:, ::2] * 16 + codes[:, 1::2] - 128)
        self.register_buffer("scales", scales)

    def dequantised(self) -> torch.Tensor:
        byte = self.qweight.int() + 128
        return (torch.stack([byte // 16, byte % 16], 2).flatten(1) - 8) * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantised())


def packed(hf):
    """Every linear layer of a model packed, the head too; and the plain model of the same weights."""
    plain = fresh("llama")
    for path, module in list(hf.named_modules()):
        if type(module) is nn.Linear:
            parent, _, name = path.rpartition(".")
            new = _Packed(module.weight)
            setattr(hf.get_submodule(parent), name, new)
            plain.get_submodule(path).weight.copy_(new.dequantised())
    return hf, plain


@torch.no_grad()
def test_packed_layers_are_measured_and_hashed():
    hf, plain = packed(fresh("llama"))
    model = wrap(hf)
    assert torch.equal(unembedding(hf), plain.lm_head.weight) and model.vocab_size == VOCAB
    recording, other = record(model, prompts(), SITES), record(plain, prompts(), SITES)
    prompt, position = rows()
    for site in SITES[:3]:
        x = other.at(site, prompt, position)
        found = measure(recording, site, prompt, position, x.flip(-1), path="replay")
        again = measure(other, site, prompt, position, x.flip(-1), path="hooks")
        assert torch.allclose(found["kl"], again["kl"], atol=1e-5, rtol=1e-4)
    clean, edited = (
        all_alone("llama", plain, prompts(), SITES[0], prompt, position, v)
        for v in (None, other.at(SITES[0], prompt, position).flip(-1))
    )
    x = recording.at(SITES[0], prompt, position).flip(-1)
    kl = measure(recording, SITES[0], prompt, position, x, path="replay")["kl"]
    assert (kl - exact_kl(clean, edited)).abs().max() <= TOLERANCE
    before = model.weights_hash
    assert "of them quantised" in model.weights_covered
    for name in ("qweight", "scales"):
        getattr(hf.model.layers[3].mlp.up_proj, name)[0, 0] += 1
        assert model.hash_weights() != before
        before = model.weights_hash


def torchao(hf):
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    quantization.quantize_(hf, quantization.Int8WeightOnlyConfig())
    return hf


@pytest.mark.filterwarnings("ignore")
def test_weights_quantised_by_torchao_are_measured_exactly():
    model = wrap(torchao(fresh("llama")))
    assert "torchao" in sys.modules and "43 of them quantised" in model.weights_covered
    assert unembedding(model.hf).shape == (VOCAB, D_MODEL)
    recording, (prompt, position) = record(model, prompts(), SITES), rows()
    for site in SITES:
        x = 1.3 * recording.at(site, prompt, position)
        replayed, hooked = (
            measure(recording, site, prompt, position, x, path=path)["kl"] for path in ("replay", "hooks")
        )
        assert (replayed - hooked).abs().max() <= 1e-6


def test_unchanged_large_model_is_hashed_once(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "IN_PARALLEL", 0)
    monkeypatch.setenv("MECHDIAG_CACHE", str(tmp_path / "cache"))
    fresh("llama").save_pretrained(tmp_path / "model")
    load = lambda: load_model(tmp_path / "model", device="cpu")  # noqa: E731
    with pytest.warns(UserWarning, match="no tokenizer"):
        first, again, changed = load(), load(), load()
    assert first.weights_hash == wrap(fresh("llama")).hash_weights()
    monkeypatch.setattr(CausalModel, "hash_weights", lambda self: pytest.fail("hashed again"))
    assert again.weights_hash == first.weights_hash
    changed.hf.model.norm.weight.add_(1)
    with pytest.raises(pytest.fail.Exception, match="hashed again"):
        _ = changed.weights_hash


def test_large_models_are_hashed_in_parallel_and_read_once(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "IN_PARALLEL", 0)
    monkeypatch.setenv("MECHDIAG_CACHE", str(tmp_path / "cache"))
    hashes = {
        where: wrap(m).hash_weights() for where, m in (("plain", fresh("llama")), ("host", offloaded("host", None)))
    }
    disk = offloaded("disk", tmp_path / "kept")
    assert len({*hashes.values(), wrap(disk).hash_weights()}) == 1
    changed = fresh("llama")
    changed.model.layers[5].mlp.up_proj.weight[0, 0] += 1
    assert wrap(changed).hash_weights() != hashes["plain"]
    read = []
    monkeypatch.setattr(weights, "read_back", lambda *_: read.append(_) or pytest.fail("read again"))
    assert wrap(disk).hash_weights() == hashes["plain"] and not read
    monkeypatch.undo()
    monkeypatch.setattr(weights, "IN_PARALLEL", 0)
    monkeypatch.setenv("MECHDIAG_CACHE", str(tmp_path / "cache"))
    path = next((tmp_path / "kept").glob("*layers.3.mlp.up_proj.weight.dat"))
    held = bytearray(path.read_bytes())
    held[5] ^= 1
    path.write_bytes(held)
    assert wrap(disk).hash_weights() != hashes["plain"]
