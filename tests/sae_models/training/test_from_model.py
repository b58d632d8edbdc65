"""SAEs trained on a tiny model: one pass for several sites, exact resumption, and what each says of where it belongs."""

import json
from dataclasses import replace

import pytest
import torch

from interventions import Site, wrap
from interventions.activations import ActivationStream
from interventions.errors import MechdiagError, SiteError
from interventions.texts.prompts import as_prompts
from sae_models import SAEError, load_sae
from sae_models.architectures import named
from sae_models.training.from_model import SAESpec, train_saes
from sae_models.training.recipe import Recipe
from sae_models.training.trainer import SAETraining
from tests.tiny import D_MODEL, fresh, prompts, tokenizer

STEPS, ROWS = 10, 32
SHORT = Recipe(d_sae=48, k=4, lr=0.01, dead_window=0.3)
OPTIONS = {"tokens": STEPS * ROWS + 5, "batch_tokens": ROWS, "buffer_tokens": 80, "sink_filter": None}
WANTED = {
    "1/standard": SAESpec(Site(1), named("standard"), SHORT),
    "1/cosine": SAESpec(Site(1), named("cosine"), replace(SHORT, seed=1)),
    "3.mlp_out/aligned": SAESpec(Site(3, "mlp_out"), named("aligned:topk"), SHORT),
    "2.resid_pre/bypass": SAESpec(Site(2, "resid_pre"), named("bypass"), SHORT),
}


def model(seed=None):
    hf = fresh("llama")
    if seed is not None:
        next(hf.parameters()).data[0, 0] += seed
    return wrap(hf, tokenizer(), "owner/tiny")


TEXT = as_prompts(
    prompts((24, 10, 17, 24, 5, 13, 21, 9)), None
)  # 123 tokens, 115 of them not first ones: gone through three times


def trained(wanted=WANTED, **options):
    return train_saes(model(), TEXT, wanted, **{**OPTIONS, **options})


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def kept(folder):
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop("lock", None)
    return files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return trained(folder=folder, checkpoint_every=3), kept(folder)


# One pass


def test_joint_training_matches_single_site_training(undisturbed):
    """Without the sink filter the batches are the same, and so the SAEs are bitwise equal."""
    saes, _ = undisturbed
    assert list(saes) == list(WANTED)
    for name in WANTED:
        alone = trained({name: WANTED[name]})[name]
        assert same(alone, saes[name])
        assert not same(alone, trained({name: WANTED[name]}, seed=1)[name])  # the text in another order


def by_hand(one, sites, **options):
    options = {"batch_tokens": ROWS, "buffer_tokens": 80, "epochs": 9, "skip_first": 1, "sink_filter": None, **options}
    stream = ActivationStream(model(), TEXT, sites, **options)
    training = None
    for _ in range(STEPS):
        x = next(stream)[one.site]
        training = training or SAETraining(one.architecture, one.recipe, x, steps=STEPS)
        training.step(x)
    return training.sae, stream


@pytest.mark.parametrize("name", WANTED)
def test_training_activations_are_those_of_the_stream(name, undisturbed):
    one = WANTED[name]
    assert same(by_hand(one, [one.site])[0], undisturbed[0][name])
    assert not same(by_hand(replace(one, site=Site(0)), [Site(0)])[0], undisturbed[0][name])


def test_sinks_of_one_site_are_dropped_at_all_sites():
    """Batches then hold the same tokens at every site, so a site's SAEs depend on the other sites."""
    wanted = {name: WANTED[name] for name in ("1/standard", "3.mlp_out/aligned")}
    sites = [one.site for one in wanted.values()]
    both = trained(wanted, sink_filter=1.3)
    for name, one in wanted.items():
        expected, stream = by_hand(one, sites, sink_filter=1.3)
        assert same(both[name], expected)
    counted = stream.provenance()
    assert counted["tokens"]["dropped"]["sink"] > max(here["sink"] for here in counted["by_site"].values()) > 0
    alone = {"1/standard": wanted["1/standard"]}
    assert not same(trained(alone, sink_filter=1.3)["1/standard"], both["1/standard"])
    seen = trained(alone, sink_filter=1.3, also_sites=sites)  # unless the other sites are looked at too
    assert same(seen["1/standard"], both["1/standard"])


def test_first_tokens_are_dropped_by_default(undisturbed):
    wanted = {"1/standard": WANTED["1/standard"]}
    every = trained(wanted, skip_first=0)["1/standard"]
    assert same(every, by_hand(wanted["1/standard"], [Site(1)], skip_first=0)[0])
    assert not same(every, undisturbed[0]["1/standard"])
    assert every.metadata["skip_first"] == 0 and undisturbed[0]["1/standard"].metadata["skip_first"] == 1


def test_blocks_above_the_deepest_site_do_not_run():
    tiny, ran = model(), []
    for layer, block in enumerate(tiny.hf.model.layers):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    train_saes(tiny, TEXT, {"a": SAESpec(Site(0), named("standard"), SHORT)}, **OPTIONS)
    assert set(ran) == {0}


@pytest.mark.parametrize("filtered", [None, 1.5])
def test_a_short_run_reads_no_more_than_it_needs(filtered, tmp_path):
    """A buffer is filled to the end of a prompt, and filled again if the filter dropped too much of it."""
    text = as_prompts(prompts((24, 10, 17) * 40), None)
    settings = {**OPTIONS, "tokens": 2 * ROWS, "sink_filter": filtered, "buffer_tokens": 131_072}
    train_saes(model(), text, {"a": WANTED["1/standard"]}, folder=tmp_path, **settings)
    told = json.loads((tmp_path / "manifest.json").read_text())["stream"]
    assert told["tokens"]["emitted"] == 2 * ROWS and told["buffer_tokens"] == 68 >= 1.05 * 2 * ROWS
    assert (told["tokens"]["dropped"]["sink"] > 0) == (filtered is not None)
    assert told["tokens"]["seen"] <= told["buffers"] * (68 / (1 - 1 / 10) + 24)  # first tokens of prompts are left out


def test_text_is_repeated_and_batches_are_whole(undisturbed):
    saes, files = undisturbed
    lines = [json.loads(line) for line in files["metrics.jsonl"].decode().splitlines()]
    assert [(line["step"], line["tokens"]) for line in lines] == [(STEPS, STEPS * ROWS)] * len(WANTED)
    manifest = json.loads(files["manifest.json"])
    assert manifest["stream"]["tokens"]["emitted"] == STEPS * ROWS > 2 * 123
    assert manifest["stream"]["epochs_done"] == 2
    assert saes["1/standard"].metadata["tokens"] == STEPS * ROWS


# Interrupted


@pytest.mark.parametrize("after", [1, 4, 6, 9])
def test_resumed_training_ends_in_the_same_bytes(after, undisturbed, tmp_path):
    steps = []

    def stop(n, total, _):
        steps.append(n)
        if len(steps) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(folder=tmp_path, checkpoint_every=3, progress=stop)
    said = []
    saes = trained(folder=tmp_path, checkpoint_every=3, progress=lambda n, total, _: said.append((n, total)))
    done = (after - 1) // 3 * 3  # the callback comes after the checkpoint of its step
    done = after // 3 * 3 if after % 3 == 0 else done
    assert said == ([(done, STEPS)] if done else []) + [(1, STEPS)] * (STEPS - done)
    expected, files = undisturbed
    assert all(same(saes[name], expected[name]) for name in WANTED)
    assert kept(tmp_path) == files


def test_finished_folder_is_loaded_without_reading_text(undisturbed, tmp_path, monkeypatch):
    trained(folder=tmp_path, checkpoint_every=3)
    monkeypatch.setattr(ActivationStream, "__next__", lambda _: pytest.fail("a batch was asked for"))
    saes = trained(folder=tmp_path, checkpoint_every=3)
    x = 3 * torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(0))
    for name, sae in saes.items():
        assert torch.equal(sae(x), undisturbed[0][name](x)) and sae.encode(x).any()
        assert torch.equal(load_sae(tmp_path / name)(x), sae(x))
    assert kept(tmp_path) == undisturbed[1]


@pytest.mark.parametrize("what", ["weights", "text", "seed", "wanted", "tokens", "sink_filter"])
def test_a_folder_of_another_run_is_refused(what, tmp_path):
    wanted = {"1/standard": WANTED["1/standard"]}
    trained(wanted, folder=tmp_path)
    before = kept(tmp_path)
    other = {
        "weights": lambda: train_saes(model(0.1), TEXT, wanted, folder=tmp_path, **OPTIONS),
        "text": lambda: train_saes(
            model(), as_prompts(prompts((24, 20, 30)), None), wanted, folder=tmp_path, **OPTIONS
        ),
        "seed": lambda: trained(wanted, folder=tmp_path, seed=1),
        "wanted": lambda: trained({"1/standard": replace(wanted["1/standard"], site=Site(2))}, folder=tmp_path),
        "tokens": lambda: trained(wanted, folder=tmp_path, tokens=3 * ROWS),
        "sink_filter": lambda: trained(wanted, folder=tmp_path, sink_filter=10.0),
    }
    with pytest.raises(SAEError, match="holds another run"):
        other[what]()
    assert kept(tmp_path) == before


# What they say


def test_each_sae_records_its_model_and_site(undisturbed):
    tiny = model()
    for name, sae in undisturbed[0].items():
        site = WANTED[name].site
        assert (sae.model_name, sae.hook_name) == ("owner/tiny", site.hook_name)
        sae.check_belongs(d_model=D_MODEL, model_name="tiny", hook_name=site.hook_name)
        assert sae.metadata["weights_sha256"] == tiny.weights_hash != model(0.1).weights_hash
        assert sae.metadata["recipe"]["seed"] == WANTED[name].recipe.seed
        assert sae.metadata["text"] == TEXT.provenance
        told = {key: sae.metadata[key] for key in ("dtype", "batch_tokens", "buffer_tokens", "sink_filter", "seed")}
        assert told == {"dtype": "float32", "batch_tokens": ROWS, "buffer_tokens": 80, "sink_filter": None, "seed": 0}


def test_manifest_counts_the_tokens_of_the_text(undisturbed):
    saes, files = undisturbed
    manifest = json.loads(files["manifest.json"])
    assert manifest["model"]["weights_sha256"] == model().weights_hash
    assert manifest["stream"]["sites"] == ["1.resid_post", "2.resid_pre", "3.mlp_out"]
    assert manifest["saes"] == {name: sae.metadata["training"] for name, sae in saes.items()}
    tokens = manifest["stream"]["tokens"]
    assert tokens["seen"] == tokens["kept"] + sum(tokens["dropped"].values())


# What goes wrong


@pytest.mark.parametrize(
    ("wanted", "options", "error", "message"),
    [
        ({}, {}, MechdiagError, "0 SAEs on 325 tokens in batches of 32; expected some of each"),
        (WANTED, {"tokens": ROWS - 1}, MechdiagError, "4 SAEs on 31 tokens in batches of 32"),
        (WANTED, {"batch_tokens": 0}, MechdiagError, "4 SAEs on 325 tokens in batches of 0"),
        (WANTED, {"buffer_tokens": 8}, MechdiagError, "buffer_tokens 8 is below batch_tokens 32"),
        (WANTED, {"autocast": "int8"}, MechdiagError, "unknown autocast 'int8'"),
        ({"a": SAESpec(Site(9), named("standard"), SHORT)}, {}, SiteError, "no block 9 in a model of 6 blocks"),
        ({"a": SAESpec(Site(1), named("standard"), replace(SHORT, k=49))}, {}, SAEError, "k = 49"),
    ],
    ids=range(7),
)
def test_invalid_arguments_raise(wanted, options, error, message):
    with pytest.raises(error, match=message):
        trained(wanted, **options)
