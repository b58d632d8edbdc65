"""Provenance in words: what was measured, on what, and by which path."""

from collections.abc import Iterable, Mapping
from typing import Any

from diagnostics.results import Shown
from interventions.sites import Site


def provenances(result: Shown) -> dict[str, Mapping[str, Any]]:
    """The provenance of each run behind a result, by its name; of a result of its own under an empty name."""
    p = result.provenance
    return {"": p} if "model" in p or not p or not all(isinstance(v, Mapping) for v in p.values()) else dict(p)


def measured_on(p: Mapping[str, Any]) -> list[str]:
    """Model, text, place, seed and path, each in a few words; what is not known is left out."""
    parts = [_model(p), _text(p), _sites(p), _saes(p), _context(p), _sinks(p)]
    parts += [f"seed {p['seed']}"] if "seed" in p else []
    return [part for part in [*parts, _path(p)] if part]


def _model(p: Mapping[str, Any]) -> str:
    if "model" not in p:
        return ""
    more = [p.get("model_note"), p.get("dtype"), p.get("device")]
    return f"{p['model']} ({', '.join(str(part) for part in more if part)})"


def text_names(p: Mapping[str, Any]) -> list[str]:
    """Of the text that a run read, or of each of its texts."""
    if isinstance(p.get("text"), Mapping):
        return [str(p["text"].get("name", "given text"))]
    return [str(name) for name in p.get("texts", ())]


def _text(p: Mapping[str, Any]) -> str:
    counts = [f"{p[what]:,} {what}" for what in ("prompts", "tokens") if isinstance(p.get(what), int)]
    return ", ".join([*text_names(p), *counts])


def _sites(p: Mapping[str, Any]) -> str:
    by: dict[str, list[str]] = {}
    for site in map(Site.parse, p.get("sites", ())):
        by.setdefault(site.point, []).append(str(site.layer))
    some = [f"{point} of block{'s' * (len(layers) > 1)} {listed(layers, 12)}" for point, layers in by.items()]
    return "at " + " and ".join(some) if some else ""


def _saes(p: Mapping[str, Any]) -> str:
    names = list(p.get("saes", {}))
    return f"SAE{'s' * (len(names) > 1)} {listed(names)}" if names else ""


def _context(p: Mapping[str, Any]) -> str:
    given = p.get("context", ())
    words = {"in_place": "in context", "single_token": "as the only token"}
    return " and ".join(words.get(c, str(c)) for c in ([given] if isinstance(given, str) else given))


def _sinks(p: Mapping[str, Any]) -> str:
    if "sink_filter" not in p:
        return ""
    return f"sinks above {p['sink_filter']:g} × median ‖x‖ left out" if p["sink_filter"] else "no sink filter"


def _path(p: Mapping[str, Any]) -> str:
    given = p.get("path")
    paths = sorted(set(given.values())) if isinstance(given, Mapping) else [given] if isinstance(given, str) else []
    named = {"hooks": "full forward passes", "blocks": "the blocks above the site"}
    delta = p.get("replay_delta", p.get("path_delta"))
    exact = "" if delta is None else f", logits within {delta:.1g} of full forward passes"
    return f"by {' and '.join(named.get(path, path) for path in paths)}{exact}" if paths else ""


def listed(names: Iterable[Any], most: int = 8, between: str = ", ") -> str:
    """Names with commas (or what is given) between them, the rest as a number."""
    given = [str(name) for name in names]
    return between.join(given[:most]) + (f" and {len(given) - most} more" if len(given) > most else "")
