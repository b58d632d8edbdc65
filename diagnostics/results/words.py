"""Lines of text, and provenance in words: the model, text, sites and path of a run, and what was left out."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from interventions.errors import count
from interventions.sites import Site

COLUMNS = 100
"""columns of a terminal"""
_COUNTS = {
    "rows_dropped": "rows dropped",
    "pairs_dropped": "pairs dropped",
    "dropped": "dropped",
    "circuit_left_out": "components of edges outside the scope, left out of the circuit",
    "tokens_left_out": "tokens left out",
    "left_out": "tokens left out",
    "rows_not_finite": "rows not finite",
    "placebos_not_finite": "placebos not finite",
    "second_orders_not_finite": "second orders not finite",
    "selves_not_finite": "identity edits: effect not finite",
    "effects_not_finite": "effects not finite",
    "chunks_halved": "chunks halved because memory ran out (last bits may differ from another run's)",
}
"""Keys of provenance that count what is missing; each a number, or numbers by reason."""
_PREPARED = ("text", "texts", "labelled")
"""Parts of provenance about the preparation of texts."""


class HasProvenance(Protocol):
    """Anything with provenance."""

    @property
    def provenance(self) -> dict[str, Any]: ...


def provenances(result: HasProvenance) -> dict[str, dict[str, Any]]:
    """The provenance of each run behind a result, by name; an empty name for the only run."""
    p = result.provenance
    return {"": p} if "model" in p or not p or not all(isinstance(v, Mapping) for v in p.values()) else dict(p)


def measured_on(p: Mapping[str, Any]) -> list[str]:
    """Model (or what was planted in place of one), text, sites, seed and path, each in a few words, where known."""
    parts = [str(p.get("planted", "")), _model(p), _text(p), _sites(p), _saes(p), _context(p), _sinks(p)]
    parts += [f"seed {p['seed']}"] if "seed" in p else []
    return [part for part in [*parts, _path(p)] if part]


def counted(result: HasProvenance) -> list[str]:
    """Names of models, numbers of sites, SAEs and prompts: `["smollm2-135m", "3 sites", "200 prompts"]`, where known."""
    every = list(provenances(result).values())
    found = list(dict.fromkeys(str(p["model"]).rstrip("/").rpartition("/")[2] for p in every if "model" in p))
    for key, one in (("sites", "site"), ("saes", "SAE")):
        if n := len({str(value) for p in every for value in p.get(key, ())}):
            found.append(count(n, one))
    prompts = [p["prompts"] for p in every if isinstance(p.get("prompts"), int)]
    return [*found, count(sum(prompts), "prompt")] if prompts else found


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


def wrapped(text: str, columns: int = COLUMNS) -> str:
    """Text whose longer lines go on in the next line, indented; a word is never broken."""
    lines = [
        textwrap.wrap(line, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        if len(line) > columns
        else [line]
        for line in text.split("\n")
    ]
    return "\n".join(line for some in lines for line in some)


def listed(names: Iterable[Any], most: int = 8, between: str = ", ") -> str:
    """Names joined by commas (or by `between`); further ones are counted."""
    given = [str(name) for name in names]
    return between.join(given[:most]) + (f" and {len(given) - most} more" if len(given) > most else "")


def left_out(result: HasProvenance) -> list[str]:
    """`left_out_of` each run behind a result."""
    return [f"{name}: {line}" if name else line for name, p in provenances(result).items() for line in left_out_of(p)]


def left_out_of(p: Mapping[str, Any]) -> list[str]:
    """Fallbacks to slower or less exact ways and what was dropped, with reasons; a line each."""
    why = list(dict.fromkeys(_values(p, "why_hooks")))
    said = [f"full forward passes in place of the fast path: {reason}" for reason in why]
    said += [
        f"central differences in place of forward mode: {reason}" for reason in dict.fromkeys(_values(p, "why_central"))
    ]
    if not why and "hooks" in _paths(p):
        said.append("full forward passes were used, as requested")
    lost: dict[tuple[str, str, bool], list[str]] = {}  # of the whole run, or of places that are named
    for place, key, counts in _lost(p):
        lost.setdefault((_COUNTS[key], counts, bool(place)), []).append(place)
    for (what, counts, _), places in lost.items():
        at = listed(places, 4, "; ")
        said.append(f"{what}{f' ({at})' if at else ''}: {counts}")
    return said


def _values(p: Any, key: str) -> Iterator[str]:
    """Values of a key, anywhere in nested dictionaries, as strings."""
    if isinstance(p, Mapping):
        for name, value in p.items():
            if name == key:
                yield from [value] if isinstance(value, str) else value or ()
            else:
                yield from _values(value, key)


def _paths(p: Mapping[str, Any]) -> set[str]:
    given = p.get("path")
    named = given.values() if isinstance(given, Mapping) else [given]
    return {part for path in named if isinstance(path, str) for part in path.split("+")}


def _lost(p: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str, str]]:
    """Where, under which key, and how many by reason."""
    for name, value in p.items():
        if name in _PREPARED or name == "joined":
            continue
        if name in _COUNTS:
            yield from ((f"{place}{where_}".strip(", "), name, said) for where_, said in _said(value))
        elif isinstance(value, Mapping):
            yield from _lost(
                value, place if name in ("drawn", "atlas", "dictionary", "ablations", "saes") else f"{place}, {name}"
            )


def _said(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, (int, float)):
        if value:
            yield place, f"{value:,}"
    elif isinstance(value, Mapping):
        counts = {reason: n for reason, n in value.items() if isinstance(n, (int, float))}
        if any(n for reason, n in counts.items() if reason != "of"):
            of = counts.pop("of", None)
            said = ", ".join(f"{n:,} ({reason})" for reason, n in counts.items() if n)
            yield place, said + (f", of {of:,}" if of else "")
        for name, inner in value.items():
            if isinstance(inner, Mapping):
                yield from _said(inner, f"{place}, {name}")
