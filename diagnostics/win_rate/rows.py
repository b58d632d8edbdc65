"""The rows of a main edit and its placebos, checked."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from diagnostics.statistics.tables import PLACEBOS
from interventions.errors import ResultError

_KEY = ["latent", "edit", "target_prompt", "target_position"]


class EditRows(NamedTuple):
    """The rows of a main edit and its placebos, with numbers for the labels."""

    table: pd.DataFrame
    edits: list[str]  # the main one first
    edit: Int[ndarray, "row"]
    latents: Int[ndarray, "latent"]
    latent: Int[ndarray, "row"]
    weight: Float[ndarray, "latent"]
    prompt: Int[ndarray, "row"]
    n_not_finite: int


def latent_weights(rows: pd.DataFrame, first: Int[ndarray, "latent"]) -> Float[ndarray, "latent"]:
    """`latent_weight` of each latent, given the index of its first row. Raises `ResultError` for a weight not above 0."""
    weight = rows["latent_weight"].to_numpy(dtype=float)[first]
    if not (np.isfinite(weight) & (weight > 0)).all():
        raise ResultError("a latent_weight is not above 0")
    return weight


def read(rows: pd.DataFrame, edit: str, numbers: Sequence[str]) -> EditRows:
    if missing := [name for name in (*_KEY, "latent_weight", *numbers) if name not in rows]:
        raise ResultError(f"the rows have no column {missing}; known: {list(rows.columns)}")
    names = rows["edit"].to_numpy()
    if not (names == edit).any():
        raise ResultError(f"no row of the edit {edit!r}; known: {sorted(set(names))}")
    edits = [edit, *(p for p in PLACEBOS if p != edit and (names == p).any())]
    some = cast(pd.DataFrame, rows[np.isin(names, edits)])
    if some[_KEY].duplicated().any():
        raise ResultError("a latent has two rows of one edit and token; give the rows of one site, context and SAE")
    finite = np.isfinite(cast(pd.DataFrame, some[list(numbers)]).to_numpy(dtype=float)).all(axis=1)
    table = cast(pd.DataFrame, some[finite])
    if not (table["edit"] == edit).any():
        raise ResultError(f"no row of the edit {edit!r} has finite {list(numbers)}")
    latents, first, latent = np.unique(table["latent"].to_numpy(), return_index=True, return_inverse=True)
    weight = latent_weights(table, first)
    code = np.array([edits.index(name) for name in table["edit"]])
    return EditRows(
        table, edits, code, latents, latent, weight, table["target_prompt"].to_numpy(), int((~finite).sum())
    )  # fmt: skip
