"""Errors that say what was seen, what was expected and what to do, and counts in words. Commands print them on one line and exit 2."""


class MechdiagError(ValueError):
    """Base of every error that this project raises on purpose."""


class SiteError(MechdiagError):
    """A place in the model that does not exist, or a position outside a prompt."""


class ModelError(MechdiagError):
    """A model that cannot be found, loaded or taken apart, or that changed after it was recorded."""


class TextError(MechdiagError):
    """A text that cannot be read, or prompts that are empty or too short."""


class EditError(MechdiagError):
    """An edit that cannot be formed, that changes nothing, or that gives a vector of the wrong shape."""


class HookError(MechdiagError):
    """A hook that did not fire."""


class ReplayError(MechdiagError):
    """Replay was asked for by name on a model for which it is not exact."""


class ResultError(MechdiagError):
    """A result that cannot be formed or is damaged, or a folder that cannot take it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on any device."""
    import torch

    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error).lower() for word in words)


def one_line(error: BaseException) -> str:
    """The kind of a foreign error and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def count(n: int, what: str) -> str:
    """As messages count: `1 prompt`, `2 prompts`, `10,000 tokens`."""
    return f"{n:,} {what}{'s' * (n != 1)}"
