"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`.

z = TopK(ReLU(W_enc (x − b_dec) + b_enc)),   x̂ = z W_dec + b_dec
"""

import re

from sae_models.errors import CheckpointError
from sae_models.readers.stored import Stored
from sae_models.readers.strict import Options, Tensors, setting
from sae_models.sae import SAE
from sae_models.scores import Inner
from sae_models.selectors import TopK


def recognises(stored: Stored) -> bool:
    """Its file name."""
    return stored.path.name == "sae.safetensors"


def read(stored: Stored, options: Options) -> SAE:
    """A TopK SAE. Options: model_name, hook_name (known where the folder is called `layers.N` or `h.N`).

    `normalize_decoder` and `expansion_factor` say how it was trained and change nothing here; nor does `multi_topk`: this is
    the library's `decode(encode(x))` with k latents, where its `forward` then returns the reconstruction with 4k. Raises
    `CheckpointError` for transcoders (with a skip connection or not), signed latents and activations other than topk.
    """
    config = stored.config
    flags = {key: setting(config, key, bool, default=False) for key in ("transcode", "skip_connection", "signed")}
    if flags["transcode"] or flags["skip_connection"] or "W_skip" in stored.values:
        raise CheckpointError("a transcoder (transcode or skip_connection is set); expected an SAE")
    if flags["signed"]:
        raise CheckpointError("signed = true: latents of either sign; expected signed = false")
    activation = setting(config, "activation", str, default="topk")
    if activation != "topk":
        raise CheckpointError(f"activation {activation!r}; expected topk")
    tensors = Tensors(stored.values)
    W_enc, W_dec = tensors.pair("encoder.weight", "W_dec")
    d_sae, d_model = W_dec.shape
    n_latents = setting(config, "num_latents", int, type(None), default=None) or d_sae  # 0: expansion_factor said it
    if (setting(config, "d_in", int), n_latents) != (d_model, d_sae):
        raise CheckpointError(
            f"W_dec has shape {(d_sae, d_model)}; expected {(n_latents, config['d_in'])} from cfg.json"
        )
    b_enc, b_dec = tensors.take("encoder.bias", d_sae), tensors.take("b_dec", d_model)
    tensors.finish("a TopK SAE")
    block = re.fullmatch(r"(?:layers|h)\.(\d+)", stored.path.parent.name)
    model_name, hook_name = options.belongs(None, f"blocks.{block[1]}.hook_resid_post" if block else None)
    return SAE(
        Inner(W_enc, b_enc),
        TopK(int(options.active(config.get("k"), d_sae, "a TopK SAE, and cfg.json does not say its k"))),
        W_dec,
        b_dec,
        metadata={"layout": "sparsify"},
        model_name=model_name,
        hook_name=hook_name,
    )
