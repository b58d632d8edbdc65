"""Identities and invariants of the edits.

Tolerances are multiples of the dtype's machine epsilon, relative to the norm of the vectors concerned. An edit rounds
each number a few times (divide, multiply, add) and forms norms of at most 64 squares, so `16·eps` bounds what float32
and float64 lose; half precision is computed in float32 and rounded once, so one `eps` is left.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions import edits
from interventions.errors import EditError

D_MODEL = 64
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALF)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([1e-3, 1.0, 300.0])
angles = st.floats(0.0, math.pi)


def eps(dtype):
    return torch.finfo(dtype).eps


def tolerance(dtype):
    """Relative to a norm; see the head of this file."""
    return eps(dtype) if dtype in HALF else 16 * eps(dtype)


def gaussian(seed, *shape, dtype=torch.float32, scale=1.0, device="cpu"):
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * draw).to(dtype).to(device)


def several(seed, n, rows=5, **options):
    return [gaussian(seed + i, rows, D_MODEL, **options) for i in range(n)]


def distance(x, y):
    """‖x − y‖ of each row, relative to the larger norm."""
    x, y = x.double(), y.double()
    return (x - y).norm(dim=-1) / torch.maximum(x.norm(dim=-1), y.norm(dim=-1))


def length(x):
    return x.double().norm(dim=-1)


def assert_rows_close(x, y, tol):
    assert x.shape == y.shape
    assert distance(x, y).max() <= tol


# Swaps


@every_dtype
def test_swapping_direction_and_norm_gives_the_source(dtype, device):
    x, source = several(0, 2, dtype=dtype, scale=30.0, device=device)
    for patched in (
        edits.swap_norm(edits.swap_direction(x, source), source),
        edits.swap_direction(edits.swap_norm(x, source), source),
    ):
        assert_rows_close(patched, source, 4 * tolerance(dtype))


@every_dtype
def test_each_swap_changes_only_the_direction_or_the_norm(dtype, device):
    x, source = several(1, 2, dtype=dtype, scale=30.0, device=device)
    turned, stretched = edits.swap_direction(x, source), edits.swap_norm(x, source)
    assert torch.allclose(length(turned), length(x), rtol=tolerance(dtype), atol=0)
    assert torch.allclose(length(stretched), length(source), rtol=tolerance(dtype), atol=0)
    assert edits.angle_between(turned, source).max() <= 2 * tolerance(dtype)
    assert edits.angle_between(stretched, x).max() <= 2 * tolerance(dtype)


@given(seeds, scales)
def test_swapping_with_itself_changes_at_most_the_last_bit(seed, scale):
    (x,) = several(seed, 1, scale=scale)
    for same in (edits.swap_direction(x, x), edits.swap_norm(x, x)):
        assert ((same - x).abs() <= 1.5 * eps(x.dtype) * x.abs()).all()  # two roundings of eps/2 each
    for dtype in HALF:
        half = x.to(dtype)
        assert torch.equal(edits.swap_direction(half, half), half)
        assert torch.equal(edits.swap_norm(half, half), half)


def test_swaps_use_only_the_direction_or_the_norm_of_the_source():
    x, source = several(3, 2)
    assert torch.equal(edits.swap_direction(x, 4 * source), edits.swap_direction(x, source))
    assert torch.equal(edits.swap_norm(x, -source), edits.swap_norm(x, source))


def test_one_source_is_shared_by_all_rows():
    (x,) = several(4, 1)
    source = gaussian(5, D_MODEL)
    assert torch.equal(edits.swap_direction(x, source), edits.swap_direction(x, source.expand_as(x)))
    assert torch.equal(edits.replace(x, source), source.expand_as(x))


def test_a_vector_of_norm_zero_gives_nonfinite_values():
    x, source = several(6, 2)
    x[0] = 0
    assert edits.swap_norm(x, source)[0].isnan().all()
    assert edits.swap_direction(source, x)[0].isnan().all()
    assert edits.rotate_by_angle(x, source, 0.3)[0].isnan().all()
    assert edits.swap_norm(x, source)[1:].isfinite().all()


# Half precision: 300·sqrt(64) squared is 6e6, far above float16's 65504


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_large_half_precision_vectors_do_not_overflow(dtype, device):
    x, source, towards = several(7, 3, dtype=dtype, scale=300.0, device=device)
    wide = [v.float() for v in (x, source, towards)]
    moved = edits.norm(x).squeeze(-1) / 2
    cases = {
        "swap_direction": (edits.swap_direction(x, source), edits.swap_direction(*wide[:2])),
        "swap_norm": (edits.swap_norm(x, source), edits.swap_norm(*wide[:2])),
        "rotate_by_angle": (edits.rotate_by_angle(x, towards, 0.7), edits.rotate_by_angle(wide[0], wide[2], 0.7)),
        "rotate_by_distance": (
            edits.rotate_by_distance(x, towards, moved),
            edits.rotate_by_distance(wide[0], wide[2], moved),
        ),
        "matched_placebo": (edits.matched_placebo(x, source, towards), edits.matched_placebo(*wide)),
        "project_out": (edits.project_out(x, source[0]), edits.project_out(wide[0], wide[1][0])),
        "add_direction": (edits.add_direction(x, source, 2.0), edits.add_direction(*wide[:2], 2.0)),
        "mean": (edits.mean(x, source), edits.mean(*wide[:2])),
        "rescale": (edits.rescale(x, 1.5), edits.rescale(wide[0], 1.5)),
        "replace": (edits.replace(x, wide[1]), wide[1]),
        "zero": (edits.zero(x), torch.zeros_like(wide[0])),
    }
    for name, (half, full) in cases.items():
        assert half.dtype == dtype, name
        assert half.isfinite().all(), name
        assert torch.equal(half, full.to(dtype)), name


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e19), (torch.float32, 1e37), (torch.float32, 1e-25), (torch.float32, 1e-36), (torch.float64, 1e300),
     (torch.float64, 1e-300), (torch.bfloat16, 1e30)],
    ids=str,
)  # fmt: skip
def test_norms_neither_overflow_nor_underflow(dtype, size):
    """Squares of these values overflow or underflow; edits that use only a direction do not depend on its length."""
    x, source = several(40, 2, dtype=dtype)
    large = source * size
    assert_rows_close((edits.norm(large) / size).to(dtype), edits.norm(source).to(dtype), tolerance(dtype))
    assert_rows_close(
        (edits.centred_norm(large) / size).to(dtype), edits.centred_norm(source).to(dtype), 4 * tolerance(dtype)
    )
    for edit in (
        lambda d: edits.swap_direction(x, d),
        lambda d: edits.project_out(x, d[:2]),
        lambda d: edits.remove_projection(x, d),
        lambda d: edits.rotate_by_angle(x, d, 0.5),
        lambda d: edits.matched_placebo(x, 1.5 * x.roll(1, -1), d),
        lambda d: edits.cosine(x, d)[..., None],
        lambda d: edits.angle_between(x, d)[..., None],
        lambda d: edits.swap_norm(d, x),
    ):
        assert_rows_close(edit(large).to(dtype), edit(source).to(dtype), 8 * tolerance(dtype))


def test_invalid_directions_cannot_be_projected_out():
    for value in (torch.inf, torch.nan):
        x, directions = several(41, 2)
        directions[2, 1] = value
        with pytest.raises(EditError, match="cannot project out direction 2 of 5: it is not finite"):
            edits.project_out(x, directions)
    for direction in (torch.zeros(D_MODEL), torch.zeros(3, D_MODEL)):
        with pytest.raises(EditError, match="direction of norm 0"):
            edits.project_out(x, direction)


def test_norms_are_formed_in_float32_at_least():
    x = torch.full((2, D_MODEL), 300.0)
    for dtype in HALF:
        assert edits.norm(x.to(dtype)).dtype == torch.float32
        assert torch.equal(edits.norm(x.to(dtype)), torch.full((2, 1), 2400.0))
    assert edits.norm(x.double()).dtype == torch.float64


@given(seeds, scales, st.floats(-100.0, 100.0))
def test_the_centred_norm_is_the_norm_without_the_mean(seed, scale, shift):
    (x,) = several(seed, 1, scale=scale)
    found = edits.centred_norm(x)
    wide = x.double()
    assert torch.allclose(found.double() ** 2, wide.square().sum(-1, keepdim=True) - D_MODEL * wide.mean(-1, keepdim=True) ** 2, rtol=64 * eps(x.dtype))  # fmt: skip
    moved = edits.centred_norm(x + scale * shift)  # a shift of all dimensions is gone, but for what it rounds off x
    assert ((moved - found).abs() <= tolerance(x.dtype) * edits.norm(x + scale * shift)).all()
    mirror = torch.cat([x, -x], -1)  # no mean: the factor is what the width adds
    for whole in (edits.centred_norm(mirror), edits.norm(mirror)):
        assert torch.allclose(whole, math.sqrt(2) * edits.norm(x), rtol=tolerance(x.dtype), atol=0)
    assert (edits.centred_norm(torch.full((2, D_MODEL), 3.0)) == 0).all()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("RMSNorm", torch.float32),
        ("RMSNorm", torch.bfloat16),
        ("LayerNorm", torch.float64),
        ("LayerNorm", torch.float16),
    ],
    ids=str,
)
def test_norm_read_is_the_divisor_of_a_norm_layer(kind, dtype, device):
    """The layer's output times `norm_read`, over √d, restores the input (without its mean for LayerNorm)."""
    (x,) = several(31, 1, scale=3.0, device=device)
    x = (x + 2.0).to(dtype)
    layer = torch.nn.RMSNorm(D_MODEL, eps=0.0) if kind == "RMSNorm" else torch.nn.LayerNorm(D_MODEL, eps=0.0)
    with torch.no_grad():
        normed = layer.to(device, torch.float64)(x.double())
    read = edits.norm_read(kind, x)
    assert read.shape == (5, 1) and read.dtype == (dtype if dtype == torch.float64 else torch.float32)
    whole = x.double() - (x.double().mean(-1, keepdim=True) if kind == "LayerNorm" else 0.0)
    assert_rows_close(normed * read.double() / math.sqrt(D_MODEL), whole, 16 * eps(read.dtype))


def test_an_unknown_kind_of_norm_raises():
    with pytest.raises(EditError, match="norm kind 'BatchNorm'; known: RMSNorm, LayerNorm"):
        edits.norm_read("BatchNorm", gaussian(0, 2, D_MODEL))


# Rotations


@given(seeds, scales, angles)
def test_rotation_keeps_the_norm_and_turns_by_the_angle(seed, scale, angle):
    x, towards = several(seed, 2, scale=scale)
    turned = edits.rotate_by_angle(x, towards, angle)
    assert torch.allclose(length(turned), length(x), rtol=tolerance(x.dtype), atol=0)
    measured = edits.angle_between(x.double(), turned.double())
    assert (measured - angle).abs().max() <= tolerance(x.dtype)


@given(seeds, st.floats(0.01, 1.5))
def test_rotation_goes_towards_its_target_in_the_plane_of_both(seed, angle):
    x, towards = several(seed, 2, dtype=torch.float64)
    turned = edits.rotate_by_angle(x, towards, angle)
    before, after = edits.angle_between(x, towards), edits.angle_between(turned, towards)
    assert (after - (before - angle).abs()).abs().max() <= 8 * tolerance(x.dtype) / 0.01  # ill-conditioned as 1/angle


def test_rotation_angles_may_be_given_per_row():
    x, towards = several(9, 2, rows=4)
    each = torch.tensor([0.0, 0.1, 1.0, math.pi])
    measured = edits.angle_between(x, edits.rotate_by_angle(x, towards, each))
    assert (measured - each).abs().max() <= tolerance(x.dtype)
    column = edits.rotate_by_angle(x, towards, each[:, None])
    assert torch.equal(column, edits.rotate_by_angle(x, towards, each))


@given(seeds, scales, st.floats(0.0, 1.99))
def test_rotation_by_distance_moves_by_the_chord(seed, scale, fraction):
    x, towards = several(seed, 2, scale=scale)
    chord = fraction * edits.norm(x)
    turned = edits.rotate_by_distance(x, towards, chord)
    assert torch.allclose(length(turned), length(x), rtol=tolerance(x.dtype), atol=0)
    moved = length(turned.double() - x.double())
    assert ((moved - chord.squeeze(-1)).abs() <= tolerance(x.dtype) * length(x)).all()
    assert torch.equal(turned, edits.rotate_by_distance(x, towards, chord.squeeze(-1)))


def test_rotation_beyond_twice_the_norm_is_nonfinite():
    x, towards = several(10, 2, rows=3)
    reach = torch.tensor([1.99, 2.01, 5.0]) * edits.norm(x).squeeze(-1)
    turned = edits.rotate_by_distance(x, towards, reach)
    assert turned[0].isfinite().all()
    assert not turned[1:].isfinite().any()


def test_tangent_is_an_orthogonal_unit_vector():
    x, noise = several(11, 2)
    for towards in (noise, x + 1e-3 * noise, -x + 1e-3 * noise):
        along = edits.tangent(x, towards)
        assert (length(along) - 1).abs().max() <= tolerance(x.dtype)
        assert edits.cosine(x, along).abs().max() <= tolerance(x.dtype)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-4, 1.0, math.pi - 1e-4, math.pi])
def test_angles_are_accurate_near_zero_and_pi(angle):
    basis = torch.eye(2, D_MODEL, dtype=torch.float64)
    x, y = 3 * basis[:1], 7 * (math.cos(angle) * basis[:1] + math.sin(angle) * basis[1:])
    assert abs(edits.angle_between(x, y).item() - angle) <= 4 * eps(torch.float64)
    assert abs(edits.cosine(x, y).item() - math.cos(angle)) <= 4 * eps(torch.float64)


# The matched placebo


def assert_matched(x, edited, placebo):
    tol = 2 * tolerance(x.dtype)
    size = torch.maximum(length(x), length(edited))
    assert torch.allclose(length(placebo), length(edited), rtol=tol, atol=0)
    angle, wanted = (edits.angle_between(x.double(), y.double()) for y in (placebo, edited))
    assert (angle - wanted).abs().max() <= tol
    moved, wanted = (length(y.double() - x.double()) for y in (placebo, edited))
    assert ((moved - wanted).abs() <= tol * size).all()


@given(seeds, scales, st.sampled_from(["swap_direction", "swap_norm", "add", "project_out", "replace"]))
def test_placebo_matches_norm_angle_and_distance(seed, scale, kind):
    x, source, towards = several(seed, 3, scale=scale)
    edited = {
        "swap_direction": lambda: edits.swap_direction(x, source),
        "swap_norm": lambda: edits.swap_norm(x, 3 * source),
        "add": lambda: edits.add_direction(x, source, 0.01),
        "project_out": lambda: edits.project_out(x, source[0]),
        "replace": lambda: edits.replace(x, 20 * source),
    }[kind]()
    assert_matched(x, edited, edits.matched_placebo(x, edited, towards))


@given(seeds, st.sampled_from([1e-4, 1e-3, math.pi - 1e-4, math.pi]))
def test_placebo_matches_nearly_parallel_and_antiparallel_edits(seed, angle):
    x, other, towards = several(seed, 3)
    edited = 1.3 * edits.rotate_by_angle(x, other, angle)
    placebo = edits.matched_placebo(x, edited, towards)
    assert_matched(x, edited, placebo)
    if angle == 1e-4:  # the angle is there, not rounded to none: 16 eps is 2e-6, a fiftieth of it
        assert (edits.angle_between(x.double(), placebo.double()) / angle - 1).abs().max() < 0.05


def test_placebo_of_an_exactly_antiparallel_edit_is_that_edit():
    x, towards = several(12, 2)
    assert_rows_close(edits.matched_placebo(x, -2 * x, towards), -2 * x, tolerance(x.dtype))


def test_placebo_differs_from_the_edit_and_between_directions():
    x, source, one, two = several(13, 4)
    edited = edits.swap_direction(x, source)
    first, second = edits.matched_placebo(x, edited, one), edits.matched_placebo(x, edited, two)
    assert distance(first, edited).min() > 0.1
    assert distance(first, second).min() > 0.1
    assert_rows_close(edits.matched_placebo(x, edited, source), edited, 2 * tolerance(x.dtype))


def test_gaussian_placebos_are_isotropic_around_the_vector():
    rows = 4000
    x = gaussian(14, 1, 8).expand(rows, 8)
    towards = edits.random_like(x, torch.Generator().manual_seed(0))
    along = edits.tangent(x, towards).double()
    second_moment = along.T @ along / rows
    unit = x[0].double() / x[0].double().norm()
    expected = (torch.eye(8, dtype=torch.float64) - torch.outer(unit, unit)) / 7
    # an entry has a standard deviation below 1/7 a row, so 5 of them for the mean of 4000 rows is 0.011
    assert (second_moment - expected).abs().max() < 5 / 7 / math.sqrt(rows)


# Projections


@given(seeds, scales, st.integers(1, 6))
def test_projection_removes_exactly_the_span(seed, scale, k):
    (x,) = several(seed, 1, scale=scale)
    directions = gaussian(seed + 1, k, D_MODEL)
    rest = edits.project_out(x, directions)
    unit = directions.double() / directions.double().norm(dim=-1, keepdim=True)
    size = length(x)[:, None]
    assert ((rest.double() @ unit.T).abs() <= tolerance(x.dtype) * size).all()  # nothing is left in the span
    removed = (x - rest).double()
    inside = torch.linalg.lstsq(unit.T, removed.T).solution.T @ unit
    assert ((removed - inside).norm(dim=-1) <= tolerance(x.dtype) * length(x)).all()  # nothing else was taken
    assert_rows_close(edits.project_out(rest, directions), rest, tolerance(x.dtype))  # idempotent


def test_project_out_accepts_linearly_dependent_rows():
    (x,) = several(17, 1)
    a, b = gaussian(18, 2, D_MODEL)
    once = edits.project_out(x, torch.stack([a, b]))
    for rows in ([a, b, a + b, -2 * a], [a, b, torch.zeros_like(a)], [a, 1e-7 * b], [1e6 * a, b]):
        assert_rows_close(edits.project_out(x, torch.stack(rows)), once, tolerance(x.dtype))
    assert distance(once, edits.project_out(x, a)).min() > 1e-3  # b counts


def test_projection_onto_a_reference_takes_its_component():
    (x,) = several(19, 1, dtype=torch.float64)
    directions, mean = gaussian(20, 3, D_MODEL, dtype=torch.float64), gaussian(21, D_MODEL, dtype=torch.float64)
    projected = edits.project_out(x, directions, mean)
    unit = directions / directions.norm(dim=-1, keepdim=True)
    size = length(x).max() + length(mean)
    assert ((projected - mean) @ unit.T).abs().max() <= tolerance(x.dtype) * size
    assert_rows_close(
        edits.project_out(projected, directions), edits.project_out(x, directions), 4 * tolerance(x.dtype)
    )
    assert torch.equal(projected, edits.project_out(x, directions, mean.expand_as(x)))
    assert torch.equal(edits.project_out(x, directions, 0.0), edits.project_out(x, directions))


# Additions and ablations


def test_coefficients_may_be_given_per_row():
    x = gaussian(24, D_MODEL, D_MODEL)  # as many rows as dimensions: a coefficient a dimension would fit too
    direction = gaussian(25, D_MODEL)
    each = torch.arange(D_MODEL, dtype=torch.float32)
    for coefficient in (each, each[:, None]):
        added = edits.add_direction(x, direction, coefficient)
        assert torch.equal(added, x + each[:, None] * direction)
        assert torch.equal(added, edits.add_direction(x, direction.expand_as(x), coefficient))


def test_rescaling_multiplies_the_norm_and_keeps_the_direction():
    (x,) = several(26, 1, rows=3)
    each = torch.tensor([0.5, 1.0, 8.0])
    scaled = edits.rescale(x, each)
    assert torch.equal(scaled, x * each[:, None])
    assert torch.equal(scaled, edits.rescale(x, each[:, None]))
    assert torch.equal(edits.rescale(x, 1.0), x)


@every_dtype
def test_ablations_give_zero_or_the_mean_or_a_sampled_vector(dtype, device):
    x, sample = several(27, 2, rows=6, dtype=dtype, device=device)
    assert edits.zero(x).dtype == dtype
    assert not edits.zero(x).any()
    mean = edits.mean(x, sample)
    assert mean.dtype == dtype
    assert_rows_close(mean, sample.double().mean(0).expand_as(x).to(dtype), 2 * tolerance(dtype))
    drawn = edits.resample(x, sample, torch.Generator().manual_seed(0))
    assert drawn.dtype == dtype
    assert (drawn[:, None] == sample[None]).all(-1).any(-1).all()


def test_resampling_is_reproducible_and_uniform():
    x, sample = gaussian(28, 30, 200, 4), gaussian(29, 3, 4)
    one, again, other = (edits.resample(x, sample, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert one.shape == x.shape
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    share = torch.stack([(one == vector).all(-1).double().mean() for vector in sample])
    assert (share - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / 6000)  # 5 standard deviations of 6000 draws


def test_draws_are_the_same_on_every_device_and_in_every_dtype(device):
    x, sample = several(30, 2)
    reference = edits.resample(x, sample, torch.Generator().manual_seed(3))
    noise = edits.random_like(x, torch.Generator().manual_seed(3))
    for dtype in (torch.float32, *HALF):
        moved = x.to(device, dtype)
        drawn = edits.resample(moved, sample.to(device), torch.Generator().manual_seed(3))
        assert drawn.device == moved.device
        assert torch.equal(drawn.cpu(), reference.to(dtype))
        assert torch.equal(edits.random_like(moved, torch.Generator().manual_seed(3)).cpu(), noise)


def test_empty_samples_raise():
    x, empty = gaussian(31, 2, D_MODEL), torch.empty(0, D_MODEL)
    with pytest.raises(EditError, match="over 0 activations"):
        edits.mean(x, empty)
    with pytest.raises(EditError, match="from 0 activations"):
        edits.resample(x, empty, torch.Generator())


@settings(max_examples=20)
@given(st.lists(st.integers(1, 3), max_size=3))
def test_rows_may_have_any_number_of_axes(shape):
    x, source, towards = (gaussian(seed, *shape, D_MODEL) for seed in (32, 33, 34))
    flat = [v.reshape(-1, D_MODEL) for v in (x, source, towards)]
    for edit in (
        lambda x, s, t: edits.swap_direction(x, s),
        lambda x, s, t: edits.swap_norm(x, s),
        lambda x, s, t: edits.rotate_by_angle(x, t, torch.full(x.shape[:-1], 0.4)),
        lambda x, s, t: edits.rotate_by_distance(x, t, edits.norm(x) / 2),
        edits.matched_placebo,
        lambda x, s, t: edits.project_out(x, source.reshape(-1, D_MODEL)[0]),
        lambda x, s, t: edits.add_direction(x, s, torch.full(x.shape[:-1], 2.0)),
    ):
        assert_rows_close(edit(x, source, towards).reshape(-1, D_MODEL), edit(*flat), tolerance(x.dtype))


def test_shapes_are_checked_at_run_time():
    """The import hook of conftest checks shapes: a source of another width raises at the call."""
    with pytest.raises(Exception, match="swap_direction"):
        edits.swap_direction(gaussian(35, 2, 8), gaussian(36, 2, 9))
