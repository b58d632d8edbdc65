"""What a run is told from others by, and what a reader must know to make its numbers again."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from interventions.models.causal_model import CausalModel
from interventions.provenance import model_identity, model_provenance
from interventions.sites import Site
from interventions.texts.prompts import Prompts


def hashed(value: Any) -> str:
    """SHA-256, in hexadecimal, of what JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def run_identity(
    name: str, model: CausalModel, text: Prompts | Mapping[str, str], own: dict[str, Any]
) -> dict[str, Any]:
    """Under which a diagnostic's units are kept: its name, own settings, text and model, every byte of the weights read anew.

    text: the prompts, or a hash of each of several texts.
    """
    read = {"tokens": hashed(text.tokens)} if isinstance(text, Prompts) else {"texts": dict(text)}
    return {"diagnostic": name, **own, **read, **model_identity(model)}


def run_provenance(
    name: str,
    model: CausalModel,
    text: Prompts | Mapping[str, Any],
    sites: Iterable[Site],
    own: dict[str, Any],
    null_models: Iterable[str] = (),
) -> dict[str, Any]:
    """What stands beside every result of units: the diagnostic, model and machine, text, sites, null models; then its own.

    text: the prompts, or what is to be said of each of several texts. own: settings, numbers of rows, notes; in this order, for what was
    left out is told in the order of the notes.
    """
    read = {"texts": dict(text)} if not isinstance(text, Prompts) else {
        "text": text.provenance, "prompts": len(text.tokens), "tokens": sum(map(len, text.tokens)),
    }  # fmt: skip
    return {
        "diagnostic": name,
        **model_provenance(model),
        **read,
        "sites": list(dict.fromkeys(map(str, sites))),
        "null_models": list(null_models),
        **own,
    }
