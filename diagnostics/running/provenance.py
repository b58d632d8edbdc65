"""The identity of a run, by which its units are found again, and the provenance of its result."""

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
    """What a diagnostic's units are kept under: its name, own settings, text and model. Reads every byte of the weights anew.

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
    """The provenance of a result: diagnostic, model and machine, text, sites, null models, then the diagnostic's own entries.

    text: the prompts, or a description of each of several texts. own: settings, number of rows, notes, in this order: results list what
    was left out in the order of the notes.
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
