"""`workers`: several processes, machines, or parts for the units of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diagnostics.running.place import Place, placed_at
from diagnostics.running.ray_pool import RayPool
from interventions.errors import ResultError


@contextmanager
def workers(
    n: int | None = None,
    *,
    ray: str | None = None,
    part: tuple[int, int] | None = None,
    threads: int = 1,
    mixed: bool = False,
) -> Iterator[RayPool | None]:
    """Within it, diagnostics compute their units in other processes; tables are the same, byte for byte.

        with workers(4):
            result = direction_norm(model, prompts, folder="results/mine")

    n: workers on this machine, by Ray (`pip install 'mechdiag[ray]'`); each holds the model, on a GPU of its own where there are as many.
    ray: the address of a Ray cluster (`HOST:PORT`, or `auto`), n of whose CPUs or GPUs are taken (default: every GPU, or CPU).
    threads: of each worker, and of this process meanwhile. part: (i, n), to compute part i of n here, from 1; the parts share a folder,
    which the same call joins outside of `workers`. A part ends in `PartDone` as long as others are missing. mixed: accept other kinds of
    processors and numbers of threads in one run, which may differ in the last bits.

    A killed worker is started again; after this process was killed the same call goes on. Raises `ResultError` for settings that exclude
    each other; the diagnostic raises it where Ray is not installed, does not start, or its workers have other code or weights.
    """
    if part is not None and (n is not None or ray is not None):
        raise ResultError("a part is computed by one process; give a part, or workers")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise ResultError(f"part {part[0]}/{part[1]}; expected i/n with i from 1 to n")
    if (n is not None and n < 1) or threads < 1:
        raise ResultError(f"{n} workers with {threads} threads; expected 1 or more")
    if n is None and ray is None:
        with placed_at(Place(part=part, mixed=mixed)):
            yield None
        return
    pool, before = RayPool(n, ray, threads, mixed), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with placed_at(Place(pool, mixed=mixed)):
            yield pool
    finally:
        torch.set_num_threads(before)
        pool.close()
