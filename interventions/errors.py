"""Errors that say what was seen, what was expected and what to do. Commands print them on one line and exit 2."""


class MechdiagError(ValueError):
    """Base of every error that this project raises on purpose."""


class SiteError(MechdiagError):
    """A place in the model that does not exist, or a position outside a prompt."""


class ModelError(MechdiagError):
    """A model that cannot be found, loaded or understood."""


class TextError(MechdiagError):
    """A text that cannot be read, or prompts that are empty or too short."""


class EditError(MechdiagError):
    """An edit that cannot be formed, that changes nothing, or that gives a vector of the wrong shape."""


class HookError(MechdiagError):
    """A hook that did not fire."""


class ReplayError(MechdiagError):
    """Replay was asked for by name on a model for which it is not exact."""


class ResultError(MechdiagError):
    """A result that cannot be formed, or a folder that cannot take it."""
