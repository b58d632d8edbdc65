"""The rows of one call: which tokens are edited, how far each row is followed, where its effect is read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interventions.errors import EditError, SiteError
from interventions.models.anatomy import site_width
from interventions.models.uploads import as_vectors, upload, whole_numbers
from interventions.recording import Recording
from interventions.replaying.placed import Placed, placed
from interventions.replaying.replay import Branches
from interventions.sites import Site

Vectors = (
    Float[Tensor, "row d_model"]
    | Float[Tensor, "row edit d_model"]
    | np.ndarray
    | Sequence[Any]
    | Callable[[Int[Tensor, "some_row"]], Float[Tensor, "some_row d_model"] | Float[Tensor, "some_row edit d_model"]]
)
"""Edited vectors of all rows, or a function that forms those of the rows asked for (indices on the CPU)."""
Horizon = int | Literal["last"] | Int[Tensor, "row read"] | Sequence[Sequence[int]]
"""Where an effect is read: at the first edited position and the h − 1 after it, at the prompt's last position, or at the
positions given for each row (padded with −1; none before its first edit)."""


@dataclass(frozen=True)
class Reference:
    """What the clean side of a row is, where it is not the prompt as it stands: another vector at the same place."""

    vectors: Float[Tensor, "ref d_model"]
    index: Int[Tensor, "row"]
    """which of `vectors` each row is compared with (CPU)"""


_COLUMNS = 1024  # of values beyond every prompt's end, which cost next to nothing


def check_finite(
    vectors: Tensor, dtype: torch.dtype, site: Site, row: Int[np.ndarray, "row"], used: Bool[np.ndarray, "row edit"]
) -> None:
    """Raise `EditError` where a vector is not finite in `dtype`. used: those that are put in; the others are padding."""
    most = torch.finfo(dtype).max
    if not vectors.numel() or bool(vectors.detach().norm(p=torch.inf) <= most):  # of a nan it is nan
        return
    bad = ~(vectors.detach().abs().amax(-1) <= most).view(used.shape).cpu().numpy() & used
    if bad.any():
        raise EditError(
            f"{int(bad.sum())} of {int(used.sum())} vectors at {site} are not finite in {str(dtype).removeprefix('torch.')}, the first in row {int(row[bad.any(1)].min())}; "
            "expected finite numbers: look at what formed them, or pass nonfinite='count' to run them and count what comes of them in n_nonfinite"
        )


class Reads(NamedTuple):
    """Where the effects of some rows are read; all `[read]`."""

    row: np.ndarray
    """index among the rows asked for"""
    column: np.ndarray
    """how many positions after the first edited one (0 for the last position)"""
    position: np.ndarray


def given_reads(recording: Recording, horizon: Horizon) -> np.ndarray | None:
    """The positions that a horizon lists, or None. Raises `SiteError` for what is none."""
    if isinstance(horizon, Tensor | np.ndarray | list | tuple):
        return whole_numbers(horizon, "read positions").numpy()
    if not (horizon == "last" or (isinstance(horizon, int) and horizon >= 1)):
        raise SiteError(f"horizon {horizon!r}; expected a number of positions, 1 or more, or 'last'")
    if isinstance(horizon, int) and horizon > max(_COLUMNS, longest := int(recording.length.max())):
        raise SiteError(f"horizon {horizon}, but the longest prompt has {longest} tokens; expected no more, or 'last'")
    return None


class Rows:
    """Rows checked and sorted so that what shares a clean side stands together.

    Raises `SiteError` for tokens that do not exist, `EditError` for vectors that do not fit and edits that nothing reads.
    """

    def __init__(
        self,
        recording: Recording,
        site: Site,
        prompt: Int[Tensor, "row"],
        position: Int[Tensor, "row"] | Int[Tensor, "row edit"],
        vectors: Vectors,
        reference: Reference | None = None,
        horizon: Horizon = 1,
    ):
        given = given_reads(recording, horizon)
        if prompt.ndim != 1 or position.ndim not in (1, 2) or prompt.shape != position.shape[:1]:
            raise SiteError(
                f"prompts {list(prompt.shape)} and positions {list(position.shape)}; expected one of each a row"
            )
        self.several = position.ndim == 2
        positions = position if self.several else position[:, None]
        used = positions >= 0 if self.several else torch.ones_like(positions, dtype=torch.bool)
        if self.several and not bool(((positions >= -1).all(1) & used.any(1)).all()):
            raise SiteError("a row edits no position, or a negative one; expected positions, padded with −1")
        which = used.nonzero()
        recording.check_rows(prompt[which[:, 0]] if len(prompt) else prompt, positions[used])
        vectors = vectors if callable(vectors) else as_vectors(vectors)
        if not callable(vectors) and vectors.shape[:-1] != position.shape:
            raise EditError(
                f"edited vectors of shape {list(vectors.shape)} for positions {list(position.shape)}; give one for each"
            )
        if reference is not None:
            index = whole_numbers(reference.index, "reference indices")
            if len(index) != len(prompt) or self.several or given is not None:
                raise EditError(
                    f"{len(index)} reference indices for positions {list(position.shape)}; give one for each row, and one edited "
                    "position a row, and no list of positions to read"
                )
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(reference.vectors):
                raise EditError(
                    f"reference indices from {int(index.min())} to {int(index.max())} for {len(reference.vectors)} vectors"
                )
            reference = Reference(as_vectors(reference.vectors), index)
        self.recording, self.site, self.vectors, self.reference = recording, site, vectors, reference
        self.prompt = prompt.numpy()
        n_pos = int(recording.length.max())
        place = torch.where(used, positions, n_pos).numpy()
        self.columns = np.argsort(place, axis=1, kind="stable")
        self.positions = np.take_along_axis(place, self.columns, axis=1)  # ascending, n_pos where there is none
        self.n_edits = used.sum(1).numpy()
        self.start = self.positions[:, 0]
        self._read_at(horizon, given)
        self._check_edits()
        self.entry: np.ndarray | None = None  # the first block that each row runs, where these differ
        self.attention: str | None = None  # how replay is to attend, once it was found exact
        self.along: Any = None  # the `Along` that the vectors were given as, if they were
        self.clean_key = self.prompt * n_pos + self.start if reference is None else reference.index.numpy()
        self.order = np.lexsort((self.clean_key, self.start, self.prompt))

    def check_finite(self) -> None:
        """Raise `EditError` for vectors that are not finite in the dtype of the stream; those that a function forms are not seen."""
        if isinstance(self.vectors, Tensor):
            used = np.zeros(self.columns.shape, dtype=bool)
            np.put_along_axis(used, self.columns, self._used(np.arange(len(self))), axis=1)
            check_finite(self.vectors, self.recording.model.stream_dtype, self.site, np.arange(len(self)), used)

    @property
    def first_block(self) -> int:
        """The first block that any row runs."""
        return self.site.first_block

    @property
    def sites(self) -> list[Site]:
        """What is edited."""
        return [self.site]

    @property
    def label(self) -> str:
        """What is edited, as certificates name it."""
        return self.site.point

    def _read_at(self, horizon: Any, given: np.ndarray | None) -> None:
        """Where effects are read; `start` is known."""
        length, self.given = self.recording.length.numpy()[self.prompt], given
        self.last_only = isinstance(horizon, str)
        self.n_columns = given.shape[1] if given is not None else 1 if horizon == "last" else int(horizon)
        self.one_read = given is None and self.n_columns == 1
        if given is not None:
            self._check_reads(given, length)
            self.stop = given.max(axis=1) + 1
        else:
            self.stop = length if isinstance(horizon, str) else np.minimum(self.start + int(horizon), length)

    def _check_reads(self, given: np.ndarray, length: np.ndarray) -> None:
        if given.ndim != 2 or len(given) != len(self.prompt):
            raise SiteError(f"read positions of shape {list(given.shape)}; expected [{len(self.prompt)}, read]")
        outside = (given >= 0) & ((given < self.start[:, None]) | (given >= length[:, None])) | (given < -1)
        if (bad := np.flatnonzero(outside.any(1) | (given < 0).all(1))).size:
            row = int(bad[0])
            raise SiteError(
                f"row {row} reads positions {given[row][given[row] >= 0].tolist()}; expected some from its first edit, "
                f"{int(self.start[row])}, to its prompt's end, {int(length[row]) - 1}, padded with −1"
            )

    def _check_edits(self) -> None:
        here, after = self.positions[:, :-1], self.positions[:, 1:]
        twice = (here == after) & (after < self.recording.tokens.shape[1])
        if twice.any():
            row = int(np.flatnonzero(twice.any(1))[0])
            raise EditError(f"row {row} edits position {int(here[row][twice[row]][0])} twice; give each position once")
        last = self.positions[np.arange(len(self.prompt)), self.n_edits - 1]
        if (unread := np.flatnonzero(last >= self.stop)).size:
            row = int(unread[0])
            raise EditError(
                f"row {row} edits position {int(last[row])}, but its effect is read at positions {int(self.start[row])} to "
                f"{int(self.stop[row]) - 1}; use a longer horizon, or 'last'"
            )

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def width(self) -> int:
        """Tokens of the longest branch."""
        return int((self.stop - self.start).max())

    @property
    def furthest(self) -> np.ndarray:
        """The last position that each row reads, `[row]`."""
        return self.stop - 1

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """All rows in their order, as many at a time as have `size` tokens, one at least."""
        reached, done = np.cumsum((self.stop - self.start)[self.order]), 0
        while done < len(self):
            before = reached[done - 1] if done else 0
            stop = max(done + 1, int(np.searchsorted(reached, before + size, side="right")))
            yield self.order[done:stop]
            done = stop

    def branches(self, rows: np.ndarray) -> Branches:
        """Rows in ascending order of prompt, as branches."""
        start, length = self.start[rows], (self.stop - self.start)[rows]
        if not self.several and (length == 1).all():
            return Branches.single(self.prompt[rows], start)
        first = np.cumsum(length) - length
        place = self.positions[rows] - start[:, None] + first[:, None]
        return Branches(self.prompt[rows], start, length, place[self._used(rows)])

    def _used(self, rows: np.ndarray) -> np.ndarray:
        return np.arange(self.positions.shape[1]) < self.n_edits[rows, None]

    def placed(self, rows: np.ndarray, vectors: Tensor | None = None, branches: Branches | None = None) -> list[Placed]:
        """The edits of these rows, or `vectors` in their place."""
        edited = (self.branches(rows) if branches is None else branches).edited
        return [placed(self.recording, self.site, edited, self.edited(rows) if vectors is None else vectors)]

    def edited(self, rows: np.ndarray) -> Float[Tensor, "edit width"]:
        """The vectors of these rows, in the order of their branches' edited tokens."""
        model = self.recording.model
        index = torch.from_numpy(rows)
        value = self.vectors(index) if callable(self.vectors) else self.vectors[upload(index, self.vectors.device)]
        width = site_width(model, self.site, self.recording.tokens.shape[1])
        expected = (len(rows), *((self.positions.shape[1],) if self.several else ()), width)
        if value.shape != expected:
            raise EditError(f"edited vectors of shape {list(value.shape)}; expected {list(expected)}")
        value = upload(value, model.device).to(model.stream_dtype)
        if not self.several:
            return value
        row, column = np.nonzero(self._used(rows))
        at = upload(np.stack([row, self.columns[rows][row, column]]), model.device)
        return value[at[0], at[1]]

    def clean_at_site(self, rows: np.ndarray) -> Float[Tensor, "edit d_model"]:
        """What stands at the site of each edited token before its edit (with a reference: the reference)."""
        if self.reference is not None:
            return self.reference_vectors(rows)
        row, column = np.nonzero(self._used(rows))
        prompt, position = self.prompt[rows][row], self.positions[rows][row, column]
        return self.recording.at(self.site, torch.from_numpy(prompt), torch.from_numpy(position))

    def reference_vectors(self, rows: np.ndarray) -> Float[Tensor, "some_row d_model"]:
        assert self.reference is not None
        model, given = self.recording.model, self.reference.vectors
        chosen = given[upload(self.reference.index[torch.from_numpy(rows)], given.device)]
        return upload(chosen, model.device).to(model.stream_dtype)

    def reads(self, rows: np.ndarray) -> Reads:
        """Where the effects of these rows are read, row by row."""
        if self.given is not None:
            row, column = np.nonzero(self.given[rows] >= 0)
            return Reads(row, column, self.given[rows][row, column])
        if self.last_only:
            return Reads(np.arange(len(rows)), np.zeros(len(rows), dtype=int), self.stop[rows] - 1)
        length = (self.stop - self.start)[rows]
        row = np.repeat(np.arange(len(rows)), length)
        column = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
        return Reads(row, column, self.start[rows][row] + column)

    def distinct_clean(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One row for each reference at one token among `rows`, in their order, and which of these each row belongs to."""
        place = np.stack([self.prompt[rows], self.start[rows], self.clean_key[rows]])
        new = np.r_[True, (place[:, 1:] != place[:, :-1]).any(axis=0)]
        return rows[new], np.cumsum(new) - 1
