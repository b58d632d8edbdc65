"""The circuit that edges make: both ends of those that beat their controls."""

from collections.abc import Sequence

from diagnostics.edges.result import EdgePatching
from interventions.errors import ResultError
from interventions.models.anatomy import n_heads
from interventions.models.causal_model import CausalModel
from interventions.sites import Site


def circuit_of(model: CausalModel, edges: EdgePatching, scope: Sequence[str]) -> tuple[list[Site], list[str]]:
    """Heads and MLPs at either end of an edge that beats its control in any direction; those in the scope, and the names of others.

    A head of k or v stands for every head whose queries share it. Embedding and logits are no components.
    Raises `ResultError` for edges of another model, edges that were not tested, and where none is left.
    """
    if model.weights_hash != edges.provenance["weights_sha256"]:
        raise ResultError(
            f"edges of {edges.provenance['model']} with other weights than {model.name}; give the same model"
        )
    if not edges.tested:
        raise ResultError("these edges were not tested; measure them with controls=1 or more, on 10 pairs or more")
    found: dict[Site, None] = {}
    for line in (line for line in edges.groups if line["beats"]):
        for end in ("sender", "receiver"):
            if line[end] not in ("embedding", "logits"):
                found |= dict.fromkeys(_components(model, Site.parse(line[end])))
    inside = [site for site in found if site.point in scope]
    outside = [str(site) for site in found if site.point not in scope]
    if not inside:
        more = f"; {', '.join(outside)} would be, in another scope" if outside else ""
        raise ResultError(
            f"no component in the scope ({', '.join(scope)}) is at an end of an edge that beats its control{more}"
        )
    return inside, outside


def _components(model: CausalModel, site: Site) -> list[Site]:
    if site.head is None:
        return [site]
    shared = n_heads(model, Site(site.layer, "z")) // n_heads(model, site.whole)
    return [Site(site.layer, "z", head=site.head * shared + i) for i in range(shared)]
