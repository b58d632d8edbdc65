"""`latent_card.py` writes a page for each latent and an index."""

import re

import pytest

from diagnostics.atlas.run import causal_atlas
from interventions import load_model
from interventions.texts.prompts import load_texts, tokenize
from sae_models.loading import load_sae


def test_several_latents_get_a_page_each_and_an_index(script, given):
    run = script("latent_card", "--compare", given / "saes/1/standard", "--latents", 3, 7, "frequent:1")
    assert run.status == 0 and "latent 3: fires on" in run.said, run.err
    assert {"latent_3.html", "latent_7.html", "index.html"} <= run.files.keys() and len(run.files) in (3, 4)
    index, page = (run.files[name].decode() for name in ("index.html", "latent_3.html"))
    assert all(f'href="{name}"' in index for name in run.files.keys() - {"index.html"})
    assert "Latent 3" in page and "standard" in page and "exponent of ‖x‖, learned" in page


def test_existing_pages_are_refused_before_loading_the_model(script, no_model, tmp_path):
    """`frequent:N` may write any page, so any existing page is refused; a number refuses only its own page."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/latent_9.html").write_text("a page")
    refused = script("latent_card", "--latents", "frequent:1").error
    assert "latent_9.html" in refused and "--overwrite" in refused
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
        script("latent_card", "--latents", 3)


def test_the_top_latents_are_those_of_the_atlas(script, given, tmp_path):
    model, sae = load_model(given / "model", device="cpu"), load_sae(given / "saes/1/standard")
    text = tokenize(load_texts(str(given / "text.txt")), model.tokenizer, max_length=128, n_prompts=24)
    atlas = causal_atlas(model, text, {"standard": sae}, path_share=0, placebo_share=0)
    atlas.write(tmp_path / "atlas")
    words = ("--saes", given / "saes/1/standard", "--latents", "top:2", "--atlas", tmp_path / "atlas")
    run = script("latent_card", *words)
    assert run.status == 0, run.err
    even = atlas.frame.loc[atlas.frame.prompt % 2 == 0]
    best = even.groupby("latent").kl.sum().sort_values(ascending=False).index[:2]
    assert run.files.keys() == {"index.html", *(f"latent_{i}.html" for i in best)}
    assert run.said.startswith(f"latent {best[0]}: ")
    page = run.files[f"latent_{best[0]}.html"].decode()
    assert "rank by total effect" in page
    assert re.search(r"differs by at most (0|[\d.·]*10⁻[⁵⁶⁷⁸⁹¹]\S*) nats at \d+ tokens measured again", page)
    refused = script("latent_card", *words, "--max-length", 9, "--overwrite")
    assert "none of the atlas' 24 prompts" in refused.error
