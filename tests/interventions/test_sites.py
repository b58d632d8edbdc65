import pytest
from hypothesis import given
from hypothesis import strategies as st

from interventions.errors import SiteError
from interventions.sites import POINTS, Site, as_site, as_sites

sites = st.tuples(st.integers(0, 200), st.sampled_from(POINTS))
"""layer and point; made into a site in the test, where type checks may draw at random"""


@given(sites)
def test_both_names_are_parsed_back_to_the_site(site):
    site = Site(*site)
    assert Site.parse(site.hook_name) == site
    assert Site.parse(str(site)) == site


@given(sites, sites)
def test_different_sites_have_different_names(a, b):
    a, b = Site(*a), Site(*b)
    assert (a.hook_name == b.hook_name) == (a == b) == (str(a) == str(b))


def test_names_are_transformer_lens_names():
    assert Site(15).hook_name == "blocks.15.hook_resid_post"
    assert Site(0, "resid_pre").hook_name == "blocks.0.hook_resid_pre"


@given(sites)
def test_entry_is_a_residual_site_at_or_before_the_site(site):
    """It lies in the residual stream of the same block, below the first block that computes anything new."""
    site = Site(*site)
    assert site.entry.entry == site.entry and site.entry.point in ("resid_pre", "resid_post")
    assert site.entry.layer == site.layer and site.entry.first_block == site.first_block
    assert (site.entry == site) == (site.point in ("resid_pre", "resid_post"))


def test_an_edit_is_first_read_by_the_same_block_or_the_next():
    assert Site(7, "resid_pre").first_block == 7
    assert Site(7, "resid_post").first_block == 8
    assert Site(7, "resid_post").first_block == Site(8, "resid_pre").first_block
    assert {Site(7, point).first_block for point in ("attn_out", "resid_mid", "mlp_out")} == {7}


def test_sites_are_hashable_and_sorted_by_layer():
    assert len({Site(1), Site(1, "resid_post"), Site(1, "resid_pre")}) == 2
    assert sorted([Site(10), Site(9), Site(10, "resid_pre")]) == [
        Site(9),
        Site(10, "resid_post"),
        Site(10, "resid_pre"),
    ]


def test_an_unknown_point_raises_with_the_known_ones():
    with pytest.raises(SiteError, match=f"'resid_psot' in block 12; known: {', '.join(POINTS)}"):
        Site(12, "resid_psot")
    with pytest.raises(SiteError, match=r"'attn_z'"):
        Site.parse("blocks.3.hook_attn_z")


@pytest.mark.parametrize(
    "name", ["", "resid_post", "blocks.x.hook_resid_post", "blocks.3.hook_resid_post.extra", "-1.resid_pre"]
)
def test_invalid_site_names_raise(name):
    with pytest.raises(SiteError, match=r"expected a name such as"):
        Site.parse(name)


def test_layers_run_from_zero_to_the_last_block():
    with pytest.raises(SiteError, match="negative"):
        Site(-1)
    Site(29).check(30)
    with pytest.raises(SiteError, match="no block 30 in a model of 30 blocks; layers run from 0 to 29"):
        Site(30).check(30)


def test_one_or_several_sites_are_accepted_in_every_form():
    several = (Site(3), Site(5, "z"))
    assert as_sites(["3.resid_post", "blocks.5.attn.hook_z", Site(3)]) == several == as_sites(iter(several))
    assert as_sites("blocks.3.hook_resid_post") == as_sites(Site(3)) == (Site(3),)
    assert as_sites(("mlp_out", "5.z"), layers=(1, 2)) == (Site(1, "mlp_out"), Site(2, "mlp_out"), Site(5, "z"))


@pytest.mark.parametrize("given", [15, None, (15, "z"), "resid_post", "15"])
def test_invalid_sites_raise(given):
    with pytest.raises(SiteError, match=r"no site .*expected .*'15\.resid_post'"):
        as_site(given)


@pytest.mark.parametrize("layer", ["15", 1.5, None, [3]])
def test_layer_that_is_no_whole_number_raises(layer):
    site = Site(1)
    object.__setattr__(site, "layer", layer)  # type checks of the tests would see it first
    with pytest.raises(SiteError, match=r"layer .*; expected the number of a block"):
        site.__post_init__()
