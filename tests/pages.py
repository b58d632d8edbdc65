"""A page as a parser sees it: every tag closed, in order."""

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "input", "hr"}
LOADS = ("src", "href", "data", "action", "srcset", "poster")


class Page(HTMLParser):
    """Tags with their attributes, text, and what the page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.loads = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))
        self.loads += [value for name, value in attrs if name in LOADS]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes {self.open[-1:]}"

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.text.append(data)

    def of(self, tag, attribute):
        """An attribute of every tag of a name, None where it is not there."""
        return [found.get(attribute) for name, found in zip(self.tags, self.attributes, strict=True) if name == tag]

    @property
    def words(self):
        """The text as a reader sees it, each run of white space one space."""
        return re.sub(r"[ \n\t\r]+", " ", "".join(self.text)).strip()


def read(html):
    """Raises `AssertionError` where a tag is not closed in order."""
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page
