"""The command line of a dataclass of options: parsed and laid out by tyro, under headings, with the dataclass's docstring."""

import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from diagnostics.commands.ranges import check_ranges

Options = TypeVar("Options")
HEADINGS = {
    "SAE": ("saes", "compare"),
    "text": (
        *("prompts", "prompts_second", "data", "concepts", "per_class", "n_prompts", "splice_prompts", "held_out"),
        *("on_training_text", "max_length", "chat_template"),
    ),
    "site": ("layer", "layers", "sites", "context", "horizon", "sink_filter", "skip_first"),
    "model": ("model", "dtype", "device", "trust_remote_code"),
    "control": ("null_model", "null_seeds"),
    "run": ("seed", "path", "batch_rows", "batch_tokens"),
    "workers": ("workers", "ray", "part", "mixed"),
    "output": ("out", "overwrite", "no_lock", "json", "quiet"),
}
"""Under which heading an option stands, in every command that has it, and in which order; all others come first, without a heading."""
EXIT_CODES = (
    "Exit codes: 0 done; 2 invalid input (one line says why); 130 interrupted; 143 terminated; 1 a bug in mechdiag."
)


def parsed(options: type[Options], words: Sequence[str] | None = None) -> Options:
    """The words of a command line (default: this process's) as options.

    Raises `MechdiagError` for a number out of its range, and `SystemExit` where tyro does.
    """
    words = sys.argv[1:] if words is None else words
    if {"-h", "--help"} & set(words):
        print(description(options), end="\n\n")  # tyro would join the lines of a description
    layout = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    given = vars(tyro.cli(_form(options), args=words, description="", config=layout))
    for heading in HEADINGS.keys() & given.keys():
        given |= vars(given.pop(heading))
    check_ranges(options, given)
    made = {name: options.__dataclass_fields__[name].default_factory() for name in _nested(options)}  # type: ignore[attr-defined]
    return options(**given | {name: dataclasses.replace(own, **vars(given[name])) for name, own in made.items()})


def option_names(options: type) -> list[str]:
    """The names of a command's options, as they are typed."""
    nested = _nested(options)
    every = [
        found for kind in (options, *nested.values()) for found in get_type_hints(kind, include_extras=True).items()
    ]
    shown = [
        name
        for name, kind in every
        if name not in nested and tyro.conf.Suppress not in getattr(kind, "__metadata__", ())
    ]
    return [f"--{name.replace('_', '-')}" for name in (*shown, "help")]


@cache
def _form(options: type) -> Any:
    """The same fields in a dataclass that has a dataclass for each heading: tyro groups options by these.

    An option hides the field of its name in a nested dataclass, which keeps its default there.
    """
    fields, nested = {option[0]: option for option in _fields(options)}, _nested(options)
    groups = [
        (
            name,
            _dataclass(name, [f for f in _fields(kind, fields.pop(name)[2].default_factory()) if f[0] not in fields]),
        )
        for name, kind in nested.items()
    ]
    groups += [
        (heading, _dataclass(heading, own))
        for heading, names in HEADINGS.items()
        if (own := [fields.pop(name) for name in names if name in fields])
    ]
    return _dataclass(options.__name__, [*fields.values(), *groups])


def _nested(options: type) -> dict[str, Any]:
    """The fields that are dataclasses themselves, by name; each gets its own heading."""
    return {name: kind for name, kind in get_type_hints(options).items() if dataclasses.is_dataclass(kind)}


def _dataclass(name: str, fields: list[Any]) -> Any:
    return dataclasses.make_dataclass(name, fields, kw_only=True, namespace={"__doc__": ""})


def _fields(options: type, defaults: Any = None) -> list[tuple[str, Any, Any]]:
    """Fields as `make_dataclass` takes them, with their help. A default that says nothing, or that the help explains, is not shown."""
    types, plain, docs = get_type_hints(options, include_extras=True), get_type_hints(options), _docs(options)
    found = []
    for field in dataclasses.fields(options):
        default = field.default if defaults is None else getattr(defaults, field.name)
        how: dict[str, Any] = {"help": " ".join(docs.get(field.name, "").split())}
        if tyro.conf.Positional in getattr(types[field.name], "__metadata__", ()):
            how |= {"metavar": f"{field.name.upper()} ...", "help_behavior_hint": "(required)"}
        elif metavar := _metavar(plain[field.name]):
            how["metavar"] = metavar
        if any(default is blank for blank in (False, (), None)) or (
            default is not dataclasses.MISSING and "default" in how["help"]
        ):
            how["help_behavior_hint"] = ""
        given = dataclasses.field(default=default, default_factory=field.default_factory)
        found.append((field.name, Annotated[types[field.name], tyro.conf.arg(**how)], given))
    return found


def _metavar(type_: Any) -> str | None:
    """Shorter than tyro's, which would move most help texts to a line of their own; None where tyro's is short."""
    kinds = get_args(type_)
    if get_origin(type_) is Literal:
        return "STR"
    if kinds[-1:] == (NoneType,) or kinds[-1:] == (...,):
        return kinds[0].__name__.upper() + " ..." * (kinds[-1] is ...)
    return None


def _docs(options: type) -> dict[str, str]:
    """The docstrings under the fields of a dataclass, its own before those of its bases."""
    parts = [
        part for base in reversed(options.__mro__[:-1]) for part in docstring_parser.parse_from_object(base).params
    ]
    return {part.arg_name: part.description or "" for part in parts}


def description(options: type) -> str:
    """The docstring and the exit codes, wrapped to the terminal; paragraphs with indented lines, such as examples, keep their lines.

    A subcommand of `mechdiag` is installed where there are no scripts: its examples bear its own name.
    """
    width = min(shutil.get_terminal_size().columns, 120)
    text = inspect.getdoc(options) or ""
    if sys.argv[0].startswith("mechdiag "):
        text = re.sub(r"scripts/\w+\.py", sys.argv[0], text)
    paragraphs = [*text.split("\n\n"), EXIT_CODES]
    return "\n\n".join(text if "\n  " in text else textwrap.fill(text, width) for text in paragraphs)
