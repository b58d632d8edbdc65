"""Texts: prompts, corpora that come with packages, labelled texts, held-out paragraphs."""

from typing import TYPE_CHECKING

from interventions.lazy import handed_on

if TYPE_CHECKING:
    from interventions.texts.prompts import Prompts, Texts, as_prompts, load_texts, prompts_for, tokenize

__all__ = [
    "Prompts",
    "Texts",
    "as_prompts",
    "load_texts",
    "prompts_for",
    "tokenize",
]

_HOMES = {
    "Prompts": "prompts",
    "Texts": "prompts",
    "as_prompts": "prompts",
    "load_texts": "prompts",
    "prompts_for": "prompts",
    "tokenize": "prompts",
}
"""The module of each name."""
__getattr__, __dir__ = handed_on(__name__, _HOMES)
