"""SAEs trained on a model's activations: the stream from `interventions`, the training from `sae_models`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interventions.activations import ActivationStream
from interventions.errors import MechdiagError
from interventions.files import jsonable
from interventions.models.wrapping import wrap
from interventions.progress import Progressing, followed
from interventions.provenance import model_provenance
from interventions.sites import Site, SiteLike, as_site, as_sites
from interventions.texts.prompts import prompts_for
from sae_models.architectures import Architecture
from sae_models.sae import SAE
from sae_models.training.recipe import Recipe
from sae_models.training.runs import Job, Team, train


@dataclass(frozen=True)
class SAESpec:
    """An SAE to train."""

    site: Site
    """where its activations are read"""
    architecture: Architecture
    """of any name in `sae_models.architectures.named`"""
    recipe: Recipe
    """how"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", as_site(self.site))


def train_saes(
    model: Any,
    prompts: Any,
    wanted: Mapping[str, SAESpec],
    *,
    tokens: int = 1_000_000,
    batch_tokens: int = 1024,
    buffer_tokens: int = 131_072,
    sink_filter: float | None = 10.0,
    skip_first: int = 1,
    also_sites: SiteLike | Sequence[SiteLike] = (),
    autocast: str = "auto",
    seed: int = 0,
    folder: str | Path | None = None,
    log_every: int = 50,
    checkpoint_every: int | None = None,
    keep_every: int | None = None,
    progress: Progressing = None,
    team: Team | None = None,
) -> dict[str, SAE]:
    """Train SAEs of several sites on one pass over the prompts, which is repeated until `tokens` have been seen.

    wanted: by name, which is also the SAE's folder under `folder`. tokens: rounded down to whole batches. The options of the stream
    are those of `ActivationStream` (a run of fewer tokens than `buffer_tokens` has a buffer of its own size); skip_first leaves out each prompt's first tokens, where sinks sit that the filter on norms does not
    see at every depth. also_sites: sites that no SAE reads, but whose sinks are left out too, so that a part of a run sees the
    same batches as the whole. keep_every: steps between copies of each SAE that stay
    in its folder (`tokens-<n>`). With a folder the same call goes on where it was interrupted, and `manifest.json` says at the end
    what became of the text. progress: as of `followed`, called with a step's metrics too. team: who trains the SAEs, such as
    `RayPool.team()` of workers; this process alone runs the model. Each SAE says where it belongs, with a hash of
    the weights. Raises what `ActivationStream` and `train` raise, and `MechdiagError` for less than a batch of tokens.
    """
    model = wrap(model)
    prompts = prompts_for(model, prompts)
    steps = tokens // batch_tokens if batch_tokens > 0 else 0
    if not wanted or steps < 1:
        raise MechdiagError(
            f"{len(wanted)} SAEs on {tokens} tokens in batches of {batch_tokens}; expected some of each"
        )
    # What a short run reads, and a twentieth that the filter on norms may drop: a fuller buffer would cost its time for nothing.
    buffer_tokens = min(buffer_tokens, max(batch_tokens, math.ceil(1.05 * steps * batch_tokens)))
    stream = ActivationStream(
        model,
        prompts,
        sorted({one.site for one in wanted.values()} | set(as_sites(also_sites))),
        batch_tokens=batch_tokens,
        buffer_tokens=buffer_tokens,
        sink_filter=sink_filter,
        skip_first=skip_first,
        epochs=None,
        seed=seed,
        autocast=autocast,
    )
    about = {
        "weights_sha256": model.weights_hash,
        "model_note": model.note,
        "dtype": str(model.dtype).removeprefix("torch."),
        "autocast": stream.autocast,
        "text": prompts.provenance,
        "tokens": steps * batch_tokens,
        "batch_tokens": batch_tokens,
        "buffer_tokens": buffer_tokens,
        "sink_filter": stream.sink_filter,
        "skip_first": skip_first,
        "sites": [str(site) for site in stream.sites],
        "seed": seed,
    }
    jobs = [
        Job(name, one.site, one.architecture, one.recipe, model.name, one.site.hook_name)
        for name, one in wanted.items()
    ]
    with followed(progress, f"training {len(jobs)} SAEs", "step") as told:
        bar: Any = getattr(told, "training", told)  # ours says what the metrics say, a caller's own is called as it is
        return train(
            stream,
            jobs,
            steps=steps,
            folder=folder,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            keep_every=keep_every,
            progress=bar,
            about=about,
            team=team,
            manifest=lambda: jsonable({"stream": stream.provenance(), "model": model_provenance(model)}),
        )
