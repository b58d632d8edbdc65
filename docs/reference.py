"""Docstrings as they stand in the code, made ready for the page.

They are plain text: `names` in single backticks, equations and tables set in by four spaces, arguments explained as
`name: what it is`. Everything else (stars, bars, underscores) means itself.
"""

import inspect
import re
from importlib import import_module
from pathlib import Path

API = Path(__file__).parent / "api"


def shown():
    """Modules that the pages of `api/` show, and which of their functions and classes (none: all)."""
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted(API.glob("*.md")))
    found = {module: [] for module in re.findall(r"^\.\. automodule:: (\S+)$", pages, flags=re.MULTILINE)}
    whole = set(found)
    for module, name in re.findall(r"^\.\. auto(?:function|class):: (\S+)\.(\w+)$", pages, flags=re.MULTILINE):
        if module not in whole:  # else it is only shown first
            found.setdefault(module, []).append(name)
    return found


def setup(app):
    names = _names()
    app.connect("autodoc-process-docstring", lambda _a, _k, full, of, _o, lines: _process(lines, full, of, names))
    app.connect("autodoc-process-signature", lambda _a, _k, _f, _of, _o, text, result: _parsable(text, result))


def _names():
    """Full names of what the reference shows, by the short name that docstrings use; none where two share one."""
    found: dict[str, set[str]] = {}
    for module, members in shown().items():
        for name, value in vars(import_module(module)).items():
            if (
                name in (members or [name])
                and not name.startswith("_")
                and getattr(value, "__module__", None) == module
                and value.__doc__
            ):
                found.setdefault(name, set()).add(f"{module}.{name}")
    return {name: full.pop() for name, full in found.items() if len(full) == 1}


def _parsable(signature, result):
    """The signature with defaults that Sphinx can parse: a class by its name, `<factory>` as `...`. None: as it is."""
    if not signature or "<" not in signature:
        return None
    named = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", signature)
    return re.sub(r"(= ?)<[^<>]*>", r"\1...", named), result


def _process(lines, full, of, names):
    if lines and lines[0].startswith("Alias for field number"):  # what Python says of a NamedTuple's field, not we
        lines.clear()
        return
    arguments = _arguments(of)
    known = {name: to for name, to in names.items() if to != full}
    lines[:] = as_rst(lines, arguments, known)


def _arguments(of):
    try:
        return set(inspect.signature(of).parameters) if callable(of) else set()
    except (ValueError, TypeError):
        return set()


def as_rst(lines, arguments=(), names=None):
    """reStructuredText of a docstring's lines: code spans, links to `names`, preformatted blocks, marked arguments."""
    made, preformatted = [], False
    for line in lines:
        if line.startswith("    "):
            if not preformatted:
                made += ["", ".. code-block:: none", ""]
            preformatted = True
            made.append(line)
        elif not line.strip():
            made.append("")
        else:
            if preformatted:
                made.append("")
            preformatted = False
            made.append(_inline(line, arguments, names or {}))
    return [*made, ""]


def _inline(line, arguments, names):
    indent = line[: len(line) - len(line.lstrip())]
    parts = re.split(r"(``.+?``|`[^`]+`)", line.lstrip())
    return indent + "".join(_code(part, names) if i % 2 else _text(part, arguments) for i, part in enumerate(parts))


def _code(span, names):
    text = span.strip("`")
    if text in names:
        return f"\\ :py:obj:`{text} <{names[text]}>`\\ "
    return f"\\ ``{text}``\\ "


def _text(part, arguments):
    part = re.sub(r"([\\*_|])", r"\\\1", part)

    def marked(match):
        return f"{match[1]}**{match[2]}**:" if match[2].replace("\\", "") in arguments else match[0]

    return re.sub(r"(^|[.;:] )((?:\w|\\_)+):(?= )", marked, part)
