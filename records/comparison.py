"""Is B better than A, or is it luck of seeds? Entries and plain run folders, in plain words."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tracks
from reading import Run, Wrong, common_settings, portable, read_any, seed_facts, shown

MARGIN_NATS = 0.005  # by which the challenge's README asks a record to be better
INSTALL_SCIPY = "pip install scipy (requirements-dev.txt has it)"
SETTINGS_SHOWN = 12


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: runs that differ in their seeds alone."""

    name: str
    runs: list[Run]
    facts: dict[int, dict]  # seed to seed_facts

    @property
    def text(self) -> str:
        """The validation text that was scored."""
        return tracks.text_of(self.runs[0].one("val_data").get("fingerprint"))

    @property
    def fingerprint(self) -> str:
        """The split that was scored: the text, and the tokenizer that cut it."""
        return str(self.runs[0].one("val_data").get("fingerprint"))

    @property
    def machine(self) -> str:
        """What it ran on."""
        machine = self.runs[0].one("machine")
        return f"{machine.get('world_size')} x {machine.get('name')} ({machine.get('device')})"

    def mean(self, key: str) -> float:
        """Mean of a fact over the seeds."""
        return statistics.fmean(facts[key] for facts in self.facts.values())

    def has(self, key: str) -> bool:
        """Whether all its runs measured a fact."""
        return all(key in facts for facts in self.facts.values())


def side_of(name: str, runs: Sequence[Run]) -> Side:
    """Runs as one side; raises Wrong if one has not ended, or a seed stands twice."""
    facts = {run.seed: seed_facts(run) for run in runs}
    if len(facts) < len(runs):
        raise Wrong(f"{name}: a seed stands twice among {sorted(run.seed for run in runs)}")
    return Side(name, list(runs), facts)


def recipe_of(run: Run) -> tuple:
    """What runs of one side share: settings, script and data."""
    settings = portable(common_settings(run.settings))
    source, data = run.one("source"), run.one("val_data")
    return source.get("sha256"), data.get("fingerprint"), repr(sorted(settings.items()))


def sides(folders: Sequence[Path]) -> tuple[Side, Side]:
    """Two folders as they are; of more, runs that differ in SEED alone are one side.

    Raises Wrong if that does not give two sides.
    """
    read = [(folder, read_any(folder)) for folder in folders]
    if len(read) == 2:
        (first, runs_of_first), (second, runs_of_second) = read
        return side_of(first.name, runs_of_first), side_of(second.name, runs_of_second)
    groups: dict[tuple, list[tuple[Path, Run]]] = {}
    for folder, runs in read:
        for run in runs:
            groups.setdefault(recipe_of(run), []).append((folder, run))
    if len(groups) != 2:
        raise Wrong(
            f"these {len(folders)} folders have {len(groups)} different recipes (settings but "
            "SEED, script, data), expected 2: a side is runs that differ in SEED alone"
        )
    found = []
    for group in groups.values():
        names = list(dict.fromkeys(folder.name for folder, _ in group))
        name = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        found.append(side_of(name, [run for _, run in group]))
    return found[0], found[1]


@dataclass(frozen=True)
class Difference:
    """B minus A in one unit; less is better."""

    paired: bool
    count: int
    mean: float
    interval: tuple[float, float] | None = None  # 95 %; None where nothing can be said
    p_better: float | None = None  # one-sided: chance made B look better and it is not
    p_by_margin: float | None = None  # the same for "better by the margin"
    unsaid: str = ""  # why there is no interval


def scores_of(a: Side, b: Side, unit: str) -> tuple[dict[int, float], dict[int, float]]:
    """Scores by seed of both sides; where tokenizers differ, a token is one of A's."""
    of_a = {seed: facts[unit] for seed, facts in a.facts.items()}
    of_b = {seed: facts[unit] for seed, facts in b.facts.items()}
    if unit == "val_loss" and a.fingerprint != b.fingerprint:
        nats_a_bit = a.mean("val_loss") / a.mean("val_bpb")
        of_b = {seed: facts["val_bpb"] * nats_a_bit for seed, facts in b.facts.items()}
    return of_a, of_b


def difference(a: dict[int, float], b: dict[int, float], margin: float = 0.0) -> Difference:
    """Paired t-test over common seeds if there are two or more, else Welch's t-test (scipy)."""
    common = sorted(set(a) & set(b))
    paired = len(common) >= 2 or len(common) == len(a) == len(b)
    before = [a[seed] for seed in common] if paired else list(a.values())
    after = [b[seed] for seed in common] if paired else list(b.values())
    count = len(before) if paired else len(before) + len(after)
    mean = statistics.fmean(after) - statistics.fmean(before)
    if min(len(before), len(after)) < 2:
        return Difference(paired, count, mean, unsaid="one run a side says nothing about luck")
    if paired:
        scatter = {round(new - old, 12) for old, new in zip(before, after, strict=True)}
    else:
        scatter = {*before, *after}
    if len(scatter) == 1:
        return Difference(
            paired, count, mean, unsaid="the seeds do not scatter: these are no independent runs"
        )
    try:
        from scipy import stats
    except ImportError:
        return Difference(paired, count, mean, unsaid=f"the interval needs {INSTALL_SCIPY}")

    def test(shift: float, alternative: str):
        moved = [value + shift for value in after]
        if paired:
            return stats.ttest_rel(moved, before, alternative=alternative)
        return stats.ttest_ind(moved, before, equal_var=False, alternative=alternative)

    interval = test(0.0, "two-sided").confidence_interval(0.95)
    return Difference(
        paired,
        count,
        mean,
        (float(interval.low), float(interval.high)),
        float(test(0.0, "less").pvalue),
        float(test(margin, "less").pvalue),
    )


def verdict(found: Difference) -> str:
    """One line: which side is better, or why nobody can tell."""
    if found.interval is None:
        return f"Nobody can tell from these runs which is better: {found.unsaid}."
    low, high = found.interval
    if high < 0:
        return f"B is better: chance alone would rarely give {found.count} such runs."
    if low > 0:
        return f"A is better: chance alone would rarely give {found.count} such runs."
    return "Nobody can tell from these runs which is better: the difference may be luck of seeds."


def describe(letter: str, side: Side) -> str:
    """One line of a side's means."""
    seeds = len(side.facts)
    words = f"the mean of {seeds} seeds" if seeds > 1 else f"seed {next(iter(side.facts))} alone"
    work = f"{side.mean('tflops'):,.4g} TFLOP, " if side.has("tflops") else ""
    return (
        f"{letter}  {side.name}: {side.mean('val_bpb'):.6f} bits per byte, {words}; "
        f"{side.mean('steps'):,.0f} steps, {work}{side.mean('train_s'):,.1f} s of training, "
        f"{side.mean('artifact_bytes'):,.0f} bytes of artifact"
    )


def changed_settings(a: Side, b: Side) -> list[str]:
    """The settings in which the sides differ, one line each."""
    before, after = (portable(common_settings(side.runs[0].settings)) for side in (a, b))
    lines = [
        f"  {name.upper()}: {shown(before.get(name, '-'))} in A, {shown(after.get(name, '-'))} in B"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    if a.runs[0].one("source").get("sha256") != b.runs[0].one("source").get("sha256"):
        lines.insert(0, "  train_gpt.py: another script in B")
    more = len(lines) - SETTINGS_SHOWN
    return [*lines[:SETTINGS_SHOWN], *([f"  and {more} settings more"] if more > 0 else [])]


def what_challenge_asks(nats: Difference) -> list[str]:
    """The thresholds of the challenge, in its own unit."""
    if nats.p_by_margin is None or nats.p_better is None:
        return []
    by_margin = "met" if nats.p_by_margin < 0.01 else "not met"
    better = "met" if nats.p_better < 0.25 else "not met"
    direction = "lower" if nats.mean < 0 else "higher"
    return [
        "",
        "What the challenge asks, in its own unit: the loss in nats a token (a nat is 1.44 bits; "
        f"a token is a piece of the tokenizer), here {abs(nats.mean):.6f} {direction} for B. p is "
        "how often luck alone would give B such a lead if it had none: 0.01 is once in a hundred.",
        f"  README of the challenge, better by {MARGIN_NATS} nats at p < 0.01: {by_margin} "
        f"(p = {nats.p_by_margin:.3g}).",
        "  Practice since, better than the best entry of its day at p < 0.25: "
        f"{better} (p = {nats.p_better:.3g}).",
    ]


def words(a: Side, b: Side) -> str:
    """Two sides in words that take no statistics to read, the verdict first."""
    if a.facts == b.facts:
        return f"A and B are the same runs ({a.name}, {len(a.facts)} seeds)."
    if a.text != b.text:
        raise Wrong(
            f"A was scored on the text {a.text[:12]}, B on {b.text[:12]}: their scores do not "
            "compare"
        )
    bpb = difference(*scores_of(a, b, "val_bpb"))
    nats = difference(*scores_of(a, b, "val_loss"), margin=MARGIN_NATS)
    lines = [verdict(bpb)]
    if a.machine != b.machine and not (a.has("tflops") and b.has("tflops")):
        lines.append(
            f"warning: A ran on {a.machine}, B on {b.machine}: machines make different numbers of "
            "steps in the same time, and the difference has that in it"
        )
    how = f"Over {bpb.count} runs, with different seeds on the two sides"
    if bpb.paired:
        how = f"Over the {bpb.count} seeds that both have" if bpb.count > 1 else "On the same seed"
    lines += [
        "",
        describe("A", a),
        describe("B", b),
        "Bits per byte is what a byte of text costs under the model; less is better.",
        f"{how}, B is {'lower' if bpb.mean < 0 else 'higher'} on average by "
        f"{abs(bpb.mean):.6f} bits per byte.",
    ]
    if bpb.interval is not None:
        low, high = bpb.interval
        lines.append(
            "Each seed has its luck. With many more seeds the difference B - A would settle; "
            f"these runs say between {low:+.6f} and {high:+.6f} (of 20 such statements about 19 "
            "come true)."
        )
    lines += what_challenge_asks(nats)
    if changed := changed_settings(a, b):
        lines += ["", "What differs:", *changed]
    return "\n".join(line if line.startswith(" ") else textwrap.fill(line, 98) for line in lines)
