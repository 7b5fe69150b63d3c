"""Every curve against torch's scheduler or a closed form, and inside its bounds for any length."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)

from lightning_speedups.core.schedules import (
    SHAPES,
    Course,
    OneCycle,
    anneal_between,
    constant,
    cosine,
    cosine_restarts,
    exponential,
    is_cut_off,
    join,
    linear,
    pick_shape,
    polynomial,
    ramp,
    slow_start_fast_decay,
    staircase,
    triangle,
    with_ends,
)


def torch_one_cycle(total, **shape):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0, momentum=0.9)
    shape["anneal_strategy"] = shape.pop("anneal")
    scheduler = OneCycleLR(optimizer, max_lr=0.7, total_steps=total, **shape)
    for _ in range(total):
        yield optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]
        optimizer.step()
        if scheduler.last_epoch < total - 1:
            scheduler.step()


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize(("total", "pct"), [(2, 0.4), (3, 0.45), (10, 0.3), (97, 0.25), (200, 0.5)])
def test_one_cycle_equals_torch_at_every_step(total, pct, three_phase, anneal):
    shape = {
        "pct_start": pct,
        "anneal": anneal,
        "three_phase": three_phase,
        "div_factor": 17.0,
        "final_div_factor": 300.0,
    }
    ours = [OneCycle(**shape).at(step, total, max_lr=0.7) for step in range(total)]
    np.testing.assert_allclose(ours, list(torch_one_cycle(total, **shape)), rtol=1e-9)


def test_one_cycle_begins_at_its_peak_where_torch_divides_by_zero():
    assert OneCycle(pct_start=0.25).at(0, 4, max_lr=0.5) == (0.5, 0.85)


def test_one_cycle_stays_at_its_end_where_torch_climbs_again():
    end = 0.5 / 25 / 1e4
    assert OneCycle().at(9, 10, max_lr=0.5)[0] == pytest.approx(end, rel=1e-9)
    assert OneCycle().at(10, 10, max_lr=0.5) == OneCycle().at(1000, 10, max_lr=0.5) == OneCycle().at(9, 10, max_lr=0.5)


@given(
    st.integers(1, 10**6),
    st.floats(0.001, 0.999),
    st.booleans(),
    st.sampled_from(["cos", "linear"]),
    st.floats(0, 1.2),
)
def test_one_cycle_is_finite_and_inside_its_bounds_for_any_length(total, pct, three_phase, anneal, place):
    pct = pct / 2 if three_phase else pct
    step = int(place * total)
    cycle = OneCycle(pct_start=pct, three_phase=three_phase, anneal=anneal)
    lr, momentum = cycle.at(step, total, max_lr=0.3)
    assert math.isfinite(lr)
    assert 0.3 / 25 / 1e4 * (1 - 1e-6) <= lr <= 0.3 * (1 + 1e-9)
    assert 0.85 - 1e-9 <= momentum <= 0.95 + 1e-9


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"pct_start": 1.0}, "`pct_start` to be a number in (0, 1), but got 1.0."),
        ({"pct_start": 0.6, "three_phase": True}, "`pct_start` to be a number in (0, 0.5], but got 0.6."),
        ({"anneal": "sine"}, "`anneal` to be 'cos' or 'linear', but got 'sine'."),
        ({"div_factor": 0}, "`div_factor`"),
        ({"final_div_factor": -1}, "`final_div_factor`"),
        ({"base_momentum": 1.0}, "`base_momentum`"),
        ({"max_momentum": -0.1}, "`max_momentum`"),
    ],
)
def test_a_cycle_out_of_range_is_refused_and_equal_ones_have_one_hash(arguments, told):
    with pytest.raises(ValueError) as caught:
        OneCycle(**arguments)
    assert told in str(caught.value)
    assert hash(OneCycle(pct_start=0.2)) == hash(OneCycle(pct_start=0.2))


def test_ramp_is_linear_then_constant():
    np.testing.assert_allclose([ramp(t, 5, 0.5, 3.0) for t in range(8)], [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0, 3.0])


def test_ramp_of_no_length_is_at_its_end_at_once():
    assert ramp(0, 0, 0.1, 2.0) == 2.0


@pytest.mark.parametrize("shape", ["cos", "linear"])
def test_annealing_begins_and_ends_where_it_should(shape):
    assert anneal_between(3.0, 1.0, 0.0, shape) == 3.0
    assert anneal_between(3.0, 1.0, 1.0, shape) == 1.0
    assert anneal_between(3.0, 1.0, 0.5, shape) == pytest.approx(2.0)


def torch_factors(make, steps):
    """The factors that a scheduler of torch gives before each step, and after the last one."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = make(optimizer)
    factors = []
    for _ in range(steps + 1):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


SAME_AS_TORCH = {
    "cosine": (cosine, lambda o, total: CosineAnnealingLR(o, total)),
    "cosine, end": (lambda p: cosine(p, 0.2), lambda o, total: CosineAnnealingLR(o, total, eta_min=0.2)),
    "linear": (linear, lambda o, total: LinearLR(o, 1.0, 0.0, total)),
    "linear, end": (lambda p: linear(p, 0.3), lambda o, total: LinearLR(o, 1.0, 0.3, total)),
    "polynomial": (lambda p: polynomial(p, power=3.5), lambda o, total: PolynomialLR(o, total, 3.5)),
    "polynomial, default": (polynomial, lambda o, total: PolynomialLR(o, total, 2.0)),
    "exponential": (lambda p: exponential(p, 0.02), lambda o, total: ExponentialLR(o, 0.02 ** (1 / total))),
}


@pytest.mark.parametrize("total", [1, 2, 7, 60])
@pytest.mark.parametrize("name", SAME_AS_TORCH)
def test_a_shape_equals_torchs_scheduler_at_every_step(name, total):
    shape, make = SAME_AS_TORCH[name]
    factors = torch_factors(lambda optimizer: make(optimizer, total), total)
    np.testing.assert_allclose([shape(t / total) for t in range(total + 1)], factors, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("total", [10, 49, 120])
def test_the_staircase_equals_torchs_multi_step(total):
    milestones = [total // 5, total // 2, total - 1]
    factors = torch_factors(lambda optimizer: MultiStepLR(optimizer, milestones, 0.3), total)
    ours = [staircase(t / total, [m / total for m in milestones], 0.3) for t in range(total + 1)]
    np.testing.assert_allclose(ours, factors, rtol=1e-9)


def test_the_staircase_falls_at_thirds_by_ten():
    np.testing.assert_allclose([staircase(t / 9) for t in range(9)], [1] * 3 + [0.1] * 3 + [0.01] * 3, rtol=1e-12)


@pytest.mark.parametrize(("first", "growth", "cycles"), [(5, 1, 4), (4, 2, 3), (3, 3, 3), (7, 1, 1)])
def test_cosine_restarts_equal_torchs_warm_restarts(first, growth, cycles):
    total = sum(first * growth**i for i in range(cycles))
    factors = torch_factors(lambda o: CosineAnnealingWarmRestarts(o, first, growth, eta_min=0.1), total)
    ours = [cosine_restarts(t / total, 0.1, cycles, growth) for t in range(total + 1)]
    np.testing.assert_allclose(ours[:-1], factors[:-1], rtol=1e-9)
    assert ours[-1] == pytest.approx(0.1)  # torch begins another one
    assert factors[-1] == 1.0


def test_cosine_restarts_may_shrink():
    ours = [cosine_restarts(t / 6, cycles=2, growth=0.5) for t in range(7)]
    np.testing.assert_allclose(ours, [1, 0.8535533906, 0.5, 0.1464466094, 1, 0.5, 0], atol=1e-9)


def test_slow_start_fast_decay_is_a_parabola_and_then_an_exponential():
    places = np.linspace(0, 1, 101)
    rise, fall = 0.3 + 0.7 * (places / 0.4) ** 2, 0.05 ** ((places - 0.4) / 0.6)
    ours = [slow_start_fast_decay(p, end=0.05, start=0.3, rise=0.4) for p in places]
    np.testing.assert_allclose(ours, np.where(places < 0.4, rise, fall), rtol=1e-9)


def test_slow_start_fast_decay_without_a_rise_only_falls():
    assert [slow_start_fast_decay(p, 0.01, rise=0.0) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.1, 0.01])


ENDS = {  # at progress 0 and 1
    "cosine": (1.0, 0.0),
    "linear": (1.0, 0.0),
    "step": (1.0, 0.01),
    "polynomial": (1.0, 0.0),
    "exponential": (1.0, 0.01),
    "trapezoid": (1.0, 1.0),
    "slow_start_fast_decay": (0.1, 0.01),
    "cosine_restarts": (1.0, 0.0),
}


def test_every_shape_is_listed_with_its_ends():
    assert ENDS.keys() == SHAPES.keys()
    for name, ends in ENDS.items():
        assert (SHAPES[name](0.0), SHAPES[name](1.0)) == pytest.approx(ends, abs=1e-12), name


@given(st.floats(0, 1), st.floats(0.001, 1), st.integers(1, 9), st.floats(0.2, 5), st.floats(0.1, 6))
def test_every_shape_is_finite_and_between_0_and_1(progress, end, cycles, growth, power):
    for name, shape in SHAPES.items():
        assert -1e-12 <= shape(progress) <= 1 + 1e-12, name
    for shape in (
        lambda p: cosine_restarts(p, end, cycles, growth),
        lambda p: polynomial(p, end, power),
        lambda p: exponential(p, end),
        lambda p: linear(p, end),
        lambda p: cosine(p, end),
    ):
        assert end * (1 - 1e-9) <= shape(progress) <= 1 + 1e-9
        assert shape(1.0) == pytest.approx(end)
        assert shape(0.0) == pytest.approx(1.0)


def torch_triangle(up, down, mode, gamma, steps):
    return torch_factors(
        lambda optimizer: CyclicLR(optimizer, 0.0, 1.0, up, down, mode, gamma, cycle_momentum=False), steps
    )


@pytest.mark.parametrize(("up", "down"), [(1, 1), (1, 4), (5, 2), (7, 7), (10, 3)])
def test_the_triangle_equals_torchs_cyclic(up, down):
    steps = 5 * (up + down) + 1
    heights, cycles = zip(*(triangle(t, up, down) for t in range(steps + 1)), strict=True)
    np.testing.assert_allclose(heights, torch_triangle(up, down, "triangular", 1.0, steps), atol=1e-9)
    assert list(cycles) == [t // (up + down) for t in range(steps + 1)]


@given(st.floats(0, 1e6), st.floats(0.01, 1e6), st.floats(0.01, 1e6))
@example(0.3 * 3, 0.1, 0.2)  # a whole number of cycles, but for the last digit
@example(6.6499999999999995, 0.1, 0.09)  # just before one, which the division rounds up
def test_the_triangle_stays_between_0_and_1_and_counts_up(position, up, down):
    height, cycle = triangle(position, up, down)
    assert 0.0 <= height <= 1.0 + 1e-9
    assert cycle == pytest.approx(position / (up + down), abs=1 + 1e-6)


@given(st.floats(0.01, 1e6), st.floats(0.01, 1e6), st.integers(0, 50))
def test_the_triangle_is_0_at_the_feet_and_1_at_the_peaks(up, down, cycle):
    foot = cycle * (up + down)
    slack = 1e-9 * (1 + cycle) * (up + down) / min(up, down)
    assert triangle(foot, up, down)[0] == pytest.approx(0.0, abs=slack)
    assert triangle(foot + up, up, down)[0] == pytest.approx(1.0, abs=slack)


lengths = st.integers(1, 10**6)
factor = st.floats(0, 1)
named = st.sampled_from(sorted(SHAPES))


@given(lengths, named, st.floats(0, 1), st.floats(0, 1), factor, factor, st.floats(0, 1.5))
def test_a_curve_with_ends_is_finite_and_inside_its_bounds(total, name, warmup, cooldown, start, end, place):
    assume(warmup + cooldown <= 1)
    pieces = with_ends(SHAPES[name], total, warmup * total, start, cooldown * total, end)
    value = join(place * total, pieces)
    assert math.isfinite(value)
    assert -1e-9 <= value <= 1 + 1e-9
    assert join(int(place * total), pieces) <= 1 + 1e-9


@given(lengths, named, st.floats(0.01, 0.98), st.floats(0.01, 0.98), factor, factor)
def test_a_curve_with_ends_is_right_at_its_ends_and_joints(total, name, warmup, cooldown, start, end):
    assume(warmup + cooldown <= 0.99)
    shape = SHAPES[name]
    up, down = warmup * total, cooldown * total
    pieces = with_ends(shape, total, up, start, down, end)
    assert sum(length for length, _ in pieces) == pytest.approx(total)
    assert join(0, pieces) == pytest.approx(start)
    assert join(up / 2, pieces) == pytest.approx((start + shape(0.0)) / 2)
    assert join(up, pieces) == pytest.approx(shape(0.0), abs=1e-9)
    assert join(up + (total - up - down) * 0.4, pieces) == pytest.approx(shape(0.4), abs=1e-6)
    assert join(total - down, pieces) == pytest.approx(shape(1.0), abs=1e-9)
    assert join(total - down / 2, pieces) == pytest.approx((shape(1.0) + end) / 2, abs=1e-9)
    for past in (total, total + 1, 3 * total):
        assert join(past, pieces) == pytest.approx(end, abs=1e-9)


@given(lengths, named, factor)
def test_without_ends_it_is_the_shape_alone(total, name, place):
    pieces = with_ends(SHAPES[name], total, 0, 0.5, 0, 0.5)
    assert len(pieces) == 1
    assert join(place * total, pieces) == pytest.approx(SHAPES[name](place), abs=1e-6)


@given(lengths, st.floats(0, 1))
def test_ends_that_leave_nothing_between_meet_at_the_shapes_ends(total, warmup):
    pieces = with_ends(constant, total, warmup * total, 0.5, total - warmup * total, 0.25)
    if warmup * total < total:
        assert join(total, pieces) == pytest.approx(0.25, abs=1e-6)
    assert join(warmup * total, pieces) == pytest.approx(1.0, abs=1e-6)


@given(st.lists(st.floats(0.1, 1e5), min_size=1, max_size=6), st.floats(0, 1.3))
def test_join_gives_each_piece_its_own_progress(sizes, place):
    seen = []
    pieces = [(size, lambda p, i=i: seen.append((i, p)) or i + p) for i, size in enumerate(sizes)]
    value = join(place * sum(sizes), pieces)
    ((piece, progress),) = seen
    assert 0.0 <= progress <= 1.0
    assert value == piece + progress
    assert sum(sizes[:piece]) + progress * sizes[piece] == pytest.approx(min(place, 1.0) * sum(sizes), abs=1e-6)


def test_at_a_joint_the_next_piece_holds():
    pieces = [(2, lambda p: 10 + p), (3, lambda p: 20 + p), (5, lambda p: 30 + p)]
    assert [join(t, pieces) for t in (0, 1, 2, 5, 10, 11)] == [10, 10.5, 20, 30, 31, 31]


def test_a_piece_of_no_length_is_passed_over_and_one_below_0_lets_the_next_begin_earlier():
    rise, fall = (lambda p: 10 + p), (lambda p: 20 + p)
    assert [join(t, [(0, rise), (4, fall)]) for t in (0, 1, 4)] == [20, 20.25, 21]
    assert [join(t, [(-1, rise), (4, fall)]) for t in (0, 1, 3)] == [20.25, 20.5, 21]


@given(lengths, lengths, st.floats(0, 1), st.floats(0, 1))
def test_an_extended_course_has_no_jump_and_ends_at_the_new_total(length, total, at, between):
    step = int(at * min(length, total - 1))
    first = Course(length, length)
    longer = first.extended(step, total)
    assert longer.position(step) == pytest.approx(first.position(step))
    assert longer.position(total) == longer.position(total + 7) == length
    middle = step + int(between * (total - step))
    assert step <= longer.position(middle) * (1 + 1e-9) or middle < step
    assert longer.position(middle) <= longer.position(middle + 1) * (1 + 1e-9) <= length * (1 + 1e-9)
    again = longer.extended(middle, total + 5)
    assert again.position(middle) == pytest.approx(longer.position(middle))
    assert again.position(total + 5) == length


@given(lengths, st.integers(0, 2 * 10**6))
def test_a_course_of_its_own_length_is_the_step_itself(length, step):
    assert Course(length, length).position(step) == min(step, length)


def test_a_course_extended_past_its_new_total_stands_at_the_end():
    shorter = Course(10, 10).extended(8, total=6)
    assert [shorter.position(t) for t in (8, 9, 20)] == [10, 10, 10]


def test_a_course_of_no_length_stands_at_its_end():
    assert Course(0, 0).position(0) == 0
    assert Course(0, 0).extended(0, 4).position(2) == 0


@given(lengths, st.booleans())
def test_one_cycle_begins_peaks_and_ends_where_it_should(total, three_phase):
    assume(total >= 20)
    cycle = OneCycle(pct_start=0.4, three_phase=three_phase)
    assert cycle.at(0, total, max_lr=0.5) == pytest.approx((0.02, 0.95))
    assert cycle.at(0.4 * total - 1, total, max_lr=0.5) == pytest.approx((0.5, 0.85))
    if three_phase:
        assert cycle.at(0.8 * total - 2, total, max_lr=0.5) == pytest.approx((0.02, 0.95))
    assert cycle.at(total - 1, total, max_lr=0.5) == pytest.approx((2e-6, 0.95))


def test_a_picked_shape_has_the_options_it_was_given():
    assert pick_shape("step", {"milestones": [0.5], "gamma": 0.2})(0.5) == 0.2
    assert pick_shape("polynomial", {"end": 0.5, "power": 1.0})(0.5) == 0.75
    assert pick_shape(math.cos, {})(0.0) == 1.0


@pytest.mark.parametrize(
    ("shape", "options", "told"),
    [
        ("sine", {}, "`shape` to be a function or one of cosine, linear"),
        ("linear", {"power": 2.0}, r"options of shape 'linear' to be of \['end'\], but got \['power'\]"),
        ("linear", [2.0], "`options` to be a dict"),
        (math.cos, {"end": 0.1}, "no `options` or `end_factor` for your own `shape`"),
        ("polynomial", {"power": 0.0}, r"`options\['power'\]` to be a number above 0, but got 0.0"),
        ("step", {"milestones": [0.6, 0.5]}, "rising fractions"),
        (lambda p: 0.5 - p, {}, "finite factors of 0 or more, but at progress 0.51"),
        (lambda p: 1 / (p - 0.5), {}, "finite factors of 0 or more, but at progress 0.0"),
    ],
)
def test_what_is_no_shape_is_refused(shape, options, told):
    with pytest.raises(ValueError, match=told):
        pick_shape(shape, options)


# ---- schedulers of torch's in runs that are shorter than they were told


def one(make):
    return make(torch.optim.SGD([torch.zeros(1)], lr=1.0))


def table(steps):
    return lambda optimizer: LambdaLR(optimizer, [1 / (1 + step) for step in range(steps)].__getitem__)


class OfTheirOwn(torch.optim.lr_scheduler.LRScheduler):
    def __init__(self, optimizer, horizon):
        self.horizon = horizon
        super().__init__(optimizer)

    def get_lr(self):
        return self.base_lrs


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda o: MultiStepLR(o, [30, 65]), True),
        (lambda o: MultiStepLR(o, [30, 50]), False),
        (lambda o: MultiStepLR(o, [30, 200]), False),  # which never came to that anyhow
        (lambda o: CosineAnnealingLR(o, 100), True),
        (lambda o: CosineAnnealingLR(o, 60), False),
        (lambda o: CosineAnnealingLR(o, 7), False),
        (lambda o: ExponentialLR(o, 0.9), False),
        (lambda o: ChainedScheduler([LinearLR(o, 0.1, total_iters=5), PolynomialLR(o, 100)]), True),
        (lambda o: ChainedScheduler([LinearLR(o, 0.1, total_iters=5), ExponentialLR(o, 0.9)]), False),
        (lambda o: SequentialLR(o, [PolynomialLR(o, 70), ExponentialLR(o, 0.9)], [70]), True),
        (lambda o: SequentialLR(o, [PolynomialLR(o, 40), ExponentialLR(o, 0.9)], [40]), False),
        (lambda o: SequentialLR(o, [PolynomialLR(o, 40), CosineAnnealingLR(o, 20)], [40]), False),
        (lambda o: SequentialLR(o, [PolynomialLR(o, 40), CosineAnnealingLR(o, 60)], [40]), True),
        (lambda o: SequentialLR(o, [ExponentialLR(o, 0.9), table(61)(o)], [40]), True),
        (table(100), True),
        (table(60), False),
        (lambda o: OfTheirOwn(o, 100), True),
        (lambda o: OfTheirOwn(o, 60), False),
        (lambda o: LambdaLR(o, lambda step: 0.5 * (1 + math.cos(math.pi * step / 100))), True),
        (lambda o: LambdaLR(o, lambda step: 1 - step / 100), True),
        (lambda o: LambdaLR(o, lambda step: min((step + 1) ** -0.5, (step + 1) * 10**-1.5)), False),  # never ends
        (lambda o: LambdaLR(o, lambda step: 0.99**step), False),
    ],
)  # fmt: skip
def test_a_scheduler_is_cut_off_if_it_would_end_between_the_true_and_the_told_number_of_steps(make, expected):
    assert is_cut_off(one(make), 60, told=100) is expected
    assert is_cut_off(one(make), 60, told=60) is False
