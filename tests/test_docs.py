"""The pages hold together: links, pictures and objects that they name exist, and every error has its page."""

import importlib
import re
from pathlib import Path

import pytest

import diagnostics
import interventions
import sae_models

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def prose(page: Path) -> str:
    """A page without its code, in blocks and in spans."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!\})`[^`\n]+`", "", text)


def anchors(page: Path) -> set[str]:
    """What links may name behind #: its headings as they are made into names."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_objects_that_pages_name_exist(page):
    for named in re.findall(r"\{py:\w+\}`([^`]+)`", prose(page)):
        full = re.sub(r".*<(.+)>", r"\1", named)
        *path, name = full.split(".")
        for depth in range(len(path), 0, -1):
            try:
                found = importlib.import_module(".".join(path[:depth]))
                break
            except ModuleNotFoundError:
                continue
        else:
            pytest.fail(full)
        for part in [*path[depth:], name]:
            assert hasattr(found, part) or part in getattr(found, "__annotations__", {}), full
            found = getattr(found, part, None)


def test_no_picture_lies_unused():
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
