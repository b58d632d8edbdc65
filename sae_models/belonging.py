"""Where an SAE belongs in a model: read off its metadata and checked."""

from pathlib import Path
from typing import Any

from interventions.cache import cache_folder
from interventions.errors import SiteError
from interventions.models.anatomy import check_site
from interventions.models.causal_model import CausalModel
from interventions.models.names import COUNTERPART, DEFAULT_MODEL
from interventions.models.wrapping import wrap
from interventions.sites import POINTS, Site, SiteLike, as_site
from sae_models.errors import BelongingError
from sae_models.live import as_sae
from sae_models.normalise import CENTRED

_OTHER_NAMES = {"gpt2-small": "gpt2"}
"""TransformerLens' name of a model, under which SAEs of it are known, and the hub's"""


def sae_site(sae: Any, model: Any, site: SiteLike | None = None) -> Site:
    """Where an SAE (anything that `as_sae` takes) belongs in `model` (anything that `wrap` takes), read off its hook name.

    site: where it is about to be put, if that has been chosen. Raises `BelongingError` for an SAE of another width, model or
    site, `SAEError` for weights that are not finite, `SiteError` for a hook name that is no site here (`hook_z`, `ln2.hook_normalized`, …) or that the model has not.
    Models are the same where their weights' hashes are (the SAE's in `metadata["weights_sha256"]`), however they are wrapped;
    where either is not known (a remote model's never is) names are compared, without owner and case. A `layernorm_counterpart` takes the SAEs of the
    model that it is made of. An SAE of centred activations belongs to a model with LayerNorm, which does not see their mean.
    """
    causal, sae = wrap(model), as_sae(sae)
    if sae.hook_name is None:
        raise BelongingError(
            "this SAE does not say where it belongs; set sae.hook_name, e.g. 'blocks.15.hook_resid_post'"
        )
    try:
        own = Site.parse(sae.hook_name)
    except SiteError as error:
        raise SiteError(_unknown(sae.hook_name)) from error
    if own.inside:
        raise SiteError(_unknown(sae.hook_name))
    elsewhere = None if site is None or as_site(site) == own else as_site(site).hook_name
    sae.check_belongs(d_model=causal.d_model, hook_name=elsewhere)
    sae.check_finite()
    _check_model(sae, causal)
    if sae.normalise.kind in CENTRED.values() and (why := _why_not_centred(causal)):
        raise BelongingError(
            f"an SAE of a model with centred writing weights put to {causal.name}, which has {why}: there TransformerLens leaves "
            "activations with a mean; load the SAE with center_writing_weights=False"
        )
    check_site(causal, own)
    return own


def _why_not_centred(model: CausalModel) -> str | None:
    """Why the stream keeps a mean though TransformerLens is asked to centre what is written into it (None: it does not)."""
    if model.norm_kind != "LayerNorm":
        return model.norm_kind
    if not getattr(model.hf.config, "do_layer_norm_before", True):
        return "LayerNorm behind its blocks"
    normed = any("embeddings_layernorm" in name for name, _ in model.base.named_modules())
    return "LayerNorm behind its embeddings" if normed else None


def _unknown(hook_name: str) -> str:
    return f"an SAE of {hook_name!r}, which is no site of SAEs here; known: {', '.join(f'blocks.N.hook_{p}' for p in POINTS)}"


def _check_model(sae: Any, model: CausalModel) -> None:
    known = sae.metadata.get("weights_sha256")
    if known is not None:
        if not isinstance(known, str):
            raise BelongingError(
                f"the SAE's weights_sha256 is a {type(known).__name__}; expected a text: remove it from sae.metadata"
            )
        if not model.remote and known not in (model.weights_hash, model.counterpart_of):
            raise BelongingError(
                f"an SAE of weights {known[:12]}… ({sae.model_name}) put to weights {model.weights_hash[:12]}… ({model.name}); "
                "take one trained there, or remove sae.metadata['weights_sha256']"
            )
        if not model.remote:
            return
    own = (sae.model_name or "").rsplit("/", 1)[-1].lower()
    sae.check_belongs(model_name=own if own in _other_names(model) else model.name)


def _other_names(model: CausalModel) -> set[str]:
    """What a model is called beside its name here, without owner and case."""
    folder, short = Path(model.name), model.name.rsplit("/", 1)[-1].lower()
    names = {other for other, hub in _OTHER_NAMES.items() if hub == short}
    if folder.parent == cache_folder() and folder.name.startswith(f"{DEFAULT_MODEL}-"):
        names.add(DEFAULT_MODEL)  # wrapped by hand: its configuration knows the folder alone
    if model.counterpart_of is not None:
        names.add(short.removesuffix(COUNTERPART))
    return names
