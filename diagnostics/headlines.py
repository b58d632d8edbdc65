"""The few numbers of a result that a reader looks for first, each beside what it must be compared with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diagnostics.dosing import shown_dose
from diagnostics.results import Shown
from diagnostics.study import TRAINED


@dataclass(frozen=True)
class Headline:
    """One number, where it is from, and its null."""

    what: str
    """the quantity, and where: `direction patch ÷ its placebo, block 15`"""
    value: str
    """with its 95 % interval; what has no interval says so in `what`"""
    against: str
    """what nothing would give, or a control gives, with its name"""


def headlines(result: Shown) -> list[Headline]:
    """Of results by depth the numbers of the middle block measured, of several SAEs a line for each."""
    found = _KINDS.get(result.NAME)
    return [] if found is None else list(found(result))


def _middle(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    layers = sorted({g["layer"] for g in groups})
    return [g for g in groups if g["layer"] == layers[len(layers) // 2]]


def _estimate(value: Any) -> str:
    return str(getattr(value, "estimate", value))


def _range(values: Sequence[Any]) -> str:
    """What untrained networks give: their values from least to largest."""
    known = [getattr(v, "estimate", v).value for v in values]
    if not known:
        return ""
    low, high = f"{min(known):.3g}", f"{max(known):.3g}"
    return f"untrained networks: {low if low == high else f'{low} to {high}'}"


def _direction(result: Any) -> Iterator[Headline]:
    own = _middle([g for g in result.select() if g["context"] == result.provenance["context"][0]])
    for g in own:
        place = [s for label in result.null_models for s in result.select(model=label)]
        nulls = [s for s in place if (s["layer"], s["context"]) == (g["layer"], g["context"])]
        for ratio, kind, words in (
            ("direction ÷ norm", "median", "direction patch ÷ norm patch, at unequal doses (median)"),
            ("direction ÷ placebo_token", "of_means", "direction patch ÷ random edit of its norm and angle"),
            ("norm ÷ placebo_norm", "of_means", "norm patch ÷ rotation by its distance"),
        ):
            if ratio in g["ratios"]:
                against = _range([s["ratios"][ratio][kind] for s in nulls if ratio in s["ratios"]])
                one = "" if kind == "median" else "1: no more than its placebo; "
                yield Headline(
                    f"{words}, block {g['layer']}", _estimate(g["ratios"][ratio][kind]), (one + against).strip("; ")
                )


def _dose(result: Any) -> Iterator[Headline]:
    dose = shown_dose(result.provenance["doses"])
    given = list(result.provenance["directions"])
    for g in _middle([g for g in result.select() if g["dose"] == dose]):
        nulls = [
            s for label in result.null_models for s in result.select(model=label)
            if (s["layer"], s["dose"]) == (g["layer"], dose)
        ]  # fmt: skip
        wanted = [f"{name} ÷ {name}_placebo_token" for name in given]
        for ratio in [*wanted, "toward_token ÷ between_tokens", "norm_up ÷ isotropic"]:
            if ratio in g["ratios"]:
                against = _range([s["ratios"][ratio] for s in nulls if ratio in s["ratios"]])
                words = f"KL of {ratio.replace('_', ' ')} at dose {dose:g}, block {g['layer']}"
                yield Headline(words, str(g["ratios"][ratio]), f"1: no more; {against}".strip("; "))


def _unit_norm(result: Any) -> Iterator[Headline]:
    for g in _middle(result.select(TRAINED)):
        nulls = [s for label in result.null_models for s in result.select(model=label) if s["layer"] == g["layer"]]
        for name in (name for name in g if " ÷ " in name):
            against = f"1: no more than turning as far; {_range([s[name] for s in nulls])}".strip("; ")
            yield Headline(f"KL of {name.replace('_', ' ')}, block {g['layer']}", str(g[name]), against)


def _specification(result: Any) -> Iterator[Headline]:
    table = result.summary()
    for line in table[table.model == TRAINED].to_dict("records"):
        others = table[(table.claim == line["claim"]) & (table.model != TRAINED)]["interval above 1"]
        known = line["specifications"] - line["undefined"]
        against = f"untrained networks: {others.min():.0%} to {others.max():.0%}" if len(others) else ""
        words = f"“{line['claim']}”: specifications whose whole interval is above 1, of {known} (median {line['median']:.3g})"
        yield Headline(words, f"{line['interval above 1']:.0%}", against)


def _evaluation(result: Any) -> Iterator[Headline]:
    for g in result.select(quartile="all", tokens=result.counted, corpus=result.corpora[0]):
        score = f"KL score {g['kl_score']}; dead {g['dead_share']:.1%}"
        yield Headline(f"variance explained, {g['sae']} at {g['site']}", str(g["fve"]), score)


def _projections(result: Any) -> Iterator[Headline]:
    for g in result.select():
        ratio = g["ratios"].get(f"{g['main']} ÷ placebo_token")
        if ratio is not None:
            words = f"KL of removing a direction ÷ placebo, {g['sae']}, block {g['layer']}"
            yield Headline(words, str(ratio), "1: no more than a random edit of the same norm and angle")


def _contests(result: Any) -> Iterator[Headline]:
    for c in result.contests:
        if c.place["model"] == TRAINED and c.place["context"] == result.runs[c.run].provenance["context"][0]:
            token = c.rates.placebos.get("placebo_token")
            against = "" if token is None else f"its placebo: {token.overall.estimate}"
            words = f"win rate of the cosine, {c.place['sae']}" + (f", {c.run}" if len(result.runs) > 1 else "")
            yield Headline(words, str(c.rates.main.overall.estimate), against)


def _atlas(result: Any) -> Iterator[Headline]:
    for g in result.groups:
        where = f"{g['sae']}, block {g['layer']}"
        if g["kl_over_placebo"] is not None:
            words = f"KL of removing one latent ÷ placebo, {where}"
            yield Headline(words, str(g["kl_over_placebo"]), f"1: no more than its dose; mean KL {g['kl']} nats")
        others = {name: score["rank"] for name, score in g["scores"].items() if name not in ("delta_norm", "z")}
        if others and "delta_norm" in g["scores"]:
            name, best = max(others.items(), key=lambda item: item[1].value)
            words = f"rank correlation of a latent's dose ‖z·d‖ with its KL, {where}"
            yield Headline(
                words, str(g["scores"]["delta_norm"]["rank"]), f"0: chance; the best other score ({name}): {best}"
            )


def _ablation(result: Any) -> Iterator[Headline]:
    form = result.forms[0]
    means = result.means(form)
    for c in (c for c in means if c.arm == "selected"):
        k = len(c.counts) // 2
        others = [o for o in means if (o.sae, o.ranking) == (c.sae, c.ranking) and o.arm in ("random", "placebo")]
        against = "; ".join(f"{o.arm}: {o.selectivity(k)}" for o in others)
        words = f"selectivity ({form}) of the {int(c.counts[k])} latents of a concept, mean over concepts, {c.sae}"
        yield Headline(words, str(c.selectivity(k)), against or "0.5: as much collateral as intended")


def _probing(result: Any) -> Iterator[Headline]:
    data = "mean" if len(result.datasets) > 1 else result.datasets[0]
    k = min(result.provenance["ks"])
    for sae in result.names:
        other = {
            kind: g["accuracy"]
            for kind in ("random", "raw")
            for g in result.select(sae=sae, dataset=data, kind=kind)
            if g["k"] in (0, k)
        }
        for g in result.select(sae=sae, dataset=data, kind="selected", k=k):
            said = {"random": "random latents", "raw": "all of the activation"}
            against = "; ".join(f"{said[kind]}: {value.value:.3g}" for kind, value in other.items())
            yield Headline(
                f"accuracy of {k} latent{'s' * (k > 1)}, {sae}, {'mean over data sets' if data == 'mean' else data}",
                str(g["accuracy"]),
                against,
            )


def _dictionaries(result: Any) -> Iterator[Headline]:
    for line in result.groups:
        words = f"latents of {line['sae']} that have a match in {line['other']} (no interval)"
        yield Headline(words, f"{line['matched_share']:.1%}", f"chance: {line['matched_share_null']:.1%}")


def _latents(value: str, words: str, own: Callable[[Any], bool], null: Callable[[Any], bool], called: str) -> Any:
    """Of results of edits of single latents: the groups `own`, each beside the group of its SAE that is `null`."""

    def found(result: Any) -> Iterator[Headline]:
        for g in result.groups:
            if own(g) and g.get(value) is not None:
                others = [o for o in result.groups if o["sae"] == g["sae"] and null(o) and o.get(value) is not None]
                against = "; ".join(f"{called}: {o[value]}" for o in others[:1])
                yield Headline(f"{words}, {g['sae']}", str(g[value]), against)

    return found


def _steering(result: Any) -> Iterator[Headline]:
    table = result.peaks()
    for line in table[table.condition.isin(["single", "joint"])].to_dict("records"):
        nulls = table[(table.sae == line["sae"]) & (table.condition == f"{line['condition']}_placebo_token")]
        against = "".join(f"its placebo: {n}" for n in nulls["peak − clean"])
        words = f"rise of the target's probability at its peak (coefficient {line['peak']:g}), {line['condition']}, {line['sae']}"
        yield Headline(words, str(line["peak − clean"]), against)


_KINDS: dict[str, Callable[[Any], Iterator[Headline]]] = {
    "direction_norm": _direction,
    "dose_response": _dose,
    "unit_norm": _unit_norm,
    "specification": _specification,
    "sae_evaluation": _evaluation,
    "projections": _projections,
    "win_rate": _contests,
    "atlas": _atlas,
    "feature_ablation": _ablation,
    "sparse_probing": _probing,
    "dictionary_comparison": _dictionaries,
    "latent_steering": _steering,
    "interactions": _latents(
        "interaction", "interaction of two latents ÷ their single effects", lambda g: g["kind"] == "latents",
        lambda g: g["kind"] == "placebo_token", "the same edits turned at random",
    ),
    "causal_concentration": _latents(
        "n90 / active", "share of a token's latents that carries 90 % of their effect",
        lambda g: (g["edit"], g["order"]) == ("remove", "size"), lambda g: g["edit"] == "placebo_token", "turned at random",
    ),
    "atom_substitution": _latents(
        "wins", "substitution by the nearest atom changes less than deletion of its dose", lambda g: g["atom"] == "nearest",
        lambda g: g["atom"] == "random", "by a random atom",
    ),
    "ablation_sparsity": _latents(
        "sparsity", "share of logits that an ablation reaches", lambda g: g["edit"] == "latent",
        lambda g: g["edit"] == "placebo_token", "its placebo",
    ),
}  # fmt: skip
