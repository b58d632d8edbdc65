"""Checks of tensors and settings in every format; the right values are the formats' equations in numpy."""

import copy
import json
import math
from itertools import cycle

import pytest
import torch

from sae_models import CheckpointError, load_sae
from tests.fuzz_saes import D_SAE, FORMATS, X, alike, computed, loaded, read, write, write_format

FOREIGN = {name: one for name, one in FORMATS.items() if not name.startswith("own")}
TENSORS = [
    (name, key)
    for name, one in FORMATS.items()
    for key, value in one.tensors.items()
    if isinstance(value, torch.Tensor) and value.is_floating_point() and not key.startswith(("stats", "scaling"))
    if not (name.endswith("AutoEncoderTopK") and key == "threshold")  # which a TopK does not use
]
"""those that the output depends on"""


def changed(valid, key, change):
    tensors = {name: value for name, value in valid.tensors.items() if value is not None}
    return tensors | {key: change(tensors[key])}


def with_entry(value):
    def change(tensor):
        flat = tensor.clone().reshape(-1)
        flat[len(flat) // 2] = value
        return flat.reshape(tensor.shape)

    return change


@pytest.mark.parametrize(
    ("name", "key", "bad"),
    [(*one, bad) for one, bad in zip(TENSORS, cycle((math.nan, math.inf, -math.inf)), strict=False)],
)
def test_nan_and_infinite_weights_are_refused(tmp_path, name, key, bad):
    valid = FORMATS[name]
    write_format(tmp_path, valid)
    write(tmp_path, valid.file, changed(valid, key, with_entry(bad)))
    with pytest.raises(
        CheckpointError, match=rf"{valid.file}.*: {key} holds values that are not numbers \(1 of \d+ are nan"
    ):
        load_sae(tmp_path, **valid.options)


@pytest.mark.parametrize(
    ("name", "dtype"), list(zip(FORMATS, cycle((torch.complex64, torch.int64, torch.bool)), strict=False)), ids=str
)
def test_complex_integer_and_boolean_weights_are_refused(tmp_path, name, dtype):
    valid = FORMATS[name]
    key = next(key for key in ("W_dec", "w_dec", "decoder.weight") if key in valid.tensors)
    write_format(tmp_path, valid)
    try:
        write(tmp_path, valid.file, changed(valid, key, lambda value: value.to(dtype)))
    except KeyError:
        pytest.skip(f"this safetensors cannot write {dtype}")
    with pytest.raises(
        CheckpointError, match=f"{key} is a tensor of {dtype}, .*; expected dense floating-point numbers"
    ):
        load_sae(tmp_path, **valid.options)


@pytest.mark.parametrize(
    ("name", "dtype"),
    list(
        zip(
            # a bypass needs decoder rows of norm 1, which narrow types do not keep
            [name for name, one in FOREIGN.items() if not one.file.endswith("npz") and name != "cosine bypass"],
            cycle((torch.float8_e4m3fn, torch.bfloat16, torch.float8_e5m2, torch.float16)),
            strict=False,
        )
    ),
    ids=str,
)
def test_half_and_float8_weights_are_read_exactly(tmp_path, name, dtype):
    valid = FOREIGN[name]
    write_format(tmp_path, valid)
    matrices = {key: value.to(dtype) for key, value in valid.tensors.items() if getattr(value, "ndim", 0) == 2}
    write(tmp_path, valid.file, {**valid.tensors, **matrices})
    found = computed(loaded(tmp_path, valid.options))
    assert alike(found, valid.evaluate(read(tmp_path, valid.file), valid.config or {}, X))
    write_format(tmp_path / "full", valid)
    assert not alike(found, computed(loaded(tmp_path / "full", valid.options)))


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize(
    "name", [name for name, one in FOREIGN.items() if any(key.endswith("threshold") for key in one.tensors)]
)
def test_a_single_threshold_applies_to_all_latents(tmp_path, name, shape):
    valid = FOREIGN[name]
    key = next(key for key in valid.tensors if key.endswith("threshold"))
    write_format(tmp_path, valid)
    write(tmp_path, valid.file, changed(valid, key, lambda _: torch.full(shape, 0.37)))
    assert alike(
        computed(loaded(tmp_path, valid.options)),
        valid.evaluate(read(tmp_path, valid.file), valid.config or {}, X),
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_base_exponent_may_have_any_shape_of_one_number(tmp_path, shape):
    valid = FORMATS["cosine delta"]
    write_format(tmp_path, valid)
    write(tmp_path, valid.file, changed(valid, "scale_a_base", lambda value: value.reshape(shape)))
    assert alike(computed(loaded(tmp_path, valid.options)), valid.evaluate(read(tmp_path, valid.file), {}, X))
    write(tmp_path, valid.file, changed(valid, "scale_a_base", lambda _: torch.ones(2)))
    with pytest.raises(CheckpointError, match="scale_a_base has 2 entries; expected one"):
        load_sae(tmp_path, **valid.options)


K_IN = {"own topk": "metadata.mechdiag.selector", "own batchtopk": "metadata.mechdiag.selector", "sparsify": ""}
K_IN |= {"saelens topk": "", "saelens batchtopk": ""}


@pytest.mark.parametrize("k", [math.nan, math.inf, 0, -1, D_SAE + 1, 10**30, "3", True, [3], {}], ids=repr)
@pytest.mark.parametrize("name", K_IN)
def test_invalid_k_in_the_configuration_is_refused(tmp_path, name, k):
    valid = FORMATS[name]
    config = copy.deepcopy(dict(valid.config))
    at = config
    for part in filter(None, K_IN[name].split(".")):
        at = at[part]
    at["k"] = k
    write_format(tmp_path, valid)
    (tmp_path / valid.config_file).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"k = .*; expected a (whole )?number"):
        load_sae(tmp_path)


@pytest.mark.parametrize("k", [D_SAE + 1, 2.5, math.nan])
def test_invalid_k_in_weights_or_options_is_refused(tmp_path, k):
    valid = FORMATS["dictionary_learning BatchTopKSAE"]
    write_format(tmp_path / "learned", valid)
    write(tmp_path / "learned", valid.file, changed(valid, "k", lambda _: torch.tensor(float(k))))
    with pytest.raises(CheckpointError, match=r"k = |k holds values that are not numbers"):
        load_sae(tmp_path / "learned")
    valid = FORMATS["openai"]
    write_format(tmp_path / "openai", valid)
    write(tmp_path / "openai", valid.file, {**valid.tensors, "activation_state_dict": {"k": k}})
    with pytest.raises(CheckpointError, match=f"k = {k}; expected a whole number from 1 to 10, the number of latents"):
        load_sae(tmp_path / "openai")
    write_format(tmp_path / "paper", FORMATS["cosine standard"])
    with pytest.raises(CheckpointError, match=r"k = |threshold"):
        load_sae(tmp_path / "paper", k=k if k != 2.5 else "2")


def test_sizes_that_contradict_the_configuration_are_refused(tmp_path):
    for name, key in (("dictionary_learning AutoEncoder", "dict_size"), ("gemma_scope 2", "width")):
        valid = FORMATS[name]
        config = copy.deepcopy(dict(valid.config))
        (config.get("trainer") or config)[key] = D_SAE + 1
        write_format(tmp_path / name, valid)
        (tmp_path / name / valid.config_file).write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"config.json says {key} 11; expected the same"):
            load_sae(tmp_path / name)
