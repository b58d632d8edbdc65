"""A training run: several SAEs, one pass over a stream, kept in a folder and resumed exactly.

run.json        what was asked for; another run does not go on here
metrics.jsonl   a line for each SAE and interval: step, tokens, FVE, L0, dead share, …
checkpoint.pt   what the next step depends on; gone when the run is done
<name>/         each SAE, as `save_sae` writes it; with keep_every also <name>/tokens-<n>/, the SAE after n tokens
manifest.json   last of all: the final metrics, and what the caller knows of the run at its end
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from torch import Tensor

from sae_models.architectures import SELECTORS, Architecture, check_size
from sae_models.errors import SAEError
from sae_models.loading import saved_sae
from sae_models.readers.own import is_own
from sae_models.readers.stored import opened
from sae_models.sae import SAE
from sae_models.saving import CONFIG, WEIGHTS, save_sae
from sae_models.training.recipe import Recipe
from sae_models.training.trainer import SAETraining

RUN, METRICS, CHECKPOINT, MANIFEST = "run.json", "metrics.jsonl", "checkpoint.pt", "manifest.json"
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


@runtime_checkable
class Team(Protocol):
    """Who trains the SAEs of a run; every member of it gets every batch, in order."""

    def begin(self, jobs: Sequence[Job], steps: int, first: Batch, states: Mapping[str, Any]) -> None:
        """Make the SAEs from the first batch, and put back what is in `states`, by name."""
        ...

    def step(self, batch: Batch) -> None:
        """One step of each SAE; it may return before they are done."""
        ...

    def metrics(self) -> dict[str, dict[str, float]]:
        """See `SAETraining.metrics`; by name."""
        ...

    def states(self) -> dict[str, dict[str, Any]]:
        """See `SAETraining.state_dict`; by name."""
        ...

    def saes(self) -> dict[str, SAE]:
        """As they stand, in this process."""
        ...


class Alone:
    """A team of one: this process, one SAE after another."""

    def __init__(self) -> None:
        self.training: dict[str, tuple[Hashable, SAETraining]] = {}

    def begin(self, jobs: Sequence[Job], steps: int, first: Batch, states: Mapping[str, Any]) -> None:
        for job in jobs:
            belongs = {"model_name": job.model_name, "hook_name": job.hook_name}
            training = SAETraining(job.architecture, job.recipe, first[job.source], steps=steps, **belongs)
            if job.name in states:
                training.load_state_dict(states[job.name])
            self.training[job.name] = job.source, training

    def step(self, batch: Batch) -> None:
        for source, training in self.training.values():
            training.step(batch[source])

    def metrics(self) -> dict[str, dict[str, float]]:
        return {name: training.metrics() for name, (_, training) in self.training.items()}

    def states(self) -> dict[str, dict[str, Any]]:
        return {name: training.state_dict() for name, (_, training) in self.training.items()}

    def saes(self) -> dict[str, SAE]:
        return {name: training.sae for name, (_, training) in self.training.items()}


def train(
    batches: Iterable[Batch],
    jobs: Sequence[Job],
    *,
    steps: int,
    folder: str | Path | None = None,
    log_every: int = 50,
    checkpoint_every: int | None = None,
    keep_every: int | None = None,
    progress: Progress | None = None,
    about: Mapping[str, Any] | None = None,
    manifest: Callable[[], Mapping[str, Any]] = dict,
    team: Team | None = None,
) -> dict[str, SAE]:
    """Feed every job the same `steps` batches and return the SAEs by name.

    The first batch is also the sample that the SAEs start from. With a folder everything is kept there, and the same call
    goes on where it was interrupted: on a CPU bit for bit what an undisturbed run gives, if `batches` does (on the same hardware,
    with as many threads; on a GPU sums of many numbers have no fixed order). checkpoint_every: steps between checkpoints (default: a twentieth of the run). keep_every: steps
    between copies of each SAE that stay, as `load_sae` reads them, and are logged (needs a folder). about: plain values that
    belong to the run (text, model), kept in run.json and in each SAE's metadata, and compared when it goes on. manifest: asked at the end for plain values that go into manifest.json.
    team: who trains (default: this process; workers give the same SAEs, bit for bit on like processors with as many threads).
    Raises `SAEError` for a folder that holds another run, or anything in the place of this one's files that this one did not
    write, two jobs of one name, a stream that ends before `steps`, a copy before BatchTopK has its threshold, and a loss that is
    not finite.
    """
    if not jobs or len({job.name for job in jobs}) < len(jobs):
        raise SAEError(
            f"jobs named {', '.join(job.name for job in jobs) or 'nothing'}; expected some, each of another name"
        )
    if steps < 1 or log_every < 1:
        raise SAEError(f"a run of {steps} steps, logged every {log_every}; expected at least 1 of each")
    for job in jobs:
        check_size(job.architecture, job.recipe.d_sae, job.recipe.k)
        if job.recipe.multi > 0 and SELECTORS[job.architecture.selector] != "k":
            raise SAEError(
                f"{job.name}: Multi-TopK with selector {job.architecture.selector!r}, which counts no latents; expected topk, batchtopk "
                "or abstopk"
            )
        first = math.ceil(job.recipe.threshold_from * steps)
        if keep_every is not None and job.architecture.selector == "batchtopk" and keep_every < first:
            raise SAEError(
                f"{job.name}: keep_every {keep_every} is before step {first}, from which BatchTopK learns its threshold "
                "(threshold_from); keep copies less often, or lower threshold_from"
            )
    if keep_every is not None and (keep_every < 1 or folder is None):
        raise SAEError(f"keep_every {keep_every} with folder {folder}; expected at least 1 step, and a folder")
    run = _Run(jobs, steps, log_every, keep_every, dict(about or {}), Alone() if team is None else team)
    if folder is None:
        return run.go(batches, None, steps, progress, manifest)
    if not str(folder).strip():
        raise SAEError("an empty name of a folder; give one ('.' is the working directory)")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SAEError(f"{folder} is being written by another run; wait for it or give another folder") from None
    try:
        if run.claim(folder):
            return {job.name: run.finished(folder, job) for job in jobs}
        return run.go(batches, folder, checkpoint_every or max(1, steps // 20), progress, manifest)
    finally:
        lock.release()


class _Run:
    def __init__(
        self,
        jobs: Sequence[Job],
        steps: int,
        log_every: int,
        keep_every: int | None,
        about: dict[str, Any],
        team: Team,
    ):
        self.jobs, self.steps, self.log_every, self.keep_every, self.about = jobs, steps, log_every, keep_every, about
        self.team, self.begun = team, False
        self.saved: dict[str, Any] = {}
        """states of a checkpoint, until the first batch says on which device they are to live"""
        self.said: dict[str, dict[str, Any]] = {}
        """the last metrics of each SAE"""
        self.done = 0

    @property
    def identity(self) -> dict[str, Any]:
        jobs = {job.name: asdict(job) | {"source": str(job.source)} for job in self.jobs}
        asked = {"jobs": jobs, "steps": self.steps, "log_every": self.log_every, "about": self.about}
        return json.loads(json.dumps(asked | ({"keep_every": self.keep_every} if self.keep_every else {})))

    @property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def claim(self, folder: Path) -> bool:
        """Make the folder this run's; true when the run is already finished there."""
        path = folder / RUN
        if path.exists():
            if differ := _differences(_read_json(path), self.identity):
                raise SAEError(
                    f"{folder} holds another run ({'; '.join(differ[:3])}); give another folder, or remove this one"
                )
            if (folder / MANIFEST).exists():
                (folder / CHECKPOINT).unlink(missing_ok=True)  # of a run killed before it could
                return True
            for job in self.jobs:
                self._check_place(folder / job.name, job)
            return False
        there = [name for name in (METRICS, MANIFEST, CHECKPOINT) if (folder / name).exists()]
        there += [job.name for job in self.jobs if _has_sae(folder / job.name)]
        if there:
            raise SAEError(
                f"{folder} has {', '.join(there[:3])}, and no {RUN} that says which run wrote it; it is left as it is: "
                "give another folder, or move it"
            )
        _write(path, json.dumps(self.identity, indent=1))
        return False

    def _check_place(self, place: Path, job: Job) -> None:
        """Raise `SAEError` where an SAE that this run did not write stands where its own belongs."""
        if not _has_sae(place):
            return
        config = _read_json(place / CONFIG) if (place / CONFIG).exists() else {}
        self._compare(place, config["metadata"]["mechdiag"].get("metadata") if is_own(config) else None, job)

    def finished(self, folder: Path, job: Job) -> SAE:
        """An SAE of this run, which has ended."""
        place = folder / job.name
        try:
            sae = saved_sae(place)
        except SAEError as error:
            raise SAEError(f"the run in {folder} has ended, and {place} does not hold its SAE: {error}") from error
        self._compare(place, sae.metadata, job)
        return sae

    def _compare(self, place: Path, found: Any, job: Job) -> None:
        said = json.loads(json.dumps(self._said(job)))
        if not isinstance(found, dict) or any(found.get(name) != value for name, value in said.items()):
            raise SAEError(
                f"{place} holds an SAE that this run did not write; it is left as it is: give another folder, or move it"
            )

    def _said(self, job: Job) -> dict[str, Any]:
        """What an SAE of this run says of its training."""
        return {
            "architecture": asdict(job.architecture),
            "recipe": asdict(job.recipe),
            "steps": self.steps,
            **self.about,
        }

    def go(
        self,
        batches: Iterable[Batch],
        folder: Path | None,
        every: int,
        progress: Progress | None,
        manifest: Callable[[], Mapping[str, Any]],
    ) -> dict[str, SAE]:
        if folder is not None and (folder / CHECKPOINT).exists():
            stream = self._resume(folder, batches)
        else:
            stream = iter(batches)
            if folder is not None:
                _write(folder / METRICS, "")
        if progress and self.done:
            progress(self.done, self.steps, {})
        while self.done < self.steps:
            batch = next(stream, None)
            if batch is None:
                raise SAEError(
                    f"the stream ended after {self.done} batches of {self.steps}; give more text, or fewer steps"
                )
            if not self.begun:
                self._begin(batch)
            self.team.step(batch)
            self.done += 1
            said = {}
            kept = self.keep_every is not None and self.done % self.keep_every == 0 and self.done < self.steps
            if self.done % self.log_every == 0 or self.done == self.steps or kept:
                said = self._log(folder)
            if kept and folder is not None:
                saes = self.team.saes()
                for job in self.jobs:
                    self._save(folder, job, f"{job.name}/tokens-{self.said[job.name]['tokens']}", saes[job.name])
            if folder is not None and self.done % every == 0 and self.done < self.steps:
                self._checkpoint(folder, batches)
            if progress:
                progress(1, self.steps, said)
        return self._finish(folder, manifest)

    def _begin(self, batch: Batch) -> None:
        for job in self.jobs:
            if job.source not in batch:
                raise SAEError(
                    f"no activations of {job.source} in the batches, which hold {', '.join(map(str, batch))}"
                )
        self.team.begin(self.jobs, self.steps, batch, self.saved)
        self.begun, self.saved = True, {}

    def _log(self, folder: Path | None) -> dict[str, float]:
        found = self.team.metrics()
        self.said = {job.name: {"sae": job.name, **found[job.name]} for job in self.jobs}
        lines = list(self.said.values())
        if folder is not None:
            with (folder / METRICS).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        return {key: value for key, value in lines[0].items() if key != "sae"}

    def _checkpoint(self, folder: Path, batches: Iterable[Batch]) -> None:
        metrics = (folder / METRICS).read_bytes()
        state = {
            "run": self._digest,
            "done": self.done,
            "training": self.team.states(),
            "metrics": len(metrics),
            "metrics_sha256": hashlib.sha256(metrics).hexdigest(),
            "stream": batches.state_dict() if isinstance(batches, Resumable) else None,
        }
        partial = folder / "checkpoint.partial"
        torch.save(state, partial)
        os.replace(partial, folder / CHECKPOINT)

    def _resume(self, folder: Path, batches: Iterable[Batch]) -> Iterator[Batch]:
        path, metrics = folder / CHECKPOINT, folder / METRICS
        state = opened(path).values
        remedy = f"remove {CHECKPOINT} to train from the beginning, or give another folder"
        if state.get("run") != self._digest:
            raise SAEError(f"{path} was not written by this run; {remedy}")
        before = metrics.read_bytes()[: state["metrics"]] if metrics.exists() else b""
        if state["metrics_sha256"] != hashlib.sha256(before).hexdigest():
            raise SAEError(f"{metrics} is not what it was when {path} was written; {remedy}")
        self.saved, self.done = state["training"], state["done"]
        if isinstance(batches, Resumable):
            batches.load_state_dict(state["stream"])
            stream = iter(batches)
        else:
            stream = iter(batches)
            for _ in range(self.done):
                next(stream, None)
        with (folder / METRICS).open("r+b") as file:  # what came after the checkpoint comes again
            file.truncate(state["metrics"])
        return stream

    def _finish(self, folder: Path | None, manifest: Callable[[], Mapping[str, Any]]) -> dict[str, SAE]:
        found = self.team.saes()
        saes = {job.name: self._save(folder, job, job.name, found[job.name]) for job in self.jobs}
        for sae in saes.values():
            sae.requires_grad_(False)
        if folder is not None:
            metrics = {name: sae.metadata["training"] for name, sae in saes.items()}
            _write(folder / MANIFEST, json.dumps({**manifest(), "saes": metrics}, indent=1))
            (folder / CHECKPOINT).unlink(missing_ok=True)
        return saes

    def _save(self, folder: Path | None, job: Job, place: str, sae: SAE) -> SAE:
        """An SAE, with what it says of its training; written into `place` of the folder."""
        sae.metadata |= {"training": self.said[job.name]} | self._said(job)
        if folder is not None:
            self._check_place(folder / place, job)  # at the end again: a run takes its time
            save_sae(sae, folder / place)
        return sae


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any], where: str = "") -> list[str]:
    """Where two nested settings differ, with both values."""
    found = []
    for name in dict.fromkeys([*theirs, *mine]):
        here = f"{where}{name}"
        if name not in mine or name not in theirs:
            found.append(f"{here} only {'there' if name in theirs else 'here'}")
        elif isinstance(theirs[name], dict) and isinstance(mine[name], dict):
            found += _differences(theirs[name], mine[name], f"{here}.")
        elif theirs[name] != mine[name]:
            found.append(f"{here} {str(theirs[name])[:60]} there, {str(mine[name])[:60]} here")
    return found


def _has_sae(place: Path) -> bool:
    return any((place / name).exists() for name in (CONFIG, WEIGHTS))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SAEError(
            f"{path} cannot be read ({type(error).__name__}: {error}); give another folder, or move it"
        ) from error
    if not isinstance(found, dict):
        raise SAEError(
            f"{path} holds a {type(found).__name__}; expected what a run writes: give another folder, or move it"
        )
    return found


def _write(path: Path, content: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)
