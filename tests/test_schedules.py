"""Learning rate, momentum and late QAT over whole imagined runs, step by step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plan
from train_gpt import Config, Moment, Refusal, Schedule, decay_scale


def imagine(cfg: Config, step_seconds, reserve: float = 0.0) -> list[Moment]:
    """What the schedules say at each step of a run whose step n takes step_seconds(n)."""
    schedule, seconds, moments = Schedule(cfg, reserve), 0.0, []
    while not moments or not moments[-1].done:
        schedule.observe(len(moments), seconds)
        moments.append(schedule.at(len(moments), seconds))
        assert schedule.at(len(moments) - 1, seconds) == moments[-1]  # asking changes nothing
        seconds += step_seconds(len(moments) - 1)
    return moments[:-1]


def scales(cfg: Config, step_seconds=lambda n: 1.0, reserve: float = 0.0) -> list[float]:
    """The learning-rate scale of each step."""
    return [moment.lr_scale for moment in imagine(cfg, step_seconds, reserve)]


def clocked(**changes: object) -> Config:
    """A run of 600 s."""
    return Config(**{"max_wallclock_seconds": 600.0, "warmdown_iters": 200, **changes})


def stepped(**changes: object) -> Config:
    """A run of 100 steps without a clock."""
    return Config(
        **{"max_wallclock_seconds": 0.0, "iterations": 100, "warmdown_iters": 40, **changes}
    )


@pytest.mark.parametrize(
    ("remaining", "warmdown", "linear"),
    [
        (10, 5, 1),
        (5, 5, 1),
        (4, 5, 0.8),
        (2.5, 5, 0.5),
        (0, 5, 0),
        (-1, 5, 0),
        (3, 0, 1),
        (0, 0, 1),
        (6, 1e9, 6e-9),
    ],
)
def test_decay_is_linear_or_half_a_cosine(remaining: float, warmdown: float, linear: float) -> None:
    assert decay_scale(remaining, warmdown, "linear") == pytest.approx(linear)
    cosine = (1 - math.cos(math.pi * linear)) / 2
    assert decay_scale(remaining, warmdown, "cosine") == pytest.approx(cosine)


@given(
    step_seconds=st.floats(0.01, 40),
    reserve=st.floats(0, 300),
    warmdown_iters=st.integers(0, 10**5),
    warmdown_frac=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    warmdown_type=st.sampled_from(["linear", "cosine"]),
    budget=st.sampled_from([0.0, 600.0]),
    iterations=st.integers(1, 300),
)
@settings(deadline=None, max_examples=60)
def test_the_rate_never_rises_at_a_steady_pace(
    step_seconds: float, reserve: float, budget: float, **changes: object
) -> None:
    moments = imagine(
        Config(max_wallclock_seconds=budget, **changes), lambda n: step_seconds, reserve
    )
    rates = [moment.lr_scale for moment in moments]
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(after <= before + 1e-9 for before, after in zip(rates, rates[1:], strict=False))
    assert sorted(moment.qat for moment in moments) == [moment.qat for moment in moments]
    if budget and len(moments) > 6:  # the time of a step is known: the last one ends in time
        assert len(moments) * step_seconds <= budget - reserve + 1e-6


def test_a_run_of_steps_decays_over_its_last_steps() -> None:
    assert scales(stepped()) == pytest.approx([1.0] * 60 + [n / 40 for n in range(40, 0, -1)])
    assert scales(stepped(warmdown_frac=0.2))[79:82] == pytest.approx([1.0, 1.0, 0.95])


def test_a_run_by_the_clock_decays_over_its_last_steps() -> None:
    rates = scales(clocked())
    assert len(rates) in (599, 600)
    assert rates == pytest.approx([min(1, (600 - n) / 200) for n in range(len(rates))])


def test_a_share_of_the_budget_needs_no_step_time() -> None:
    for pace in (0.2, 7.0):
        rates = scales(clocked(warmdown_frac=0.5), lambda n, pace=pace: pace)
        assert rates == pytest.approx([min(1, (600 - n * pace) / 300) for n in range(len(rates))])


def test_what_calibration_keeps_back_is_not_trained_in() -> None:
    rates = scales(clocked(), reserve=50.0)
    assert len(rates) in (549, 550)
    assert rates == pytest.approx([min(1, (550 - n) / 200) for n in range(len(rates))])


@pytest.mark.parametrize("slow_steps", [1, 2])
@pytest.mark.parametrize("slow", [1.0, 5.0, 60.0])
def test_slow_first_steps_change_nothing(slow: float, slow_steps: int) -> None:
    """The published rule would take a first step of 5 s for the end of the run."""
    moments = imagine(clocked(warmdown_iters=3500), lambda n: slow if n < slow_steps else 0.1)
    steps_before = slow_steps + round((600 - slow * slow_steps) / 0.1) - 3500
    assert all(moment.lr_scale == 1.0 for moment in moments[: steps_before - 1])
    assert moments[steps_before + 5].lr_scale < 1.0
    late = sum(moment.qat for moment in moments)
    assert late == pytest.approx(0.15 * 3500, abs=3)


def test_a_pause_in_the_middle_does_not_end_the_run() -> None:
    moments = imagine(clocked(warmdown_iters=3500), lambda n: 20.0 if n == 500 else 0.1)
    assert moments[501].lr_scale == 1.0
    assert not moments[501].qat


@pytest.mark.parametrize("pace", [2.0, 30.0])
def test_a_machine_too_slow_for_its_warmdown_decays_all_along(pace: float) -> None:
    """3,500 steps do not fit; the warmdown is then the run, not longer."""
    moments = imagine(clocked(warmdown_iters=3500), lambda n: pace)
    expected = [1.0 - n * pace / 600 for n in range(len(moments))]
    assert [m.lr_scale for m in moments[5:]] == pytest.approx(expected[5:])
    assert [m.qat for m in moments[5:]] == [scale < 0.15 for scale in expected[5:]]


@pytest.mark.parametrize(
    "warmdown", [{"warmdown_iters": 40}, {"warmdown_iters": 3500}, {"warmdown_frac": 0.4}]
)
def test_iterations_that_end_before_the_clock_decay_to_nothing(warmdown: dict) -> None:
    """A run of 100 s, whatever its budget: it decays at its own end, and over no more than it."""
    rates = scales(clocked(iterations=100, **warmdown))
    assert len(rates) == 100
    assert rates[-1] <= 1 / 40 + 1e-9
    whole = 40 if warmdown != {"warmdown_iters": 3500} else 100
    assert rates[5:] == pytest.approx([min(1.0, (100 - n) / whole) for n in range(5, 100)])


def test_late_qat_stays_on() -> None:
    """A run that speeds up has more steps ahead than it thought, and its rate rises again."""
    moments = imagine(clocked(), lambda n: 4.0 if n < 142 else 0.01)
    rates = [moment.lr_scale for moment in moments]
    first = next(n for n, moment in enumerate(moments) if moment.qat)
    assert max(rates[first:]) > 0.15
    assert all(moment.qat for moment in moments[first:])
    assert not any(moment.qat for moment in imagine(clocked(qat_mode="off"), lambda n: 4.0))


def test_momentum_ramps_and_stays() -> None:
    cfg = stepped(muon_momentum_warmup_steps=20, muon_momentum_warmup_start=0.5, muon_momentum=0.9)
    momenta = [moment.momentum for moment in imagine(cfg, lambda n: 1.0)]
    assert momenta == pytest.approx([0.5 + 0.02 * min(n, 20) for n in range(100)])
    at_once = imagine(stepped(muon_momentum_warmup_steps=0), lambda n: 1.0)
    assert {moment.momentum for moment in at_once} == {0.99}


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5, 1.0])
def test_rates_have_a_floor_and_switches_do_not(floor: float, shape: str) -> None:
    """Late QAT, SWA and MiLe come when they come without it."""
    choices = {"warmdown_type": shape, "swa_every": 1, "mile_gamma": 1.0}
    plain = imagine(stepped(**choices), lambda n: 1.0)
    floored = imagine(stepped(min_lr=floor, **choices), lambda n: 1.0)
    assert [m.lr_scale for m in floored] == [max(m.lr_scale, floor) for m in plain]
    assert [replace(m, lr_scale=0.0) for m in floored] == [replace(m, lr_scale=0.0) for m in plain]
    assert any(moment.qat for moment in floored)
    points = dict(plan.turning_points(stepped(min_lr=floor, **choices)))
    if 0 < floor < 1:
        reached = next(n for n, m in enumerate(floored) if m.lr_scale == floor)
        assert reached == pytest.approx(100 - 40 * points[f"rate floor of {floor:g}"], abs=1)


@given(
    cooldown=st.floats(0, 1),
    ramp=st.integers(0, 150),
    budget=st.sampled_from([0.0, 100.0]),
    reserve=st.floats(0, 90),
)
@settings(deadline=None, max_examples=60)
def test_momentum_cools_down_to_where_it_began(
    cooldown: float, ramp: int, budget: float, reserve: float
) -> None:
    cfg = stepped(
        max_wallclock_seconds=budget,
        muon_momentum_warmup_steps=ramp,
        muon_momentum_warmup_start=0.85,
        muon_momentum=0.95,
        muon_momentum_cooldown_frac=cooldown,
    )
    reserve = reserve if budget else 0.0  # nothing is kept back of a run of steps
    whole = budget - reserve if budget else 100.0
    momenta = [moment.momentum for moment in imagine(cfg, lambda n: 1.0, reserve)]
    for n, momentum in enumerate(momenta):
        risen = min(n / ramp, 1.0) if ramp else 1.0
        left = (whole - n) / whole
        fallen = min(max(left, 0.0) / cooldown, 1.0) if cooldown else 1.0
        assert momentum == pytest.approx(0.85 + 0.1 * risen * fallen, abs=1e-9)


@pytest.mark.parametrize(("start", "first"), [(0.0, 0), (0.4, 40), (1.0, None)])
@pytest.mark.parametrize("of", [stepped, clocked])
def test_the_slower_momentum_counts_from_its_share_of_the_run_on(
    start: float, first: int | None, of
) -> None:
    cfg = of(iterations=100, muon_slow_share=0.5, muon_slow_start_frac=start)
    shares = [moment.slow_share for moment in imagine(cfg, lambda n: 6.0)]
    begins = next((n for n, share in enumerate(shares) if share), None)
    assert begins == first
    assert all(share == 0.5 * (first is not None and n >= first) for n, share in enumerate(shares))
    assert not any(moment.slow_share for moment in imagine(of(iterations=100), lambda n: 6.0))


def test_a_run_ends_at_its_first_limit() -> None:
    assert len(imagine(clocked(), lambda n: 0.7)) == math.floor(600 / 0.7)
    assert len(imagine(clocked(iterations=30), lambda n: 0.7)) == 30
    assert len(imagine(stepped(), lambda n: 1e6)) == 100
    assert len(imagine(stepped(iterations=1), lambda n: 1.0)) == 1


def test_mile_fades_to_cross_entropy_at_its_rate_scale() -> None:
    moments = imagine(stepped(warmdown_iters=100, mile_gamma=1.1), lambda n: 1.0)
    for moment in moments:
        expected = 1.1 * max(moment.lr_scale - 0.15, 0.0) / 0.85
        assert moment.mile_gamma == pytest.approx(expected)
    assert moments[0].mile_gamma == pytest.approx(1.1)
    assert moments[-1].mile_gamma == 0.0
    assert all(moment.mile_gamma == 0.0 for moment in imagine(stepped(), lambda n: 1.0))


@pytest.mark.parametrize(
    ("every", "start", "count"),
    [(1, 0.4, 16), (5, 0.4, 4), (7, 0.2, 1), (50, 0.01, 0), (1, 1.0, 39)],
)
def test_snapshots_come_every_so_often_below_their_rate_scale(
    every: int, start: float, count: int
) -> None:
    """Counted in finished steps: step n has scale (100 - n) / 40 before it."""
    moments = imagine(stepped(swa_every=every, swa_start_frac=start), lambda n: 1.0)
    taken = [n + 1 for n, moment in enumerate(moments) if moment.snapshot]
    naive = [n for n in range(1, 101) if min(1, (101 - n) / 40) < start and n % every == 0]
    assert taken == naive
    assert len(taken) == pytest.approx(count, abs=1)


@given(
    warmdown=st.integers(1, 100),
    threshold=st.floats(0.01, 1.0),
    shape=st.sampled_from(["linear", "cosine"]),
)
@settings(deadline=None, max_examples=60)
def test_what_starts_at_a_rate_scale_starts_when_it_is_said_to(
    warmdown: int, threshold: float, shape: str
) -> None:
    cfg = stepped(warmdown_iters=warmdown, late_qat_threshold=threshold, warmdown_type=shape)
    left = dict(plan.turning_points(cfg))["late QAT"] * warmdown
    moments = imagine(cfg, lambda n: 1.0)
    for n, moment in enumerate(moments):
        if abs(100 - n - left) > 1e-6:
            assert moment.qat == (100 - n < left)


@given(
    iterations=st.integers(5, 300),
    stages=st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True),
    rise=st.integers(0, 40),
)
@settings(deadline=None)
def test_documents_grow_by_stages_and_rates_rise_again_after_each(
    iterations: int, stages: list[int], rise: int
) -> None:
    """By the rule of #2014: a stage up to and with its share, then a rise over some steps."""
    shares = [percent / 100 for percent in sorted(stages)]
    growth = ",".join(f"{share}:{100 + n}" for n, share in enumerate(shares))
    cfg = stepped(
        iterations=iterations,
        attn_docs=True,
        doc_growth=growth,
        doc_growth_steps=rise,
        warmdown_iters=0,
    )
    expected, begun = [], None
    for step in range(iterations):
        stage = sum(step / iterations > share for share in shares)
        if expected and stage != expected[-1][2]:
            begun = step
        factor = 1.0
        if begun is not None and step - begun < rise:
            factor = (step - begun) / rise
        length = 100 + stage if stage < len(shares) else cfg.train_seq_len
        expected.append((length, factor, stage))
    found = [(moment.longest_document, moment.lr_scale) for moment in imagine(cfg, lambda n: 1.0)]
    assert found == [(length, factor) for length, factor, _ in expected]


def test_documents_never_shrink_again_and_grow_only_where_attention_keeps_to_them() -> None:
    cfg = clocked(attn_docs=True, doc_growth="0.1:1024", doc_growth_steps=4)
    schedule = Schedule(cfg)
    assert schedule.at(0, 60.0).longest_document == 1024
    assert schedule.at(0, 60.1).longest_document == 2048
    schedule.observe(646, 60.1)
    assert schedule.at(648, 10.0).longest_document == 2048
    assert schedule.at(648, 10.0).lr_scale == 0.5
    assert list(plan.dates(cfg)) == [("documents of up to 2,048 tokens", 0.1)]
    plain = Schedule(replace(cfg, attn_docs=False))
    assert plain.at(646, 60.1).lr_scale == 1.0
    assert "short_documents" not in plain.acting(plain.at(0, 0.0))


@pytest.mark.parametrize(
    "growth", ["0.1", "1.1:5", "0.1:5000", "0.5:64,0.2:128", "0.2:128,0.5:64", "0.1:0", "0.1:5,"]
)
def test_documents_that_do_not_grow_are_refused(growth: str) -> None:
    with pytest.raises(Refusal, match="DOC_GROWTH"):
        stepped(doc_growth=growth)


def test_qat_that_is_always_on_and_never() -> None:
    assert all(moment.qat for moment in imagine(stepped(qat_mode="always"), lambda n: 1.0))
    assert not any(moment.qat for moment in imagine(stepped(qat_mode="off"), lambda n: 1.0))
