"""Errors about SAEs: what was seen, what was expected, what to do."""

from interventions.errors import MechdiagError


class SAEError(MechdiagError):
    """An SAE that cannot be built, used or trained as asked; the base of all errors about SAEs.

    What it says is one printable line, whatever names and values a damaged file holds.
    """

    def __init__(self, said: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(said.split())))


class CheckpointError(SAEError):
    """A file that is no SAE known here, or one whose keys, shapes or settings are not what its format promises."""


class BelongingError(SAEError):
    """An SAE put where it was not trained: another width, another model, another site."""
