"""The pictures of the records tool, all through matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import tracks
from reading import Run, Wrong

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, ORANGE, GREY, PALE = "#3b6ea5", "#e0953a", "#777777", "#dddddd"
COLOURS = ("#3b6ea5", "#e0953a", "#4f9d69", "#a05195", "#8c6d46", "#777777", "#d45087", "#2f4b7c")
NAMES_SHOWN = 12  # of a legend or list
KINDS_SHOWN = 16  # of tensors
POINTS_OF_MEAN = 40  # the running mean of the loss covers a fortieth of the steps
PNG = b"\x89PNG"
ROLE_NAMES = {"mlp": "MLP", "attn": "attention", "emb": "token embedding", "aux": "the rest"}


def save(figure: plt.Figure, path: Path) -> None:
    """Write a picture whole or not at all; never over a file that is no picture."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    if path.exists() and not (path.is_file() and path.read_bytes()[:4] == PNG):
        raise Wrong(f"{path}: exists and is no PNG picture; name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=110, format="png", metadata={"Software": None})
    partial.replace(path)
    plt.close(figure)


def plain(words: str, width: int) -> str:
    """Words of a stranger for a picture: printable, none of matplotlib's mathematics, bounded."""
    words = "".join(c if c.isprintable() and c != "$" else "?" for c in words)
    return words if len(words) <= width else words[: width - 3] + "..."


# =================================================================================================
# Runs, finished or live
# =================================================================================================

AXES = {
    "steps": ("step", "step", 1.0),
    "seconds": ("ms", "seconds of training", 1e-3),
    "tflops": ("tflops", "TFLOP of counted training", 1.0),
}


def positions(run: Run, by: str) -> np.ndarray:
    """Where each step of a run stands on the horizontal axis: (steps,)."""
    key, words, factor = AXES[by]
    steps = run.all("step")
    if any(key not in event for event in steps):
        raise Wrong(f"{run.path}: its steps do not say their {words}; plot --by another axis")
    return factor * np.array([event[key] for event in steps], dtype=float)


def running_mean(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Means over the last few values, and how many those are."""
    width = max(1, len(values) // POINTS_OF_MEAN)
    return np.convolve(values, np.ones(width) / width, mode="valid"), width


def bits_of_a_nat(run: Run) -> float | None:
    """Bits per byte for each nat a token, on the validation text; None before the first score."""
    scores = [event for event in run.all("eval") if event["val_loss"] > 0]
    return scores[0]["val_bpb"] / scores[0]["val_loss"] if scores else None


def draw_training(
    loss: plt.Axes, rate: plt.Axes, run: Run, x: np.ndarray, factor: float, style: dict
) -> None:
    """Training loss, times `factor`, and learning-rate scale of one run."""
    steps = run.all("step")
    losses = factor * np.array([event["train_loss"] for event in steps], dtype=float)
    smooth, width = running_mean(losses)
    loss.plot(x, losses, linewidth=0.5, alpha=0.2, color=style["color"])
    loss.plot(x[width - 1 :], smooth, linewidth=1.4, **style)
    rate.plot(x, [event["lr_scale"] for event in steps], linewidth=1.4, color=style["color"])


def at_steps(run: Run, x: np.ndarray, kind: str) -> tuple[list[dict], list[float]]:
    """Events of a kind that fell into training, and where their steps stand."""
    where = {event["step"]: place for event, place in zip(run.all("step"), x, strict=True)}
    found = [event for event in run.all(kind) if event["step"] in where]
    return found, [where[event["step"]] for event in found]


def draw_validation(axis: plt.Axes, run: Run, x: np.ndarray, colour: str) -> None:
    """Bits per byte of the validations on the way, and of the scores after the last step."""
    on_the_way, places = at_steps(run, x, "eval")
    axis.plot(places, [e["val_bpb"] for e in on_the_way], marker=".", color=colour)
    for name, marker in (("float_chunked", "o"), ("artifact_chunked", "s")):
        if (score := run.score(name)) and not score["step"]:
            axis.plot(x[-1], score["val_bpb"], marker, color=colour, markerfacecolor="none")
    if final := run.all("final"):
        axis.plot(x[-1], final[-1]["val_bpb"], "*", color=colour, markersize=11)
        axis.annotate(
            f"{final[-1]['val_bpb']:.4f}",
            (x[-1], final[-1]["val_bpb"]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
        )


def draw_sizes(axis: plt.Axes, run: Run, x: np.ndarray, colour: str) -> None:
    """Bytes of code and artifact: foreseen on the way, and at last."""
    foreseen, places = at_steps(run, x, "size_foreseen")
    sizes = [event["total"] / 1e3 for event in foreseen]
    axis.plot(places, sizes, "o", color=colour, markerfacecolor="none")
    for event in run.all("size_pass"):
        axis.plot(x[-1], event["total"] / 1e3, "_", color=colour, markersize=12)
    if artifact := run.all("artifact"):
        last = artifact[-1]["total"] / 1e3
        axis.plot([*places, x[-1]], [*sizes, last], ":", color=colour, linewidth=1)
        axis.plot(x[-1], last, "s", color=colour)


def draw_runs(path: Path, runs: Sequence[tuple[str, Run]], by: str) -> None:
    """Loss, rate, validation and bytes of several runs in one picture; live ones too."""
    figure, panels = plt.subplots(2, 2, figsize=(12, 7.5), sharex=True, layout="constrained")
    (loss, validation), (rate, sizes) = panels
    # Nats a token of different tokenizers cannot be compared, bits per byte can.
    known = [factor for _, run in runs if (factor := bits_of_a_nat(run))]
    unit, factors = "bits per byte, tokens as long as in validation", known
    if len(known) < len(runs):
        unit, factors = "nats a token", [1.0] * len(runs)
    for number, (name, run) in enumerate(runs):
        x, colour = positions(run, by), COLOURS[number % len(COLOURS)]
        if not len(x):
            continue
        shown = plain(name, 34) if number < NAMES_SHOWN else "_"
        style = {"color": colour, "label": shown}
        draw_training(loss, rate, run, x, factors[number], style)
        draw_validation(validation, run, x, colour)
        draw_sizes(sizes, run, x, colour)
    words = AXES[by][1]
    loss.set(title="Training loss (thick: running mean)", ylabel=unit)
    validation.set(
        title="Validation (star: headline; ring: float weights, square: artifact, in chunks)",
        ylabel="bits per byte",
    )
    rate.set(title="Learning-rate scale", ylabel="scale", xlabel=words)
    sizes.set(
        title="Code and artifact (ring: foreseen, dash: a pass, square: final)",
        ylabel="kB",
        xlabel=words,
    )
    for axis in (loss, validation, rate, sizes):
        axis.title.set_fontsize(10)
        axis.grid(color=PALE, linewidth=0.5)
    sizes.margins(x=0.08)
    for axis in (rate, sizes):
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    if loss.get_legend_handles_labels()[0]:
        loss.legend(frameon=False, fontsize=8)
    save(figure, path)


# =================================================================================================
# Entries
# =================================================================================================


def draw_bytes(path: Path, best: Run) -> None:
    """Bytes of the best seed's artifact by role, as its log estimates them."""
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    sizes = {e["role"]: (e["entropy"] / 1e3, e["floats"] / 1e3) for e in best.all("size")}
    whole = sum(map(sum, sizes.values())) or 1.0
    names = [plain(ROLE_NAMES.get(role, role), 34) for role in sizes]
    integers = [both[0] for both in sizes.values()]
    floats = [both[1] for both in sizes.values()]
    axis.barh(names, integers, color=BLUE, label="integers, by their entropy")
    axis.barh(names, floats, left=integers, color=ORANGE, label="scales and floats as they are")
    for y, both in enumerate(sizes.values()):
        axis.annotate(
            f"{sum(both) / whole:.0%}",
            (sum(both), y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set(
        xlabel="kB before the whole is compressed",
        title=f"Seed {best.seed}: what fills the artifact's "
        f"{best.one('artifact')['model_bytes']:,} bytes",
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save(figure, path)


def draw_scores(axis: plt.Axes, ranked: Sequence[dict], key: str, factor: float) -> None:
    """Discs with the rank of each entry, and a dash for each of its seeds."""
    for rank, claims in reversed(list(enumerate(ranked, start=1))):
        if key not in claims:
            continue
        x = factor * claims[key]
        scores = [seed["val_bpb"] for seed in claims["seed_results"].values()]
        axis.plot([x] * len(scores), scores, "_", color=GREY, markersize=14)
        axis.plot([x], [claims["val_bpb"]], "o", color=BLUE, markersize=15, markeredgecolor="w")
        axis.annotate(
            str(rank),
            (x, claims["val_bpb"]),
            ha="center",
            va="center_baseline",
            color="white",
            fontsize=8,
            fontweight="bold",
        )
    axis.margins(0.2)
    # From 0 on, so that a difference of a thousandth does not fill the axis.
    axis.set_xlim(0, 1.15 * factor * max(claims[key] for claims in ranked if key in claims))
    axis.grid(color=PALE, linewidth=0.5)


def draw_board(path: Path, found: Sequence[dict]) -> None:
    """Bits per byte against bytes, and against counted work where any was; a row a track and text.

    found: what submission.json holds, of each entry.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for claims in found:
        text = tracks.text_of(claims["data"]["fingerprint"])
        groups.setdefault((claims["track"], text), []).append(claims)
    with_work = any("tflops" in claims for claims in found)
    columns = 2 if with_work else 1
    figure, axes = plt.subplots(
        len(groups),
        columns,
        figsize=(4.6 * columns + 3.2, 4.4 * len(groups)),
        squeeze=False,
        layout="constrained",
    )
    for row, ((track, text), mine) in zip(axes, sorted(groups.items()), strict=True):
        ranked = sorted(mine, key=lambda claims: claims["val_bpb"])
        draw_scores(row[0], ranked, "bytes_total", 1e-6)
        row[0].set(
            title=f"{track}, {plain(text, 12)}\ndisc: mean of the seeds, dashes: each seed",
            ylabel="bits per byte (less is better)",
            xlabel="code and artifact, MB (the limit is 16)",
        )
        right = row[0]
        if any("tflops" in claims for claims in mine):
            right = row[1]
            draw_scores(right, ranked, "tflops", 1.0)
            right.set(xlabel="counted training, TFLOP", title="the same against work")
            right.sharey(row[0])
        elif with_work:
            row[1].set_axis_off()
        names = [
            f"{rank}  {plain(claims['name'], 34)}  {claims['val_bpb']:.4f}"
            for rank, claims in enumerate(ranked, start=1)
        ]
        if len(names) > NAMES_SHOWN:
            names[NAMES_SHOWN:] = [f"and {len(names) - NAMES_SHOWN} more"]
        right.text(
            1.02,
            1.0,
            "\n".join(names),
            transform=right.transAxes,
            va="top",
            fontsize=9,
            linespacing=1.6,
        )
    save(figure, path)


# =================================================================================================
# An artifact
# =================================================================================================


def draw_artifact(found, path: Path, limit: int, code_bytes: int) -> None:
    """Kinds of tensors by what they take, and the whole against the limit. found: Anatomy."""
    kinds = found.by_kind(KINDS_SHOWN)
    figure, (axis, bar) = plt.subplots(
        2,
        1,
        figsize=(9, 2.4 + 0.3 * len(kinds)),
        gridspec_kw={"height_ratios": [max(3, len(kinds)), 1.6]},
        layout="constrained",
    )
    rows = range(len(kinds))
    names = [f"{plain(kind, 34)}  ({len(parts)})" for kind, parts in kinds.items()]
    integers = [sum(part.entropy for part in parts) / 1e3 for parts in kinds.values()]
    floats = [sum(part.raw_floats for part in parts) / 1e3 for parts in kinds.values()]
    axis.barh(rows, integers, color=BLUE, label="entropy of the integers")
    axis.barh(rows, floats, left=integers, color=ORANGE, label="scales and floats")
    axis.set_yticks(rows, names)
    whole = found.total("estimate") or 1.0
    for y, parts in enumerate(kinds.values()):
        size = integers[y] + floats[y]
        grids = sorted({part.bits for part in parts})
        bits = "/".join(f"{width} bits" if width else "floats" for width in grids[:3])
        axis.annotate(
            f"{1e3 * size / whole:.1%}, {bits}",
            (size, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.legend(loc="lower right", frameon=False)
    axis.set(
        xlabel="kB before the whole is compressed",
        title=f"What fills {found.file_bytes:,} bytes: kinds of tensors, how many of each",
    )
    axis.tick_params(axis="y", labelsize=8)
    draw_limit(bar, found.file_bytes, code_bytes, limit)
    save(figure, path)


def draw_limit(bar: plt.Axes, artifact_bytes: int, code_bytes: int, limit: int) -> None:
    """Artifact, code and what is left as one bar."""
    left = 0.0
    for label, size, colour in (
        ("artifact", artifact_bytes, BLUE),
        ("code", code_bytes, GREY),
        ("left", max(0, limit - artifact_bytes - code_bytes), PALE),
    ):
        bar.barh([0], [size / 1e6], left=[left], color=colour, label=f"{label} {size:,}")
        left += size / 1e6
    bar.axvline(limit / 1e6, color="black", linewidth=1)
    bar.set(yticks=[], xlabel=f"MB of {limit / 1e6:g}", xlim=(0, max(left, limit / 1e6) * 1.01))
    bar.legend(loc="upper center", bbox_to_anchor=(0.5, 1.55), ncols=3, frameon=False, fontsize=8)
    bar.spines["left"].set_visible(False)
