"""The command line of a dataclass of settings: options under headings, each with its docstring, and a help to act on."""

import ast
import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

Settings = TypeVar("Settings")
HEADINGS = {
    "SAE": ("sae", "saes", "compare"),
    "text": [
        "prompts",
        "prompts_second",
        "data",
        "concepts",
        "per_class",
        "n_prompts",
        "splice_prompts",
        "held_out",
        "on_training_text",
        "max_length",
        "chat_template",
    ],
    "site": ("layer", "layers", "sites", "context", "horizon", "sink_filter", "skip_first"),
    "model": ("model", "dtype", "device", "trust_remote_code"),
    "control": ("null_model", "null_seeds"),
    "run": ("seed", "path", "batch_rows", "batch_tokens"),
    "output": ("out", "overwrite", "no_lock", "json", "quiet"),
}
"""Under which heading an option stands, in every command that has it, and in which order; all others come before, under none."""
ENDINGS = "Exit codes: 0 done; 2 the input does not serve (one line says why); 130 interrupted; 143 told to end; 1 our mistake."


def parsed(settings: type[Settings], words: Sequence[str] | None = None) -> Settings:
    """The words of a command line (default: this process's) as settings. Raises `SystemExit` where the parser does."""
    words = sys.argv[1:] if words is None else words
    if {"-h", "--help"} & set(words):
        print(description(settings), end="\n\n")  # ours: the parser's own would join lines
    form, within = _form(settings)
    given = _values(tyro.cli(form, args=words, description=""))
    for heading in HEADINGS.keys() & given.keys():
        given |= _values(given.pop(heading))
    return settings(**given | {name: kind(**_values(given[name])) for name, kind in within.items()})


def _values(group: Any) -> dict[str, Any]:
    return {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}


@cache
def _form(settings: type) -> tuple[Any, dict[str, Any]]:
    """The same fields in a dataclass that has a dataclass a heading, which is how the parser is told of headings.

    With those fields, by name, that are dataclasses themselves: each stands under a heading of its name.
    """
    types = get_type_hints(settings, include_extras=True)
    docs, fields, within = attribute_docs(settings), {}, {}
    for field in dataclasses.fields(settings):
        kind = _bare(types[field.name])
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            assert field.default_factory is not dataclasses.MISSING
            within[field.name], own, hints = kind, attribute_docs(kind), get_type_hints(kind)
            options = [_option(hints[k], k, v, own) for k, v in _values(field.default_factory()).items()]
            fields.setdefault(None, []).append(_group(field.name, options))
        else:
            heading = next((name for name, options in HEADINGS.items() if field.name in options), None)
            option = _option(types[field.name], field.name, field.default, docs)
            fields.setdefault(heading, []).append(option)
    for heading, order in HEADINGS.items():
        if options := sorted(fields.get(heading, []), key=lambda option, order=list(order): order.index(option[0])):
            fields.setdefault(None, []).append(_group(heading, options))
    return _dataclass(settings.__name__, fields[None]), within


def _dataclass(name: str, fields: list[Any]) -> Any:
    return dataclasses.make_dataclass(name, fields, kw_only=True, namespace={"__doc__": ""})


def _group(heading: str, options: list[Any]) -> tuple[str, Any]:
    return heading, Annotated[_dataclass(heading, options), tyro.conf.OmitArgPrefixes]


def _option(type_: Any, name: str, default: Any, docs: dict[str, str]) -> tuple[str, Any, Any]:
    """A field as `make_dataclass` takes it, with what its help says."""
    help, how = " ".join(docs.get(name, "").split()), {}
    if tyro.conf.Positional in getattr(type_, "__metadata__", ()):
        how |= {"metavar": f"{name.upper()} ...", "help_behavior_hint": "(required)"}
    elif metavar := _metavar(_bare(type_)):
        how["metavar"] = metavar
    if any(default is plain for plain in (False, (), None)) or (
        default is not dataclasses.MISSING and "default" in help
    ):
        how["help_behavior_hint"] = ""  # a flag, or the help says it better
    return name, Annotated[type_, tyro.conf.arg(help=help, **how)], dataclasses.field(default=default)


def _bare(type_: Any) -> Any:
    return get_args(type_)[0] if get_origin(type_) is Annotated else type_


def _metavar(type_: Any) -> str | None:
    """INT for int | None, INT ... for tuple[int, ...], NUM for float; None where the parser says it well."""
    inner = get_args(type_)
    if get_origin(type_) is tuple:
        return f"{_word(inner[0])} ..." if inner[1:] == (...,) else " ".join(map(_word, inner))
    return _word(inner[0] if type(None) in inner else type_) if type_ is not bool else None


def _word(type_: Any) -> str:
    return "NUM" if type_ is float else type_.__name__.upper()


def description(settings: type) -> str:
    """The docstring and what exit codes mean, laid out for the terminal; examples and indented lines stay lines of their own."""
    width = min(shutil.get_terminal_size().columns, 120)
    laid = []
    for paragraph in [*(inspect.getdoc(settings) or "").split("\n\n"), ENDINGS]:
        if not re.match("Examples?:", paragraph):
            items = re.split(r"\n(?=  \S)", paragraph)
            paragraph = "\n".join(_filled(item, width) for item in items)
        laid.append(paragraph)
    return "\n\n".join(laid)


def _filled(item: str, width: int) -> str:
    own = item[: len(item) - len(item.lstrip())]
    after = own and own + "  "
    words = " ".join(item.split())
    return textwrap.fill(words, width, initial_indent=own, subsequent_indent=after, break_long_words=False)


def attribute_docs(settings: type) -> dict[str, str]:
    """The docstrings under a dataclass's fields, its own before those of the classes that it builds on.

    A class that was typed in, and stands in no file, has none.
    """
    found: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = inspect.getsource(base)
        except OSError:
            continue
        [definition] = ast.parse(textwrap.dedent(source)).body
        assert isinstance(definition, ast.ClassDef)
        for field, under in pairwise(definition.body):
            match field, under:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = text
    return found
