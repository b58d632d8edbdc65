"""The pages hold together: links, pictures and objects that they name exist, and every error has its page."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import diagnostics
import interventions
import sae_models
from diagnostics.running import ends
from interventions.errors import MechdiagError
from sae_models.errors import SAEError

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def prose(page: Path) -> str:
    """A page without its code, in blocks and in spans."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(\{py:\w+\}`[^`\n]+`)|`[^`\n]+`", r"\1", text)


def anchors(page: Path) -> set[str]:
    """What links may name behind #: its headings as they are made into names."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_line_begins_with_a_percent_sign(page):
    """It would be a comment, which the site leaves out."""
    assert not re.findall(r"^\s*%.*", prose(page), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = page if not name else (page.parent / name).resolve()
        assert there.is_file() and ROOT in there.parents, target
        if anchor:
            assert anchor in anchors(there), target


def exists(full: str) -> bool:
    """Whether a dotted name is that of a module, or of something in one."""
    parts = full.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:depth]))
            break
        except ModuleNotFoundError:
            continue
    else:
        return False
    for part in parts[depth:]:
        if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
            return False
        found = getattr(found, part, None)
    return True


NAMED = re.compile(r"(?<![\w/])(?:interventions|sae_models|diagnostics)(?:\.[A-Za-z_]\w*)+(?!\.?\w)")
IMPORTED = re.compile(r"from ((?:interventions|sae_models|diagnostics)[\w.]*) import ([\w, ]+)")


@pytest.mark.parametrize(
    "page",
    [page for page in (*PAGES, *NOTEBOOKS) if page.name != "CHANGELOG.md"],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_named_modules_and_members_exist(page):
    text = page.read_text(encoding="utf-8")
    names = {*NAMED.findall(text), *(f"{m}.{name}" for m, some in IMPORTED.findall(text) for name in some.split(", "))}
    assert [name for name in sorted(names) if ".mean_ablation" not in name and not exists(name)] == []


def test_new_names_in_the_changelog_exist():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    moved = re.findall(r"^\| `[\w.]+`.* \| `([\w.]+)`", text, flags=re.MULTILINE)
    assert len(moved) > 30
    assert [new for new in moved if not (exists(new) or (ROOT / "scripts" / new).is_file())] == []


def test_every_picture_is_used():
    used = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [path.name for path in DOCS.glob("*.png") if path.name not in used]


def shown() -> set[str]:
    """The modules that the reference shows."""
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    return set(re.findall(r"^\.\. automodule:: (\S+)$", pages, flags=re.MULTILINE))


@pytest.mark.parametrize("package", [interventions, sae_models, diagnostics], ids=lambda package: package.__name__)
def test_reference_shows_every_public_name(package):
    missing = {name: module for name in package.__all__ if (module := getattr(package, name).__module__) not in shown()}
    assert not missing
    undocumented = [name for name in package.__all__ if not getattr(package, name).__doc__]
    assert not undocumented


ERRORS = {
    name: error
    for package in (interventions, sae_models, ends)
    for name, error in ((name, getattr(package, name)) for name in dir(package))
    if isinstance(error, type) and issubclass(error, (MechdiagError, SAEError, ends.Interrupted))
}


def test_every_error_has_a_page_and_a_line_in_the_index():
    index = (DOCS / "errors" / "index.md").read_text(encoding="utf-8")
    assert len(ERRORS) >= 12
    for name in ERRORS:
        page = (DOCS / "errors" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {name}\n") and f"[{name}]({name}.md)" in index
    listed = [line for line in index.splitlines() if line in ERRORS]
    assert sorted(listed) == sorted(ERRORS)


def quoted() -> list[tuple[str, str]]:
    """Messages that the pages on errors quote: (class, error or warning; message)."""
    pages = [path.read_text(encoding="utf-8") for path in sorted((DOCS / "errors").glob("*.md"))]
    lines = [
        line
        for page in pages
        for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
    ]
    return [(kind, message) for kind, _, message in (line.partition(": ") for line in lines)]


def formats() -> dict[str, list[re.Pattern[str]]]:
    """What the sources may say, by the class that they raise; a field stands for any text."""
    found: dict[str, list[re.Pattern[str]]] = {}
    for folder in ("interventions", "sae_models", "diagnostics", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(call, ast.Call) and (called := ast.unparse(call.func).split(".")[-1]) in [
                    *ERRORS,
                    "warn",
                ]:
                    found.setdefault(called, []).extend(_patterns(call))
    return found


def _patterns(call: ast.Call) -> list[re.Pattern[str]]:
    texts = [part for argument in call.args[:1] for part in ast.walk(argument)]
    said = [part.values if isinstance(part, ast.JoinedStr) else [part] for part in texts if _is_text(part)]
    whole = ["".join(re.escape(str(v.value)) if isinstance(v, ast.Constant) else ".*" for v in parts) for parts in said]
    return [re.compile(pattern) for pattern in whole if len(pattern.replace(".*", "")) > 10]


def _is_text(part: ast.AST) -> bool:
    return isinstance(part, ast.JoinedStr) or (isinstance(part, ast.Constant) and isinstance(part.value, str))


def test_quoted_messages_match_the_sources():
    known = formats()
    assert len(quoted()) > 60
    kinds = {"warning": ["warn"], "error": list(ERRORS)}
    strange = [
        (kind, message)
        for kind, message in quoted()
        if kind != "Interrupted"  # its words are its own: `test_units` has them
        and not any(p.fullmatch(message) for name in kinds.get(kind, [kind]) for p in known[name])
    ]
    assert not strange
