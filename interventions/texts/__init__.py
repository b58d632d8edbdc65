"""Texts: prompts, corpora that come with packages, labelled texts, held-out paragraphs."""

from interventions.texts.prompts import Prompts, Texts, as_prompts, load_texts, prompts_for, tokenize

__all__ = [
    "Prompts",
    "Texts",
    "as_prompts",
    "load_texts",
    "prompts_for",
    "tokenize",
]
