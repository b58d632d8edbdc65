"""A training run: several SAEs, one pass over a stream, kept in a folder and resumed exactly.

run.json        what was asked for; another run does not go on here
metrics.jsonl   a line for each SAE and interval: step, tokens, FVE, L0, dead share, …
checkpoint.pt   what the next step depends on; gone when the run is done
<name>/         each SAE, as `save_sae` writes it
"""

import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from torch import Tensor

from sae_models.architectures import Architecture, check_size
from sae_models.errors import SAEError
from sae_models.sae import SAE
from sae_models.saving import WEIGHTS, own_sae, save_sae, stored
from sae_models.training import Recipe, SAETraining

Batch = Mapping[Any, Float[Tensor, "row d_model"]]
"""Activations by where they come from."""
Progress = Callable[[int, int, dict[str, float]], None]
"""Steps just taken, steps in all, and what the metrics of one SAE (the first) say now."""


@dataclass(frozen=True)
class Job:
    """One SAE to train."""

    name: str
    """of its folder"""
    source: Hashable
    """key of its activations in a batch"""
    architecture: Architecture
    recipe: Recipe
    model_name: str | None = None
    hook_name: str | None = None
    """where it belongs, as the SAE will say itself"""


@runtime_checkable
class Resumable(Protocol):
    """A stream that can say where it stands and be put back there; any other is drawn again from its beginning."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, exactly."""
        ...


def train(
    batches: Iterable[Batch],
    jobs: Sequence[Job],
    *,
    steps: int,
    folder: str | Path | None = None,
    log_every: int = 50,
    checkpoint_every: int | None = None,
    progress: Progress | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, SAE]:
    """Feed every job the same `steps` batches and return the SAEs by name.

    The first batch is also the sample that the SAEs start from. With a folder everything is kept there, and the same call
    goes on where it was interrupted: bit for bit what an undisturbed run gives, if `batches` does (on the same hardware, with as
    many threads). checkpoint_every: steps between checkpoints (default: a twentieth of the run). about: plain values that
    belong to the run (text, model), kept in run.json and in each SAE's metadata, and compared when it goes on.
    Raises `SAEError` for a folder that holds another run, two jobs of one name, a stream that ends before `steps`, and a loss
    that is not finite.
    """
    if not jobs or len({job.name for job in jobs}) < len(jobs):
        raise SAEError(
            f"jobs named {', '.join(job.name for job in jobs) or 'nothing'}; expected some, each of another name"
        )
    if steps < 1 or log_every < 1:
        raise SAEError(f"a run of {steps} steps, logged every {log_every}; expected at least 1 of each")
    for job in jobs:
        check_size(job.architecture, job.recipe.d_sae, job.recipe.k)
    run = _Run(jobs, steps, log_every, dict(about or {}))
    if folder is None:
        return run.go(iter(batches), batches, None, steps, progress)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            if run.claim(folder):
                return {job.name: own_sae(*stored(folder / job.name)).requires_grad_(False) for job in jobs}
            return run.go(iter(batches), batches, folder, checkpoint_every or max(1, steps // 20), progress)
    except Timeout:
        raise SAEError(f"{folder} is being written by another run; wait for it or give another folder") from None


class _Run:
    def __init__(self, jobs: Sequence[Job], steps: int, log_every: int, about: dict[str, Any]):
        self.jobs, self.steps, self.log_every, self.about = jobs, steps, log_every, about
        self.training: dict[str, SAETraining] = {}
        self.done = 0

    @property
    def identity(self) -> dict[str, Any]:
        jobs = {job.name: asdict(job) | {"source": str(job.source)} for job in self.jobs}
        return json.loads(
            json.dumps({"jobs": jobs, "steps": self.steps, "log_every": self.log_every, "about": self.about})
        )

    def claim(self, folder: Path) -> bool:
        """Make the folder this run's; true when the run is already finished there."""
        path = folder / "run.json"
        if path.exists():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            if differ := [key for key in self.identity if theirs.get(key) != self.identity[key]]:
                raise SAEError(
                    f"{folder} holds another run (other {', '.join(differ)}); give another folder, or remove this one"
                )
        else:
            _write(path, json.dumps(self.identity, indent=1))
        return not (folder / "checkpoint.pt").exists() and all(
            (folder / job.name / WEIGHTS).exists() for job in self.jobs
        )

    def go(
        self,
        stream: Iterator[Batch],
        batches: Iterable[Batch],
        folder: Path | None,
        every: int,
        progress: Progress | None,
    ) -> dict[str, SAE]:
        if folder is not None and (folder / "checkpoint.pt").exists():
            self._resume(folder, stream, batches)
        elif folder is not None:
            _write(folder / "metrics.jsonl", "")
        if progress and self.done:
            progress(self.done, self.steps, {})
        while self.done < self.steps:
            batch = next(stream, None)
            if batch is None:
                raise SAEError(
                    f"the stream ended after {self.done} batches of {self.steps}; give more text, or fewer steps"
                )
            for job in self.jobs:
                self._of(job, batch).step(batch[job.source])
            self.done += 1
            said = {}
            if self.done % self.log_every == 0 or self.done == self.steps:
                said = self._log(folder)
            if folder is not None and self.done % every == 0:
                self._checkpoint(folder, batches)
            if progress:
                progress(1, self.steps, said)
        return self._finish(folder)

    def _of(self, job: Job, batch: Batch) -> SAETraining:
        if job.name not in self.training:
            if job.source not in batch:
                raise SAEError(
                    f"no activations of {job.source} in the batches, which hold {', '.join(map(str, batch))}"
                )
            self.training[job.name] = SAETraining(
                job.architecture,
                job.recipe,
                batch[job.source],
                steps=self.steps,
                model_name=job.model_name,
                hook_name=job.hook_name,
            )
        return self.training[job.name]

    def _log(self, folder: Path | None) -> dict[str, float]:
        lines = [{"sae": job.name, **self.training[job.name].metrics()} for job in self.jobs]
        for line, job in zip(lines, self.jobs, strict=True):
            self.training[job.name].sae.metadata["training"] = line
        if folder is not None:
            with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        return {key: value for key, value in lines[0].items() if key != "sae"}

    def _checkpoint(self, folder: Path, batches: Iterable[Batch]) -> None:
        state = {
            "done": self.done,
            "training": {name: training.state_dict() for name, training in self.training.items()},
            "metrics": (folder / "metrics.jsonl").stat().st_size,
            "stream": batches.state_dict() if isinstance(batches, Resumable) else None,
        }
        partial = folder / "checkpoint.partial"
        torch.save(state, partial)
        os.replace(partial, folder / "checkpoint.pt")

    def _resume(self, folder: Path, stream: Iterator[Batch], batches: Iterable[Batch]) -> None:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        if isinstance(batches, Resumable):
            batches.load_state_dict(state["stream"])
        first = next(stream, None) if not isinstance(batches, Resumable) else None
        for _ in range(state["done"] - 1 if first is not None else 0):
            next(stream, None)
        for job in self.jobs:
            found = state["training"][job.name]
            shape = SAETraining(
                job.architecture,
                job.recipe,
                torch.ones_like(found["sae"]["b_dec"])[None],
                steps=self.steps,
                model_name=job.model_name,
                hook_name=job.hook_name,
            )
            shape.load_state_dict(found)
            self.training[job.name] = shape
        self.done = state["done"]
        with (folder / "metrics.jsonl").open("r+b") as file:  # what came after the checkpoint comes again
            file.truncate(state["metrics"])

    def _finish(self, folder: Path | None) -> dict[str, SAE]:
        saes = {}
        for job in self.jobs:
            sae = self.training[job.name].sae.requires_grad_(False)
            sae.metadata |= {
                "architecture": asdict(job.architecture),
                "recipe": asdict(job.recipe),
                "steps": self.steps,
                **self.about,
            }
            if folder is not None:
                save_sae(sae, folder / job.name)
            saes[job.name] = sae
        if folder is not None:
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        return saes


def _write(path: Path, content: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)
