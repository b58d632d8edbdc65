"""Links the first use of each term of the glossary on a page to its definition."""

import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

GLOSSARY = Path(__file__).parent / "glossary.md"
APART = ("api/", "errors/", "claims", "commands", "glossary", "papers", "sources")
"""Pages of references and lists, where links would be in the way."""
COMMON_WORDS = {"pair", "recording", "row", "share"}
"""Terms that mean other things as well: their uses are not linked."""
_NOT_WITHIN = (nodes.literal, nodes.reference, nodes.title, nodes.math, nodes.caption, addnodes.pending_xref)


def terms(page=GLOSSARY):
    """The terms that the glossary defines, those of several words first."""
    text = page.read_text(encoding="utf-8").split(":::{glossary}\n")[1].split("\n:::")[0]
    found = [line for line in text.splitlines() if line and not line.startswith(" ")]
    return sorted(found, key=lambda term: (-len(term), term))


def setup(app):
    linked = [term for term in terms() if term not in COMMON_WORDS]
    pattern = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, linked))})(?:s|es)?(?![\w-])", re.IGNORECASE)
    by_name = {term.lower(): term for term in linked}
    app.connect("doctree-read", lambda app, tree: _link(tree, app.env.docname, pattern, by_name))


def _link(tree, page, pattern, by_name):
    if page.startswith(APART):
        return
    left = dict(by_name)
    for paragraph in tree.findall(nodes.paragraph):
        for text in list(paragraph.findall(nodes.Text)):
            if not _within(text, paragraph):
                text.parent.replace(text, _pieces(str(text), page, pattern, left))


def _within(text, paragraph):
    above = text.parent
    while above is not paragraph:
        if isinstance(above, _NOT_WITHIN):
            return True
        above = above.parent
    return False


def _pieces(text, page, pattern, left):
    """The text in pieces, each term that is still `left` as a reference."""
    made, end = [], 0
    for match in pattern.finditer(text):
        if term := left.pop(match[1].lower(), None):
            made += [nodes.Text(text[end : match.start()]), _reference(match[0], term, page)]
            end = match.end()
    return [*made, nodes.Text(text[end:])]


def _reference(shown, term, page):
    inline = nodes.inline(shown, shown, classes=["std", "std-term"])
    return addnodes.pending_xref(
        "", inline, refdomain="std", reftype="term", reftarget=term, refdoc=page, refexplicit=True, refwarn=True
    )
