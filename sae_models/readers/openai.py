"""The released code of arXiv:2406.04093 (openai/sparse_autoencoder): a `.pt` of its state_dict.

u = layer-normalised x (TopK), x (ReLU);   z = activation(W_enc (u − b_pre) + b_lat),   x̂ = W_dec z + b_pre, un-normalised
"""

from torch import Tensor

from sae_models.errors import CheckpointError
from sae_models.normalise import normalisation
from sae_models.readers.stored import Stored
from sae_models.readers.strict import Options, Tensors, setting, shown
from sae_models.sae import SAE
from sae_models.scores import Inner
from sae_models.selectors import ReLU, Selector, TopK

_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def recognises(stored: Stored) -> bool:
    """Its names of the two biases."""
    return {"pre_bias", "latent_bias", "encoder.weight"} <= stored.values.keys()


def read(stored: Stored, options: Options) -> SAE:
    """A TopK SAE on layer-normalised inputs, or a ReLU SAE on plain ones: the file says the activation, and that says the rest.

    Options: model_name, hook_name; where the file does not say the activation, `k` (TopK) or `activation="ReLU"`.
    """
    tensors = Tensors(stored.values)
    tied = "decoder.linear.weight" in tensors
    W_enc, W_dec = (
        tensors.pair("encoder.weight", "decoder.linear.weight")
        if tied
        else tensors.pair("encoder.weight", "decoder.weight", decoder_columns=True)
    )
    d_sae, d_model = W_dec.shape
    b_lat, b_pre = tensors.take("latent_bias", d_sae), tensors.take("pre_bias", d_model)
    tensors.drop(*_STATISTICS)
    activation = tensors.plain("activation", str, type(None))
    state = dict(tensors.plain("activation_state_dict", dict, type(None)) or {})
    k = state.pop("k", None)
    if isinstance(k, Tensor) and k.numel() == 1:
        k = k.item()
    if activation is None and options.take("k", k) is not None:
        activation = "TopK"
    activation = options.need("activation", activation, "the file does not say its activation, TopK (then k=) or ReLU")
    selector: Selector
    if activation == "TopK":
        selector = TopK(int(options.active(k, d_sae, "a TopK SAE, and the file does not say its k")))
        after = setting(state, "postact_fn", str, default="ReLU")
        state.pop("postact_fn", None)
        if after != "ReLU":
            raise CheckpointError(f"TopK followed by {after}: latents of either sign; expected ReLU")
    elif activation == "ReLU":
        selector = ReLU()
    else:
        raise CheckpointError(f"activation {shown(activation)}; expected TopK or ReLU")
    if state:
        raise CheckpointError(
            f"{', '.join(map(str, state))}: settings of the activation that are not known; expected k and postact_fn"
        )
    tensors.finish("this SAE")
    model_name, hook_name = options.belongs(None, None)
    return SAE(
        Inner(W_enc, b_lat),
        selector,
        W_dec,
        b_pre,
        normalise=normalisation("layer_norm" if activation == "TopK" else "none"),
        metadata={"layout": "openai"},
        model_name=model_name,
        hook_name=hook_name,
    )
