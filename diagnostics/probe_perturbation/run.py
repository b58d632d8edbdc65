"""`perturb_probes`: targeted probe perturbation and spurious correlation removal, in accuracy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from diagnostics.probe_perturbation.choices import KS
from diagnostics.probe_perturbation.result import ProbePerturbation
from diagnostics.probe_perturbation.splits import attributes_of
from diagnostics.probe_perturbation.work import PerturbationRunner, of_table
from diagnostics.results.calls import recorded
from diagnostics.running.provenance import hashed, run_identity, run_provenance
from diagnostics.running.units import run_units
from diagnostics.sparse_probing.pooling import labelled_prompts
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.sites import SiteLike, several
from interventions.texts.labelled import Labelled, load_labelled
from sae_models.dictionaries import dictionaries_of


@recorded
@torch.no_grad()
def perturb_probes(
    model: Any,
    labelled: Labelled | str | Sequence[Labelled | str],
    saes: Any,
    *,
    crossed: Labelled | str | Sequence[Labelled | str] = (),
    site: SiteLike | None = None,
    ks: int | Sequence[int] = KS,
    seeds: int = 3,
    per_class: int | None = 100,
    max_length: int = 128,
    test_share: float = 0.3,
    inverse_penalty: float = 1.0,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> ProbePerturbation:
    """Ablate the k latents that speak for a class, and see which linear probes lose accuracy, or gain it.

        TPP(k) = mean over classes i of  [fall of probe i − mean over j ≠ i of the fall of probe j]
        SCR(k) = (accuracy of the biased probe after − before) / (accuracy of a probe of balanced texts − before)

    labelled: sets of three classes or more, for TPP: a logistic probe of each class against the rest, on activations averaged over a text's
    tokens; latents by `class_effects`. crossed: sets with four classes `a/b` of two attributes, for SCR (`questions`: language and
    question mark): the biased probe is trained where both attributes agree and asked for the wanted one; the latents of a probe of
    the other are ablated (`attribute_effects`); each attribute is the spurious one in turn. Ablation: z = 0 at every token, the
    SAE's error kept, exact in the mean (`ablations`). Beside it random latents at the same dose, and the probe's direction projected out.
    Other arguments as in `probe_saes`.

    Source: SAEBench, arXiv:2503.09532, and its code; SCR after SHIFT, arXiv:2403.19647. There probes are trained by Adam on thousands of
    texts and one split, latents without a positive effect may be ablated too, and of SCR only the direction with the lower
    biased accuracy counts; here both are told. Controls and intervals are ours.
    Raises what `probe_saes` raises, `ResultError` for sets of other classes.
    """
    model = wrap(model)
    ks = tuple(sorted(set(several(ks))))
    if not ks or ks[0] < 1 or seeds < 1 or not 0 < test_share < 1 or not inverse_penalty > 0:
        raise ResultError(
            f"ks {list(ks)}, {seeds} seeds, test_share {test_share}, inverse_penalty {inverse_penalty}; expected numbers of 1 or more, a "
            "share between 0 and 1, and a penalty above 0"
        )
    dictionaries = dictionaries_of(saes, model, site)
    if plain := [d.name for d in dictionaries if d.sae is None]:
        raise ResultError(f"{plain[0]!r} is a set of directions; latents of an SAE are ablated here")
    many, pairs = (_read(some, per_class, seed) for some in (labelled, crossed))
    sets = {some.name: some for some in (*many, *pairs)}
    if not sets or len(sets) < len(many) + len(pairs):
        raise ResultError(f"sets of texts {[some.name for some in (*many, *pairs)]}; give at least one, each once")
    for some in many:
        if len(some.classes) < 3:
            raise ResultError(
                f"{some.name} has classes {', '.join(some.classes)}; expected three or more: two have one probe"
            )
    for some in pairs:
        attributes_of(some)
    settings = {
        "ks": list(ks), "seeds": seeds, "per_class": per_class, "max_length": max_length, "test_share": test_share,
        "inverse_penalty": inverse_penalty, "sink_filter": sink_filter or None, "seed": seed,
    }  # fmt: skip
    own = {"saes": {d.name: d.provenance() for d in dictionaries}, "crossed": [some.name for some in pairs], **settings}
    prompts = {name: labelled_prompts(model, some, max_length=max_length, seed=seed) for name, some in sets.items()}
    hashes = {name: hashed([some.tokens, *parts]) for name, (some, *parts) in prompts.items()}
    runner = PerturbationRunner(model, sets, own["crossed"], dictionaries, settings)
    identity = run_identity(ProbePerturbation.NAME, model, hashes, own)
    done = run_units(runner.units(), folder, runner, identity=identity, overwrite=overwrite, progress=progress)
    cells, texts, tokens = [], [], []
    for name, (some, *_) in prompts.items():
        for one in (one for one in done if one.unit["dataset"] == name):
            cells.append(of_table(one.frame, "cell"))
            own_texts = of_table(one.frame, "text")
            texts.append(own_texts.assign(**{column: own_texts[column] + len(tokens) for column in ("text", "group")}))
        tokens += some.tokens
    frame = pd.concat(cells, ignore_index=True)
    described = {
        name: {**some.provenance(), "tokens": sum(map(len, prompts[name][0].tokens)), "prompts": len(prompts[name][0].tokens)}
        | {"prompts_dropped": prompts[name][0].dropped}
        for name, some in sets.items()
    }  # fmt: skip
    left_out = {f"{d.unit['dataset']}, {own['saes'][d.unit['sae']]['site']}": d.notes["left_out"] for d in done}
    said = own | {"left_out": left_out, "rows": len(frame)}
    provenance = run_provenance(ProbePerturbation.NAME, model, described, [d.site for d in dictionaries], said)
    return ProbePerturbation(frame, tokens, provenance, pd.concat(texts, ignore_index=True))


def _read(given: Any, per_class: int | None, seed: int) -> list[Labelled]:
    some = [given] if isinstance(given, Labelled | str) else list(given)
    return [load_labelled(x, per_class=per_class, seed=seed) if isinstance(x, str) else x for x in some]
