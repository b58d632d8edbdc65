"""dictionary_learning (saprmarks): `ae.pt` and `config.json`, in a folder `trainer_N`.

Each class as its own `encode` and `decode` compute it, with decoder rows as they are stored: the library's loader rescales
those of an `AutoEncoder` to norm 1 and its encoder the other way, which changes latents and not the output.
"""

import re

from sae_models.errors import CheckpointError
from sae_models.gates import Gate, JumpReLU
from sae_models.readers.stored import Stored
from sae_models.readers.strict import Options, Tensors, setting
from sae_models.sae import SAE
from sae_models.scores import Inner
from sae_models.selectors import BatchTopK, ReLU, Selector, TopK

CLASSES = {
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "AutoEncoderTopK": "b_dec",
    "BatchTopKSAE": "b_dec",
    "MatryoshkaBatchTopKSAE": "b_dec",
    "JumpReluAutoEncoder": "b_dec",
    "GatedAutoEncoder": "decoder_bias",
}
"""What can be read, and under which key each keeps its decoder bias."""


def recognises(stored: Stored) -> bool:
    """Its file name, its configuration, or the names of its layers."""
    torch_file = stored.path.suffix in (".pt", ".pth")
    named = re.fullmatch(r"ae(_\d+)?", stored.path.stem) is not None or "trainer" in stored.config
    return torch_file and (named or {"encoder.weight", "decoder.weight"} <= stored.values.keys())


def read(stored: Stored, options: Options) -> SAE:
    """Any of `CLASSES`. Options, where `config.json` does not say them: dict_class, k, model_name, hook_name.

    Raises `CheckpointError` for crosscoders and transcoders, and for a BatchTopK SAE whose threshold was never learned: its
    inference would keep every positive score.
    """
    trainer = setting(stored.config, "trainer", dict, default={})
    said = setting(trainer, "dict_class", str, default=_class_of(stored))
    dict_class = options.need("dict_class", said, "the keys fit several classes")
    if dict_class not in [*CLASSES]:
        raise CheckpointError(f"a {str(dict_class)[:60]} of dictionary_learning; expected {', '.join(CLASSES)}")
    buffer = setting(stored.config, "buffer", dict, type(None), default=None) or {}
    io = setting(buffer, "io", str, type(None), default=None)
    if io not in (None, "in", "out"):
        raise CheckpointError(f"a transcoder (its buffer has io = {io}); expected an SAE")
    tensors = Tensors(stored.values)
    plain = "encoder.weight" not in tensors
    W_enc, W_dec = (
        tensors.pair("W_enc", "W_dec", encoder_columns=True)
        if plain
        else tensors.pair("encoder.weight", "decoder.weight", decoder_columns=True)
    )
    d_sae, d_model = W_dec.shape
    for name, size in (("dict_size", d_sae), ("activation_dim", d_model)):
        if (said := setting(trainer, name, int, type(None), default=None)) not in (None, size):
            raise CheckpointError(
                f"W_dec has shape {(d_sae, d_model)}, and config.json says {name} {said}; expected the same"
            )
    b_dec = tensors.take(CLASSES[dict_class], d_model)
    gated = dict_class == "GatedAutoEncoder"
    b_enc = None if gated else tensors.take("b_enc" if plain else "encoder.bias", d_sae)
    selector = _selector(dict_class, tensors, options, trainer.get("k"), d_sae)
    tensors.finish(f"class {dict_class}")
    submodule = setting(trainer, "submodule_name", str, type(None), default=None)
    site = re.fullmatch(r"resid_post_layer_(\d+)", submodule or "")
    model_name, hook_name = options.belongs(
        trainer.get("lm_name"), f"blocks.{site[1]}.hook_resid_post" if site else None
    )
    return SAE(
        Inner(W_enc, b_enc),
        selector,
        W_dec,
        b_dec,
        subtract_b_dec=dict_class not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        metadata={"layout": "dictionary_learning", "dict_class": dict_class},
        model_name=model_name,
        hook_name=hook_name,
    )


def _selector(dict_class: str, tensors: Tensors, options: Options, k: object, d_sae: int) -> Selector:
    if dict_class == "GatedAutoEncoder":
        return Gate(*(tensors.take(key, d_sae) for key in ("gate_bias", "r_mag", "mag_bias")))
    if dict_class == "JumpReluAutoEncoder":
        return JumpReLU(tensors.spread("threshold", d_sae))
    if not dict_class.endswith(("TopK", "TopKSAE")):
        return ReLU()
    k_in_file = tensors.number("k") if "k" in tensors else k
    found = int(options.active(k_in_file, d_sae, f"neither the file nor config.json says the k of this {dict_class}"))
    if dict_class == "AutoEncoderTopK":
        tensors.drop("threshold")  # its encode takes the k strongest of each token
        return TopK(found)
    tensors.drop("group_sizes")  # of a Matryoshka SAE: they shaped its loss
    threshold = tensors.number("threshold")
    if threshold < 0:
        raise CheckpointError(
            f"threshold = {threshold}: this {dict_class} was saved before it learned one; take a later one"
        )
    return BatchTopK(found, threshold)


def _class_of(stored: Stored) -> str | None:
    """The class, where the keys fit only one."""
    keys = stored.values.keys()
    if "decoder_bias" in keys:
        return "GatedAutoEncoder"
    if "group_sizes" in keys:
        return "MatryoshkaBatchTopKSAE"
    if {"W_enc", "threshold"} <= keys and "k" not in keys:
        return "JumpReluAutoEncoder"
    if "bias" in keys:
        return "AutoEncoder"
    return "AutoEncoderNew" if "decoder.bias" in keys else None
