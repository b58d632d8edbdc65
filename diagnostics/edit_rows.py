"""The rows of a main edit and its placebos, checked, and results of them that JSON can hold."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from interventions.errors import ResultError

PLACEBOS = ("placebo_token", "placebo_isotropic")
_KEY = ["latent", "edit", "target_prompt", "target_position"]


class Json:
    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them: nan and ±inf become None, a table a list of its rows."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}  # pyright: ignore[reportArgumentType]


def plain(x: Any) -> Any:
    if is_dataclass(x):
        return x.as_dict()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(x, pd.DataFrame):
        return [plain(row) for row in x.to_dict("records")]
    if isinstance(x, Mapping):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, tuple | list):
        return [plain(v) for v in x]
    return None if isinstance(x, float) and not np.isfinite(x) else x


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
    weight = table["latent_weight"].to_numpy(dtype=float)[first]
    if not (np.isfinite(weight) & (weight > 0)).all():
        raise ResultError("a latent_weight is not above 0")
    code = np.array([edits.index(name) for name in table["edit"]])
    return EditRows(
        table, edits, code, latents, latent, weight, table["target_prompt"].to_numpy(), int((~finite).sum())
    )  # fmt: skip
