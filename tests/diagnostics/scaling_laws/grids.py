"""A grid of untrained SAEs that say how they were trained, on a tiny model."""

import functools
from dataclasses import asdict

import torch

from diagnostics.scaling_laws.grid import specifications
from interventions import Site, record
from sae_models.architectures import build
from sae_models.training.trainer import Recipe
from tests.tiny import prompts, tiny_model

PROMPTS = prompts(tuple(12 + (7 * i) % 11 for i in range(22)))
SITE = Site(3)


@functools.cache
def grid(widths=(40, 80, 160, 320), ks=(2, 4, 8), cells=((160, 4),), seeds=(0, 1)):
    """SAEs by folder; encoder rows are decoder rows, so that wider ones reconstruct more."""
    x = record(tiny_model("llama"), PROMPTS, [SITE], keep_cache=False).activations[SITE].flatten(0, 1)
    x = x[x.norm(dim=-1) > 0]
    found = {}
    for name, one in specifications(SITE, widths, ks, recipe=Recipe(d_sae=8), cells=cells, seeds=seeds).items():
        r = one.recipe
        stream = torch.Generator().manual_seed(r.seed + (7 if r.aux == 0 else 11 if r.multi else 0))
        sae = build(one.architecture, r.d_sae, r.k, x, stream, hook_name=SITE.hook_name)
        said = {"tokens": 640, "batch_tokens": 32, "sink_filter": None, "skip_first": 1, "text": {"name": "given"}}
        sae.metadata |= {"architecture": asdict(one.architecture), "recipe": asdict(r), **said}
        found[name] = sae.requires_grad_(False)
    return found
