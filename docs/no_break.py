"""Keeps an interval, and a number with its percent sign, on one line of running text; cells of tables may break there."""

import re

from docutils import nodes

TOGETHER = re.compile(r"(?<=\d) (?=%)|(?<=[\d∞],) (?=[−+]?[\d.∞]+\])")
NO_BREAK = "\u00a0"


def setup(app):
    app.connect("doctree-read", lambda app, tree: _keep(tree))


def _keep(tree):
    for paragraph in tree.findall(nodes.paragraph):
        if isinstance(paragraph.parent, nodes.entry):
            continue
        for text in list(paragraph.findall(nodes.Text)):
            if not isinstance(text.parent, nodes.literal | nodes.math) and TOGETHER.search(text):
                text.parent.replace(text, nodes.Text(TOGETHER.sub(NO_BREAK, text)))
