"""Which paragraphs of a text an SAE is trained on, and which are kept to judge it by."""

import hashlib
import re
from dataclasses import replace

from interventions.errors import TextError
from interventions.texts.prompts import Texts

_HEAD = 40


def split(texts: Texts, share: float = 0.1, seed: int = 0) -> tuple[Texts, Texts]:
    """The paragraphs for training and those held out, each in the order of their source.

        held out:  blake2b(seed, head) < share · 2⁶⁴,   head: the first 40 letters and digits of the paragraph, in lower case

    A paragraph's side depends on the seed, the share and its own head alone: not on a tokenizer, a length, or what else is in
    the text, so that a part of a text is split as the whole is, and a larger share only adds paragraphs. Paragraphs that begin
    alike are on one side (a tenth of BoolQ's are revisions of another, or come from the same page). Hence `share` of the
    paragraphs is held out in the mean, not exactly. Names and hashes of the parts are their own. Source: ours.
    Raises `TextError` for a share outside (0, 1), and where one of the parts would be empty.
    """
    if not 0 < share < 1:
        raise TextError(f"a held-out share of {share}; expected a number between 0 and 1, such as 0.1")
    out = [_place(text, seed) < share for text in texts.texts]
    if not 0 < sum(out) < len(out):
        raise TextError(
            f"{sum(out)} of {len(out)} paragraphs of {texts.name} would be held out; give more text or another share"
        )
    rule = f"{share:.3g} of it by blake2b, seed {seed}"
    return (
        _part(texts, [not o for o in out], f"without what is held out ({rule})", "held out"),
        _part(texts, out, f"held out ({rule})", "not held out"),
    )


def _place(text: str, seed: int) -> float:
    """Where in [0, 1) a paragraph's head falls."""
    head = "".join(re.findall(r"\w", text.lower()))[:_HEAD]
    digest = hashlib.blake2b(f"{seed}:{head}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _part(texts: Texts, keep: list[bool], what: str, without: str) -> Texts:
    kept = [text for text, k in zip(texts.texts, keep, strict=True) if k]
    digest = hashlib.sha256("\0".join(kept).encode("utf-8", "surrogatepass")).hexdigest()
    dropped = {**texts.dropped, without: len(texts.texts) - len(kept)}
    return replace(texts, texts=kept, name=f"{texts.name}, {what}", sha256=digest, dropped=dropped)
