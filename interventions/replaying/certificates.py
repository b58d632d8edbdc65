"""Where replay was found exact: certificates, of one state of a model or of one run."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from interventions.errors import ModelError
from interventions.models.causal_model import CausalModel
from interventions.models.fingerprint import Fingerprint
from interventions.recording import Recording


@dataclass(frozen=True)
class Certificate:
    """The outcome of one comparison of replayed rows with full forward passes."""

    point: str
    """where in a block the rows were edited"""
    width: int
    """tokens of the longest row compared, rounded up to a power of 2"""
    first_block: int
    """the first block that computed something new"""
    longest: int
    """the last position that was read"""
    attention: str | None
    """the way to attend that is exact (see `replay`), None where neither is"""
    delta: float
    """largest logit difference from full forward passes (nan where neither way is exact)"""
    reason: str | None = None
    """why the way that is tried first, or both ways, are not exact; None where the first is"""


@dataclass
class Certificates:
    """The certificates of one state of a model.

    Replay that is exact at a block is taken to be exact at the blocks above it. A failure counts for its own block alone, so that
    the rows of a sweep take the same path wherever the sweep was begun.
    """

    exact: dict[tuple[str, int, int], Certificate] = field(default_factory=dict)
    """by (point, width, first block)"""
    otherwise: dict[tuple[str, int, int], Certificate] = field(default_factory=dict)
    """those of rows for which the way that is tried first is not exact, by the same"""

    def find(self, point: str, width: int, first_block: int, longest: int) -> Certificate | None:
        """The certificate that covers such rows, if there is one."""
        other = self.otherwise.get((point, width, first_block))
        if other is not None:
            speaks = longest >= other.longest if other.attention is None else longest <= other.longest
            return other if speaks else None
        known = [
            c
            for (p, w, block), c in self.exact.items()
            if (p, w) == (point, width) and block <= first_block and longest <= c.longest
        ]
        return max(known, key=lambda c: c.first_block, default=None)

    def add(self, certificate: Certificate) -> None:
        """Keep it, in place of one for the same rows at shorter positions."""
        key = certificate.point, certificate.width, certificate.first_block
        (self.exact if certificate.reason is None else self.otherwise)[key] = certificate


class RunCertificates:
    """The certificates of one run, of every model that it measures on.

    A run starts with none, whatever was checked before it, so that its numbers and what it says of them do not depend on what
    the process did earlier. Each unit of work begins with those that `only` gives it, whoever computed the units before it.
    """

    def __init__(self) -> None:
        self._models: WeakKeyDictionary[nn.Module, tuple[Fingerprint, Certificates]] = WeakKeyDictionary()
        self._restored: dict[str, list[Certificate]] = {}
        self._new: list[dict[str, Any]] = []

    def of(self, recording: Recording) -> Certificates:
        """Those of the recording's model. Raises `ModelError` when it changed during the run."""
        model, now = recording.model, recording.fingerprint
        assert now is not None
        if model.hf not in self._models:
            self._models[model.hf] = now, Certificates()
        before, found = self._models[model.hf]
        if changed := set(before.changed(now)) - recording.unsteady:
            raise ModelError(f"the model's {' and '.join(sorted(changed))} changed during a run; begin it again")
        for certificate in self._restored.pop(_label(model), ()):
            found.add(certificate)
        return found

    def add(self, model: CausalModel, certificate: Certificate) -> None:
        """Note a new one."""
        self._new.append({"model": _label(model), **asdict(certificate)})

    def taken(self) -> list[dict[str, Any]]:
        """Those that were added since the last time, as JSON keeps them."""
        new, self._new = self._new, []
        return new

    def only(self, certificates: list[dict[str, Any]]) -> None:
        """Rely on these alone from now on, as `taken` gave them."""
        self._models = WeakKeyDictionary({hf: (before, Certificates()) for hf, (before, _) in self._models.items()})
        self._restored, self._new = {}, []
        for given in certificates:
            fields: dict[str, Any] = {**given}
            fields["delta"] = float("nan") if fields["delta"] is None else fields["delta"]
            self._restored.setdefault(fields.pop("model"), []).append(Certificate(**fields))


def _label(model: CausalModel) -> str:
    """What tells the models of a run apart in every process."""
    return f"{model.name} ({model.note}) {model.dtype}"


_run: ContextVar[RunCertificates | None] = ContextVar("run", default=None)


@contextmanager
def certificates_of_run() -> Iterator[RunCertificates]:
    """Within it, replay relies only on certificates that were made, or restored, within it."""
    run = RunCertificates()
    token = _run.set(run)
    try:
        yield run
    finally:
        _run.reset(token)


def certificates(recording: Recording) -> Certificates:
    """Those of the run; outside of a run, those of the model as it was when recorded, and the others are dropped."""
    if (run := _run.get()) is not None:
        return run.of(recording)
    kept = recording.model.certificates
    if recording.fingerprint not in kept:
        kept.clear()
        kept[recording.fingerprint] = Certificates()
    return kept[recording.fingerprint]


def keep(recording: Recording, certificate: Certificate) -> None:
    """Keep a new certificate of a recording's model, and note it in the run."""
    certificates(recording).add(certificate)
    if (run := _run.get()) is not None:
        run.add(recording.model, certificate)
