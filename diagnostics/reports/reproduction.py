"""How to reproduce a result: its command where known, else a Python call from its tokens and settings."""

import inspect
import shlex
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from diagnostics.results.result import BaseResult, Result
from diagnostics.results.words import provenances
from interventions.sites import Site


def reproduction(result: BaseResult, folder: str) -> str:
    """Shell or Python lines that reproduce a result in its folder; empty for kinds without a call."""
    commands = [p["command"] for p in provenances(result).values() if "command" in p]
    if commands:
        return "\n".join(dict.fromkeys(shlex.join([*map(str, words), "--out", folder]) for words in commands))
    if kind := result.FORMED_OF:
        runs = ", ".join(f"{name!r}: {kind}.load({name!r})" for name in provenances(result))
        call = f"result = {result.CALL}({{{runs}}})  # the folders of these runs"
        return f"from diagnostics import {kind}, {result.CALL}\n\n{call}"
    if not result.CALL or not isinstance(result, Result):
        return ""
    p, call = result.provenance, getattr(import_module("diagnostics"), result.CALL)
    saes, given = list(p.get("saes", {})), arguments(call, p)
    lines = [
        f"from diagnostics import {call.__name__}",
        "from diagnostics.results.stored import load_tokens",
        f"from interventions import {'Site, ' * ('sites' in given)}load_model",
        *(["from sae_models import load_sae"] if saes else []),
        "",
        f"model = load_model({p['model']!r}, dtype={p['dtype']!r}, device={p['device']!r})  # weights {p['weights_sha256'][:12]}",
        f"prompts = load_tokens({f'{folder}/tokens.npy'!r})  # {len(result.tokens)} prompts, as token ids",
    ]
    if saes:
        lines.append("saes = {  # the folder or the name in the zoo of each")
        lines += [f"    {name!r}: load_sae({name!r}),  # {_sha(p['saes'][name])}" for name in saes]
        lines.append("}")
    for name, digest in p.get("directions", {}).items():
        lines.append(f"{name} = ...  # your direction, sha256 {digest}")
    asked = "".join(f"    {name}={value},\n" for name, value in given.items())
    return "\n".join([*lines, f"result = {call.__name__}(\n    model, prompts,{' saes,' * bool(saes)}\n{asked})"])


def _sha(sae: Any) -> str:
    return f"sha256 {sae['sha256']}" if isinstance(sae, Mapping) and "sha256" in sae else "as it was"


def arguments(call: Callable[..., Any], p: Mapping[str, Any]) -> dict[str, str]:
    """Keyword arguments in provenance that differ from a diagnostic's defaults, as Python."""
    given: dict[str, Any] = {"sites": [], **p, **p.get("settings", {})}
    given |= {"path": p.get("asked_path", "auto"), "null_seeds": len(p.get("null_models", ()))}
    given |= {name: p[f"{name}_asked"] for name in ("pairs", "tokens") if f"{name}_asked" in p}
    if not given.get("latents") and "n_latents" in p:
        given["latents"] = p["n_latents"]
    if isinstance(given.get("context"), list):
        given["context"] = "both" if len(given["context"]) == 2 else given["context"][0]
    parameters = inspect.signature(call).parameters
    sites = [Site.parse(site) for site in p.get("sites", ())]
    if all(site.point == "resid_post" for site in sites):
        given["layers"] = [site.layer for site in sites]
        del given["sites"]
    found = {}
    for name, parameter in parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or name not in given:
            continue
        value = given[name]
        if name == "directions":
            found |= {name: "{" + ", ".join(f"{n!r}: {n}" for n in value) + "}"} if value else {}
        elif name == "sites":
            found[name] = f"[Site.parse(site) for site in {value!r}]"
        elif not isinstance(value, Mapping) and _plain(value) != _plain(parameter.default):
            found[name] = repr(value)
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
