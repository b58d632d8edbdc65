"""A model that changed between two calls is noticed, and what it was is kept with results."""

import copy
import functools
import pickle
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from interventions import CausalModel, ModelError, Site, measure, record, wrap
from interventions.models.exclusive import exclusive
from interventions.models.fingerprint import depends_on_batch, described, fingerprint, own_code
from tests.tiny import edited, fresh, prompts, rows, tiny_model, wrapped

SITE = Site(2)


def replaced_block(hf):
    hf.model.layers[4] = copy.deepcopy(hf.model.layers[4])


def patched(hf):
    own = hf.model.layers[4].forward
    hf.model.layers[4].forward = lambda *args, **kwargs: own(*args, **kwargs)


CHANGES = {
    "a weight in place": ("weights", lambda hf: hf.lm_head.weight.mul_(1.1)),
    "a weight through .data": ("weights", lambda hf: hf.model.layers[3].mlp.up_proj.weight.data.mul_(1.1)),
    "another tensor": ("weights", lambda hf: setattr(hf.lm_head, "weight", nn.Parameter(hf.lm_head.weight + 1, False))),
    "a buffer": ("weights", lambda hf: hf.model.rotary_emb.inv_freq.mul_(2)),
    "an epsilon": ("modules", lambda hf: setattr(hf.model.norm, "variance_epsilon", 0.1)),
    "a scale": ("modules", lambda hf: setattr(hf.model.layers[5].self_attn, "scaling", 1.0)),
    "a block": ("modules", replaced_block),
    "a hook": ("hooks", lambda hf: hf.model.layers[4].register_forward_hook(lambda *_: None)),
    "a hook before": ("hooks", lambda hf: hf.model.layers[0].mlp.register_forward_pre_hook(lambda *_: None)),
    "a forward": ("code", patched),
    "attention": ("code", lambda hf: hf.set_attn_implementation("eager")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_changed_after_recording_is_refused(change):
    hf, (part, make) = fresh("llama"), CHANGES[change]
    recording, (prompt, position) = record(hf, prompts(), [SITE]), rows()
    vectors = edited(recording, SITE, prompt, position)
    expected = measure(recording, SITE, prompt, position, vectors)["kl"]
    make(hf)
    for path in ("auto", "replay", "hooks"):
        with pytest.raises(ModelError, match=f"the model's .*{part}.* changed after it was recorded; record it again"):
            measure(recording, SITE, prompt, position, vectors, path=path)
    again = record(hf, prompts(), [SITE])
    assert again.model.certificates == {}
    assert measure(again, SITE, prompt, position, vectors)["kl"].shape == expected.shape


class Steered(nn.Module):
    """A module of the user's own, with a tensor that is no parameter."""

    def __init__(self, own, vector):
        super().__init__()
        self.own, self.vector = own, vector

    def forward(self, *args, **kwargs):
        return self.own(*args, **kwargs) + self.vector


class Steering:
    scale = 0.0

    def __init__(self):
        self.scale, self.calls = 0.0, 0

    def hook(self, _, __, out):
        return out * (1 + self.scale)


def steered(kind):
    """A model with steering of this kind and what makes it act."""
    hf, given, steering, vector = fresh("llama"), {"scale": 0.0}, Steering(), torch.zeros(32)
    block = hf.model.layers[4]
    if kind == "closure":
        block.register_forward_hook(lambda _, __, out: out * (1 + given["scale"]))
        return hf, lambda: given.update(scale=1.0)
    if kind == "method":
        block.register_forward_hook(steering.hook)
        return hf, lambda: setattr(steering, "scale", 1.0)
    if kind == "partial":
        block.register_forward_hook(functools.partial(lambda add, _, __, out: out + add, vector))
        return hf, lambda: vector.add_(1)
    if kind == "forward":
        own = block.mlp.forward
        block.mlp.forward = lambda x: own(x) + vector
        return hf, lambda: vector.add_(1)
    block.mlp = Steered(block.mlp, vector)
    return hf, lambda: setattr(block.mlp, "vector", torch.ones(32))


@pytest.mark.parametrize("kind", ["closure", "method", "partial", "forward", "module"])
def test_changed_values_in_user_hooks_count_as_a_change(kind):
    hf, act = steered(kind)
    recording, (prompt, position) = record(hf, prompts(), [SITE]), rows()
    vectors = edited(recording, SITE, prompt, position)
    measure(recording, SITE, prompt, position, vectors)
    act()
    with pytest.raises(ModelError, match="the model's values changed after it was recorded"):
        measure(recording, SITE, prompt, position, vectors)


def test_storing_activations_in_hooks_is_no_change():
    hf, kept, steering = fresh("llama"), {}, Steering()
    hf.model.layers[4].register_forward_hook(lambda _, __, out: kept.update(out=out))
    hf.model.layers[5].register_forward_hook(lambda _, __, out: kept.setdefault("all", []).append(out))
    hf.model.layers[5].register_forward_hook(steering.hook)
    recording, (prompt, position) = record(hf, prompts(), [SITE]), rows()
    kept.clear()
    steering.calls += 1
    vectors = edited(recording, SITE, prompt, position)
    assert measure(recording, SITE, prompt, position, vectors).path == "replay"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copied_recording_uses_its_own_copy_of_the_model(copied):
    recording, (prompt, position) = record(fresh("llama"), prompts(), [SITE]), rows()
    vectors = edited(recording, SITE, prompt, position)
    own = copied(recording)
    expected = measure(recording, SITE, prompt, position, vectors)["kl"]
    assert torch.equal(measure(own, SITE, prompt, position, vectors)["kl"], expected)
    own.model.hf.lm_head.weight.mul_(1.1)
    for changed in (own, copied(own)):
        with pytest.raises(ModelError, match="changed after it was recorded"):
            measure(changed, SITE, prompt, position, vectors)
    assert torch.equal(measure(recording, SITE, prompt, position, vectors)["kl"], expected)


@pytest.mark.parametrize("wrapper", ["plain", "bridge", "nnsight"])
def test_passes_do_not_change_the_fingerprint(wrapper):
    model, ids = wrap(wrapped("llama", wrapper)), torch.tensor([prompts()[0]])
    before, code = fingerprint(model.hf), own_code(model.hf)
    model.hf(input_ids=ids, output_hidden_states=True)
    recording, (prompt, position) = record(model, prompts(), [SITE]), rows()
    vectors = edited(recording, SITE, prompt, position)
    for path in ("replay", "hooks"):
        measure(recording, SITE, prompt, position, vectors, path=path)
    assert fingerprint(model.hf) == before and own_code(model.hf) == code == [] and not recording.unsteady


def test_weights_hash_follows_changes_of_weights():
    hf = fresh("llama")
    model = wrap(hf)
    first = model.weights_hash
    assert first == wrap(tiny_model("llama")).weights_hash
    hf.model.layers[2].mlp.up_proj.weight[3, 4] += 1
    assert model.weights_hash != first
    hf.model.layers[2].mlp.up_proj.weight[3, 4] -= 1
    hf.load_state_dict(tiny_model("llama").state_dict())
    assert model.weights_hash == first
    hf.model.layers[2].mlp.up_proj.weight.data[3, 4] += 1  # one number that no sample sees
    assert model.hash_weights() != first


SCALE = 2.0


def scaled(_, __, out):
    return out * SCALE


def test_description_depends_on_numbers_config_and_buffers():
    first = described(fresh("llama"))
    assert described(fresh("llama")) == first
    hf = fresh("llama")
    hf.model.norm.variance_epsilon = 0.5
    assert described(hf)["numbers_sha256"] != first["numbers_sha256"]
    hf = fresh("llama")
    hf.config.rms_norm_eps = 0.5
    assert described(hf)["config_sha256"] != first["config_sha256"]
    hf = fresh("llama")
    hf.model.rotary_emb.inv_freq.mul_(2)
    assert described(hf)["buffers_sha256"] != first["buffers_sha256"]


def test_description_depends_on_values_in_hooks(monkeypatch):
    def kept(hook):
        hf = fresh("llama")
        hf.model.layers[1].register_forward_hook(hook)
        (code,) = described(hf)["own_code"]
        return code

    def by(vector):
        return lambda _, __, out: out + vector

    assert kept(by(torch.ones(32))) == kept(by(torch.ones(32))) != kept(by(2 * torch.ones(32)))
    assert kept(by(1.0)) != kept(by(2.0)) and kept(lambda *_: None) != kept(by(1.0))
    first = kept(scaled)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert kept(scaled) != first
    assert kept(by(object())) != kept(by(object()))


def test_descriptions_are_equal_across_processes():
    program = (
        "import torch; from tests.tiny import fresh; from interventions.models.fingerprint import described\n"
        "hf = fresh('llama'); v = torch.ones(3); hf.model.layers[1].register_forward_hook(lambda m, a, o: o + v.sum())\n"
        "found = described(hf)"
    )
    here: dict = {}
    exec(program, here)
    command = [sys.executable, "-W", "ignore", "-c", f"{program}; print(found)"]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert other == f"{here['found']}\n" and "own_code" in other


def test_hooks_of_mechdiag_are_not_user_code():
    model = wrap(fresh("llama"))
    with exclusive(model):
        assert own_code(model.hf) == [] and not depends_on_batch(model.hf, 24)
        patched(model.hf)
        assert own_code(model.hf) == ["model.layers.4"] and depends_on_batch(model.hf, 24)


class _Offloaded:
    """What accelerate leaves on a module whose weights lie elsewhere."""

    def __init__(self, weights):
        self.weights_map = weights


def test_offloaded_weights_are_hashed():
    hf, expected = fresh("llama"), wrap(tiny_model("llama")).weights_hash
    model = wrap(hf)
    up = hf.model.layers[3].mlp.up_proj
    weight, up.weight = up.weight, nn.Parameter(up.weight.to("meta"), False)
    up._hf_hook = _Offloaded({"weight": weight.detach()})
    assert (model.hash_weights(), model.weights_covered) == (expected, None)
    up._hf_hook = _Offloaded({})
    assert model.hash_weights() != expected
    there, every = map(
        int, re.fullmatch(r"(\d+) of (\d+) tensors: the others are not loaded", model.weights_covered).groups()
    )
    assert every - there == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_packed_and_quantized_weights_are_hashed():
    def quantized(scale):
        hf = fresh("llama")
        hf.model.layers[2].mlp.down_proj.weight.mul_(scale)
        return CausalModel(torch.ao.quantization.quantize_dynamic(hf, {nn.Linear}), None, "huggingface", "quantized")

    one, same, other = (quantized(scale).hash_weights() for scale in (1.0, 1.0, 1.5))
    assert one == same != other
    hf = fresh("llama")
    hf.model.layers[1].mlp.up_proj.weight = nn.Parameter(
        torch.quantize_per_channel(
            hf.model.layers[1].mlp.up_proj.weight, torch.full((64,), 0.1), torch.zeros(64), 0, torch.qint8
        ),
        False,
    )
    assert CausalModel(hf, hf, "huggingface", "per channel").hash_weights() != wrap(tiny_model("llama")).weights_hash
