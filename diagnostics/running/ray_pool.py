"""Workers on Ray: this process keeps the folder, writes and resumes; each worker holds a model and computes units.

Units that share a recording go to one worker, in order; a worker without work takes from the one with most left. Workers record
their own shards, and their activations pass through this process once. What units share is formed here and sent to all. A worker
that dies is started again, and its unit with it.
"""

import contextlib
import copy
import os
import platform
import secrets
import shutil
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils._pytree import tree_map

from diagnostics.running import recordings as shared
from diagnostics.running.place import differences
from diagnostics.running.recordings import Recordings, shards
from diagnostics.running.training_team import RayTeam
from diagnostics.running.units import Unit, code_version, packed
from interventions import errors
from interventions.errors import MechdiagError, ResultError, is_out_of_memory, one_line
from interventions.models.causal_model import CausalModel
from interventions.provenance import processor
from interventions.replaying.certificates import certificates_of_run
from sae_models import errors as sae_errors

_DEATHS = 3
"""of workers at one unit, after which the run ends"""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: listen on this machine alone
    "RAY_DEDUP_LOGS": "0",
    "RAY_ROTATION_MAX_BYTES": str(2**20),
    "RAY_ROTATION_BACKUP_COUNT": "1",
}
"""for a Ray of our own; it reads some of these as it is imported"""


@dataclass
class _Said:
    """What a worker's method gives: a value or an error on one line, and the warnings on the way."""

    value: Any = None
    error: tuple[str, str] | None = None
    warnings: list[str] = field(default_factory=list)


def _saying(method: Callable[..., Any]) -> Callable[..., _Said]:
    def said(self: "Worker", *args: Any) -> _Said:
        found = _Said()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("default")
            try:
                found.value = method(self, *args)
            except MechdiagError as error:
                found.error = type(error).__name__, str(error)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                where = f"{platform.node()}, {processor(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}"
                why = f"a worker ran out of memory ({where}): {one_line(error)}; use fewer workers or a smaller batch_rows"
                found.error = "ResultError", why
        found.warnings = [str(one.message) for one in heard if issubclass(one.category, UserWarning)]
        return found

    return said


def facts(threads: int, device: str) -> dict[str, Any]:
    """What workers must have in common with this process. device: the kind on which models lie."""
    there = device != "cuda" or torch.cuda.is_available()
    return {
        "device": device if there else "cpu",
        "code": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor(torch.device(device if there else "cpu")),
        "threads": threads,
    }


class Worker:
    """A process that holds models and computes units. Its methods give `_Said`."""

    def __init__(self, expected: dict[str, Any], threads: int):
        torch.set_num_threads(threads)
        self.expected, self.threads = expected, threads
        self.models: dict[str, CausalModel] = {}
        self.recipes: dict[str, Any] = {}
        self.version, self.fn = -1, None
        self.team: Any = None
        self.work = 0.0
        shared.KEPT = {}

    def _check(self) -> None:
        """Raise `ResultError` where code, versions or machine differ from those of the process that asks."""
        here = facts(torch.get_num_threads(), self.expected["device"])
        if differ := differences(self.expected, here, list(self.expected)):
            raise ResultError(
                f"a worker on {platform.node()} differs: {differ}; install the same on all machines"
                + ("" if {"processor", "threads"}.isdisjoint(differ.split()) else ", or pass --mixed")
            )

    @_saying
    def pid(self) -> int:
        """Its process."""
        return os.getpid()

    @_saying
    def cpu(self) -> dict[str, float]:
        """CPU seconds of this process: `work` (clean passes, checks, units), and `all`."""
        return {"work": self.work, "all": time.process_time()}

    @_saying
    def record(self, box: list[Any], number: int) -> Any:
        """The activations of a shard of the recordings in the box; the recording stays here."""
        from diagnostics.running.carrying import packed_up

        recordings = self._of(box)
        with torch.no_grad(), self._working():
            return packed_up(recordings.of_shard(number))

    @_saying
    def compute(
        self, version: int, box: list[Any], unit: Unit, certificates: list[dict[str, Any]], grad: bool
    ) -> bytes:
        """A unit's file, by the runner in the box. grad: whether gradients are on where it was sent from."""
        if self.version != version:
            self.fn, self.version = self._of(box), version
        with certificates_of_run() as run, torch.set_grad_enabled(grad), self._working():
            run.only(certificates)
            return packed(unit, *self.fn(unit, lambda n: None), run.taken())  # type: ignore[misc]

    @_saying
    def train(self, what: str, *arguments: Any) -> Any:
        """A part of a run of `train`: a method of its `Team`, of this worker's SAEs alone."""
        from sae_models.training.runs import Alone

        device = self.expected["device"]
        if what == "begin":
            self._check()
            self.team = Alone()
        if what in ("begin", "step"):
            arguments = tuple(_on(device, x) if isinstance(x, dict) else x for x in arguments)
        with self._working():
            found = getattr(self.team, what)(*arguments)
        if what == "saes":
            return {name: sae.cpu() if device == "cpu" else copy.deepcopy(sae).cpu() for name, sae in found.items()}
        return tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, found)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        before = time.process_time()
        yield
        self.work += time.process_time() - before

    def _of(self, box: list[Any]) -> Any:
        import ray

        from diagnostics.running.carrying import unpacked

        self._check()
        parts, self.recipes, used = ray.get(box[0])
        self.fn, self.version = None, -1  # before another one is formed
        kept = {n: m for n, m in self.models.items() if n in used or self.recipes[n][0] != "untrained"}
        self.models, ids = kept, {id(model) for model in kept.values()}
        shared.KEPT = {key: of for key, of in (shared.KEPT or {}).items() if key[0] in ids}
        return unpacked(parts, self._model)

    def _model(self, name: str) -> CausalModel:
        import ray

        from diagnostics.running.carrying import made

        if name not in self.models:
            self.models[name] = made(ray.get(self.recipes[name][1]), self._model)
        return self.models[name]


def _on(device: str, found: dict[Any, Any]) -> dict[Any, Any]:
    """The tensors of a batch on this worker's device; states are put there by what loads them."""
    return {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in found.items()}


class RayPool:
    """Workers, started when they are first needed."""

    def __init__(self, n: int | None, address: str | None, threads: int, mixed: bool):
        self.n, self.address, self.threads, self.mixed = n, address, threads, mixed
        self.workers: list[Any] = []
        self._names: WeakKeyDictionary[CausalModel, str] = WeakKeyDictionary()
        self._recipes: dict[str, Any] = {}
        self._owner: dict[int, int] = {}
        self._version, self._told = 0, set()
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        """End the workers, and Ray where it was started here."""
        self._stack.close()

    def cpu(self) -> list[dict[str, float]]:
        """CPU seconds of each worker: `work` (clean passes, checks, units), and `all`, with its start."""
        import ray

        return [self.heard(said) for said in ray.get([worker.cpu.remote() for worker in self.workers])]

    def pids(self) -> list[int]:
        """The workers' processes."""
        import ray

        return [self.heard(said) for said in ray.get([worker.pid.remote() for worker in self.workers])]

    def team(self) -> RayTeam:
        """These workers as `train` and `train_saes` take them."""
        return RayTeam(self)

    # --- what is asked of it: see `place.Pool`

    def record(self, recordings: Recordings) -> list[dict[Any, Any]]:
        self.start(recordings.model.device.type)
        from diagnostics.running.carrying import unpacked

        parts = shards(len(recordings.tokens))
        cost = {i: sum(len(recordings.tokens[p]) for p in part) for i, part in enumerate(parts)}
        self._owner = _shared_out(cost, len(self.workers))
        box, found = self._box(recordings), {}
        queues = [deque(i for i in cost if self._owner[i] == w) for w in range(len(self.workers))]
        tasks = _Tasks(queues, lambda i: i, lambda i: True, cost.__getitem__)

        def start(w: int, number: int) -> Any:
            return self.workers[w].record.remote(box, number)

        for number, said in self._each(tasks, start, "shard {}".format):
            found[number] = unpacked(said)
        return [found[i] for i in range(len(parts))]

    def compute(
        self,
        fn: Any,
        todo: Mapping[str, Unit],
        leader: Mapping[str, str],
        certificates: Callable[[str], list[dict[str, Any]] | None],
        store: Callable[[str, bytes], object],
    ) -> None:
        self.start(fn.model.device.type)
        stages = hasattr(fn, "prepare")
        for stage, keys in groupby(todo, key=lambda key: (todo[key].group or ("",))[0] if stages else None):
            if stages:
                fn.prepare(stage)
            box, some = self._box(fn), {key: todo[key] for key in keys}
            self._version += 1
            self._run(self._version, box, some, leader, certificates, store)

    def _run(
        self,
        version: int,
        box: list[Any],
        todo: Mapping[str, Unit],
        leader: Mapping[str, str],
        certificates: Callable[[str], list[dict[str, Any]] | None],
        store: Callable[[str, bytes], object],
    ) -> None:
        groups: dict[str, list[str]] = {}
        for key in todo:
            groups.setdefault(leader[key], []).append(key)
        at = {head: todo[keys[0]].group[-1] if todo[keys[0]].group else None for head, keys in groups.items()}
        fixed = {head: self._owner[shard] for head, shard in at.items() if shard in self._owner}
        owner = _shared_out(
            {head: sum(todo[k].rows for k in keys) for head, keys in groups.items()}, len(self.workers), fixed
        )
        queues = [
            deque(key for head, keys in groups.items() if owner[head] == w for key in keys)
            for w in range(len(self.workers))
        ]

        def ready(key: str) -> bool:
            return leader[key] == key or certificates(leader[key]) is not None

        def start(w: int, key: str) -> Any:
            known = [] if leader[key] == key else certificates(leader[key]) or []
            return self.workers[w].compute.remote(version, box, todo[key], known, torch.is_grad_enabled())

        tasks = _Tasks(queues, leader.__getitem__, ready, lambda key: todo[key].rows)
        for key, said in self._each(tasks, start, lambda key: f"unit {todo[key].name}"):
            store(key, said)

    # --- one task a worker at a time

    def _each(
        self,
        tasks: "_Tasks",
        start: Callable[[int, Any], Any],
        name: Callable[[Any], str],
    ) -> Iterator[tuple[Any, Any]]:
        """Every task and what it gave, as they are done."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        flying: dict[Any, tuple[int, Any]] = {}
        deaths: Counter[Any] = Counter()
        while flying or any(tasks.queues):
            busy = {w for w, _ in flying.values()}
            for w in range(len(self.workers)):
                if w not in busy and (key := tasks.next(w)) is not None:
                    flying[start(w, key)] = w, key
            (ref,), _ = ray.wait(list(flying), num_returns=1)
            w, key = flying.pop(ref)
            try:
                said = self.heard(ray.get(ref))
            except RayTaskError as error:
                raise error.as_instanceof_cause() from None
            except RayError as error:
                deaths[key] += 1
                if deaths[key] == _DEATHS:
                    raise ResultError(
                        f"{name(key)} ended its worker {_DEATHS} times ({one_line(error)}); if memory ran out, use fewer workers or a smaller "
                        "batch_rows"
                    ) from None
                warnings.warn(
                    f"a worker ended ({one_line(error)}); {name(key)} is computed again by another", stacklevel=2
                )
                self.workers[w] = self._worker()
                tasks.queues[w].appendleft(key)
                continue
            yield key, said

    def heard(self, said: _Said) -> Any:
        """What a worker's method gave; its warnings once, its error as ours."""
        for one in said.warnings:
            if one not in self._told:
                self._told.add(one)
                warnings.warn(one, stacklevel=2)
        if said.error is not None:
            kind, message = said.error
            raise (getattr(errors, kind, None) or getattr(sae_errors, kind, MechdiagError))(message)
        return said.value

    # --- sending

    def _box(self, value: Any) -> list[Any]:
        """What workers unpack: a reference in a list, so that it is fetched by those that need it alone."""
        import ray

        from diagnostics.running.carrying import packed_up

        used: set[str] = set()

        def name(model: CausalModel) -> str:
            used.add(found := self._name(model))
            return found

        return [ray.put((packed_up(value, name), self._recipes, used))]

    def _name(self, model: CausalModel) -> str:
        import ray

        from diagnostics.running.carrying import recipe

        if model not in self._names:
            given = recipe(model, self._name)
            name = f"{len(self._recipes)} {model.name}"
            self._names[model], self._recipes[name] = name, (given["how"][0], ray.put(given))
        return self._names[model]

    # --- starting

    def start(self, device: str) -> None:
        """Start the workers, on devices of that kind, if they are not there yet."""
        if self.workers:
            return
        try:
            self._connect(device)
        except BaseException:
            self.close()
            raise

    def _connect(self, device: str) -> None:
        if self.address is not None:
            _reachable(self.address)
        ray, cuda = _ray(self.address), device == "cuda"
        self._stack.enter_context(_connected(ray, self.address, self.n, cuda))
        n_cpus, n_gpus = _free(ray, self.n or 1, cuda)
        n = self.n or n_gpus or n_cpus
        if n_cpus < n or (cuda and not n_gpus):
            gpus = f" and {n_gpus} GPUs" if cuda else ""
            raise ResultError(f"{n} workers asked for, but Ray has {n_cpus} CPUs{gpus} free; ask for fewer, or wait")
        expected = facts(self.threads, device)
        for name in ("processor", "threads") if self.mixed else ():
            del expected[name]
        kind = ray.remote(num_cpus=1, num_gpus=min(1.0, n_gpus / n), max_restarts=0)(Worker)
        self._worker = lambda: kind.remote(expected, self.threads)
        self.workers = [self._worker() for _ in range(n)]
        self._stack.callback(self._end)

    def _end(self) -> None:
        import ray

        for worker in self.workers:
            ray.kill(worker)
        self.workers = []


@dataclass
class _Tasks:
    """Tasks that wait, a queue for each worker, groups whole and in order."""

    queues: list[deque[Any]]
    leader: Callable[[Any], Any]
    """of each task, the first of its group, which is done before the others begin"""
    ready: Callable[[Any], bool]
    rows: Callable[[Any], float]

    def next(self, w: int) -> Any:
        """What a worker does next: its own, or of the worker that has most left the last group, if not begun, or the last task."""
        own = self.queues[w]
        if own and self.ready(own[0]):
            return own.popleft()
        for other in sorted(self.queues, key=lambda queue: -sum(map(self.rows, queue))):
            if other is own or not other:
                continue
            head = self.leader(other[-1])
            if head in other:
                group = [task for task in other if self.leader(task) == head]
                for task in group:
                    other.remove(task)
                own.extend(group[1:])
                return head
            if self.ready(other[-1]):
                return other.pop()
        return None


def _free(ray: Any, n: int, cuda: bool) -> tuple[int, int]:
    """CPUs and GPUs of the cluster that nobody uses; what ended a moment ago may take seconds to be free."""
    free: dict[str, float] = {}
    for _ in range(20):
        free = ray.available_resources()
        if free.get("CPU", 0) >= n and (not cuda or free.get("GPU", 0) > 0):
            break
        time.sleep(0.25)
    return int(free.get("CPU", 0)), int(free.get("GPU", 0))


def _shared_out(cost: Mapping[Any, float], n: int, fixed: Mapping[Any, int] | None = None) -> dict[Any, int]:
    """A worker for each task: those of `fixed`, and the others, from the costliest on, to who has least."""
    found, load = dict(fixed or {}), [0.0] * n
    for task, worker in found.items():
        load[worker] += cost[task]
    for task in sorted((task for task in cost if task not in found), key=lambda task: -cost[task]):
        found[task] = min(range(n), key=load.__getitem__)
        load[found[task]] += cost[task]
    return found


def _ray(address: str | None) -> Any:
    """The library. Raises `ResultError` where it is not installed."""
    if (
        address is None and "ray" not in sys.modules
    ):  # a secret of this process's own, so that nobody else gives its workers orders
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)} | _QUIET)
    try:
        import ray
    except ImportError:
        raise ResultError("workers need Ray, which is not installed: pip install 'mechdiag[ray]'") from None
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str | None, n: int | None, cuda: bool) -> Iterator[None]:
    """Within it, Ray runs: one that is there, or one of our own, quiet, on this machine alone, gone afterwards with its files."""
    if ray.is_initialized():
        yield
        return
    how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    with contextlib.ExitStack() as stack:
        if address is not None:
            stack.enter_context(_environment({"RAY_USAGE_STATS_ENABLED": "0"}))
            how |= {"address": address}
        else:
            folder = stack.enter_context(_private_folder())
            stack.enter_context(_environment(_QUIET | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}))
            cpus = n or (torch.cuda.device_count() if cuda else os.cpu_count())
            how |= {"num_cpus": cpus, "num_gpus": torch.cuda.device_count() if cuda else 0}
            how |= {"include_dashboard": False, "_temp_dir": str(folder)}
        stack.callback(ray.shutdown)
        stack.enter_context(_unsaid(ray))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of options that change in later versions
                ray.init(**how)
        except Exception as error:
            where = f"no Ray at {address}" if address else "Ray does not start"
            raise ResultError(f"{where} ({one_line(error)}); see docs/scale.md") from None
        yield


@contextlib.contextmanager
def _unsaid(ray: Any) -> Iterator[None]:
    """Ray prints what became of a worker on stdout, whatever `log_to_driver` says; here a warning says it."""
    module = ray._private.worker
    before = getattr(module, "print_to_stdstream", None)
    module.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        module.print_to_stdstream = before


def _reachable(address: str) -> None:
    """Raise `ResultError` at once where nothing listens at HOST:PORT; Ray itself would try for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        if address == "auto":
            return
        raise ResultError(f"{address!r} is no address of a Ray cluster; expected HOST:PORT, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ResultError(f"no Ray at {address} ({error.strerror or error}); start one: ray start --head") from None


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_PREFIX = "mechdiag-ray-"


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder for Ray's sockets and logs, removed afterwards; those that killed processes left are removed first."""
    place = Path(tempfile.gettempdir())
    for old in place.glob(f"{_PREFIX}*"):
        pid = old.name.removeprefix(_PREFIX).split("-")[0]
        if pid.isdigit() and not _alive(int(pid)) and old.stat().st_uid == os.getuid():
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
