"""Workers that train SAEs: the stream of activations is formed here, and each worker trains its share of the SAEs on it."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from interventions.errors import ResultError, one_line
from sae_models.sae import SAE
from sae_models.training.runs import Batch, Job

AHEAD = 4
"""batches that a worker may have waiting; with more the stream waits for it"""


class RayTeam:
    """The SAEs of a run of `train` over the workers of a pool, the costliest first. A batch is sent once to each machine.

    A worker that dies ends the run: what it had learned is gone, and the same command goes on from the last checkpoint.
    """

    def __init__(self, pool: Any):
        """pool: a `RayPool`, which makes this."""
        self.pool, self.waiting = pool, deque[list[Any]]()

    def begin(self, jobs: Sequence[Job], steps: int, first: Batch, states: Mapping[str, Any]) -> None:
        self.device = next(iter(first.values())).device
        self.pool.start(self.device.type)
        share: list[list[Job]] = [[] for _ in self.pool.workers]
        for job in sorted(jobs, key=lambda job: -job.recipe.d_sae):
            min(share, key=lambda own: sum(one.recipe.d_sae for one in own)).append(job)
        self.members = [worker for worker, own in zip(self.pool.workers, share, strict=True) if own]
        own = [some for some in share if some]
        sent = self._sent(first)
        self._ask(
            "begin",
            *((some, steps, sent, {job.name: states[job.name] for job in some if job.name in states}) for some in own),
        )

    def step(self, batch: Batch) -> None:
        sent = self._sent(batch)
        self.waiting.append([member.train.remote("step", sent) for member in self.members])
        while len(self.waiting) > AHEAD:
            self._heard(self.waiting.popleft())

    def metrics(self) -> dict[str, dict[str, float]]:
        return self._merged("metrics")

    def states(self) -> dict[str, dict[str, Any]]:
        return self._merged("states")

    def saes(self) -> dict[str, SAE]:
        return {name: sae.to(self.device) for name, sae in self._merged("saes").items()}

    def _merged(self, what: str) -> dict[str, Any]:
        return {name: value for found in self._ask(what, *(() for _ in self.members)) for name, value in found.items()}

    def _ask(self, what: str, *arguments: tuple[Any, ...]) -> list[Any]:
        """What each member answers, after its batches."""
        asked = [member.train.remote(what, *own) for member, own in zip(self.members, arguments, strict=True)]
        while self.waiting:
            self._heard(self.waiting.popleft())
        return self._heard(asked)

    def _sent(self, batch: Batch) -> Any:
        import ray

        return ray.put({source: x.detach().cpu() for source, x in batch.items()})

    def _heard(self, asked: list[Any]) -> list[Any]:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return [self.pool.heard(said) for said in ray.get(asked)]
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except RayError as error:
            raise ResultError(
                f"a worker that trained SAEs ended ({one_line(error)}); run the same command again: it goes on from the last checkpoint"
            ) from None
