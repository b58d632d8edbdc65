"""How a result is made again: its command, or the call that made it, both kept in its provenance."""

import functools
import inspect
import shlex
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from diagnostics.results.result import BaseResult, Result
from diagnostics.results.words import provenances
from interventions.sites import Site

F = TypeVar("F", bound=Callable[..., Any])
_NOT_THE_RESULT = ("folder", "overwrite", "progress")
"""Arguments that do not change a result."""
_DESCRIBED = ("saes", "directions")
"""Arguments whose names and hashes stand in provenance."""


def recorded(function: F) -> F:
    """Keep in a result's provenance which function made it, with the keyword arguments that are not defaults (`call`).

    Arguments that JSON cannot hold are named (`not_kept`), but for SAEs and directions: provenance has their names and hashes.
    """
    signature = inspect.signature(function)
    keywords = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]

    @functools.wraps(function)
    def called(*args: Any, **given: Any) -> Any:
        result = function(*args, **given)
        asked = {p.name: _plain(given[p.name]) for p in keywords if p.name in given and p.name not in _NOT_THE_RESULT}
        defaults = {p.name: _plain(p.default) for p in keywords}
        kept = {name: value for name, value in asked.items() if value is not _OTHER and value != defaults[name]}
        lost = [name for name, value in asked.items() if value is _OTHER and name not in _DESCRIBED]
        call = {"function": function.__name__, "arguments": kept} | ({"not_kept": lost} if lost else {})
        result.provenance.setdefault("call", call)
        return result

    return called  # type: ignore[return-value]


_OTHER = object()


def _plain(value: Any) -> Any:
    """A value as JSON keeps it, sites as their names; `_OTHER` for what it cannot hold."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Site):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple, range)):
        parts = [_plain(part) for part in value]
        return _OTHER if any(part is _OTHER for part in parts) else parts
    return _OTHER


def reproduction(result: BaseResult, folder: str) -> str:
    """Lines of a shell or of Python that make a result again, in the folder where it lies; empty where nothing recorded how."""
    runs = provenances(result)
    if commands := [p["command"] for p in runs.values() if "command" in p]:
        return "\n".join(dict.fromkeys(shlex.join([*map(str, words), "--out", folder]) for words in commands))
    if kind := result.FORMED_OF:
        named = ", ".join(f"{name!r}: {kind}.load({name!r})" for name in runs)
        call = f"result = {result.CALL}({{{named}}})  # the folders of these runs"
        return f"from diagnostics import {kind}, {result.CALL}\n\n{call}"
    p = result.provenance
    if "call" in p and "planted" in p:  # neither model nor prompts
        given = "".join(f"    {name}={value!r},\n" for name, value in p["call"]["arguments"].items())
        return f"from diagnostics import {p['call']['function']}\n\nresult = {p['call']['function']}(\n{given})"
    if "call" not in p or not isinstance(result, Result):
        return ""
    call, given, saes = p["call"]["function"], p["call"]["arguments"], list(p.get("saes", {}))
    lines = [
        f"from diagnostics import {call}",
        "from diagnostics.results.stored import load_tokens",
        f"from interventions import {'Site, ' * ('sites' in given)}load_model",
        *(["from sae_models import load_sae"] if saes else []),
        "",
        f"model = load_model({p['model']!r}, dtype={p['dtype']!r}, device={p['device']!r})  # weights {p['weights_sha256'][:12]}",
        f"prompts = load_tokens({f'{folder}/tokens.npy'!r})  # {len(result.tokens)} prompts, as token ids",
    ]
    if saes:
        lines.append("saes = {  # the folder or the name in the zoo of each")
        lines += [f"    {name!r}: load_sae({name!r}),  # {_hash(p['saes'][name])}" for name in saes]
        lines.append("}")
    directions = p.get("directions", {})
    lines += [f"{name} = ...  # your direction, sha256 {digest}" for name, digest in directions.items()]
    asked = {name: _written(name, value) for name, value in given.items()}
    asked |= {"directions": "{" + ", ".join(f"{name!r}: {name}" for name in directions) + "}"} if directions else {}
    arguments = "".join(f"    {name}={value},\n" for name, value in asked.items())
    arguments += "".join(
        f"    {name}=...,  # what you gave, which was not kept\n" for name in p["call"].get("not_kept", ())
    )
    return "\n".join([*lines, f"result = {call}(\n    model, prompts,{' saes,' * bool(saes)}\n{arguments})"])


def _written(name: str, value: Any) -> str:
    return f"[Site.parse(site) for site in {value!r}]" if name == "sites" else repr(value)


def _hash(sae: Any) -> str:
    return f"sha256 {sae['sha256']}" if isinstance(sae, Mapping) and "sha256" in sae else "as it was"
