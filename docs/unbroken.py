"""Keeps an interval, a number with its % sign, and `k = 16` on one line."""

import re

from docutils import nodes

_AS_ONE = re.compile(r"(\[[^\[\]\s]+,\s[^\[\]\s]+\]|\b\w{1,3}\s=\s[−+]?[\d.,]*\d|[\d.,]*\d\s%)")
_AS_WRITTEN = (nodes.FixedTextElement, nodes.literal, nodes.math, nodes.title)


def setup(app):
    app.connect("doctree-read", lambda app, tree: _keep(tree), priority=900)  # after the links of `first_use`


def _keep(tree):
    for element in list(tree.findall(nodes.TextElement)):
        if not isinstance(element, _AS_WRITTEN) and _AS_ONE.search(element.astext()):
            element[:] = [piece for child in _joined(element.children) for piece in _pieces(child)]


def _joined(children):
    """The children of an element; texts that follow each other, such as two lines, are one."""
    made = []
    for child in children:
        if made and isinstance(child, nodes.Text) and isinstance(made[-1], nodes.Text):
            made[-1] = nodes.Text(made[-1] + child)
        else:
            made.append(child)
    return made


def _pieces(child):
    if not isinstance(child, nodes.Text):
        return [child]
    texts = _AS_ONE.split(str(child))  # every second one is to be kept on one line
    made = [nodes.inline(t, t, classes=["unbroken"]) if i % 2 else nodes.Text(t) for i, t in enumerate(texts)]
    return [piece for piece in made if piece.astext()]
