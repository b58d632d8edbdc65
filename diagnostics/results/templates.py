"""Templates of the pages of results, cards and reports. Every value that a template inserts is escaped here."""

from jinja2 import Environment, PackageLoader, PrefixLoader, StrictUndefined
from markupsafe import Markup

from diagnostics.figures.looks import PAGE_COLOURS

_FOLDERS = {name: f"{name}/templates" for name in ("results", "cards", "reports")}
"""Folders within the package, by the first part of a template's name."""
_ENVIRONMENT = Environment(
    loader=PrefixLoader({name: PackageLoader("diagnostics", folder) for name, folder in _FOLDERS.items()}),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.globals["colours"] = PAGE_COLOURS


def render(template: str, **values: object) -> str:
    """A page from a template such as `cards/card.html`. Strings are escaped; what `part` returned is inserted as it is.

    Raises `jinja2.UndefinedError` where the template uses a value that is not given.
    """
    return _ENVIRONMENT.get_template(template).render(values)


def part(template: str, **values: object) -> Markup:
    """The same for a part that another template inserts."""
    return Markup(render(template, **values))
