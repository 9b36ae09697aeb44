"""The pictures of the records tool, all through matplotlib.

A run is anything with `seed`, `all(kind)` and `one(kind)`; see record.py.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from artifact import ROLE_NAMES, Anatomy, Part, kind_of, printable

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, ORANGE, GREY, PALE = "#3b6ea5", "#e0953a", "#777777", "#dddddd"
SEED_COLOURS = ("#3b6ea5", "#e0953a", "#4f9d69", "#a05195", "#777777")
KINDS_SHOWN = 16


def save(figure: plt.Figure, path: Path) -> None:
    """Write a picture and let go of it; the same data gives the same bytes on one machine."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def colours(runs: list) -> list[tuple]:
    """Each run with its colour."""
    return [(run, SEED_COLOURS[n % len(SEED_COLOURS)]) for n, run in enumerate(runs)]


def draw_loss(path: Path, runs: list) -> None:
    """Training loss against steps and against seconds, all seeds."""
    figure, (by_step, by_time) = plt.subplots(
        1, 2, figsize=(10, 4), sharey=True, layout="constrained"
    )
    width = max(1, min(len(run.all("step")) for run in runs) // 40)
    for run, colour in colours(runs):
        steps = run.all("step")
        loss = np.array([e["train_loss"] for e in steps])
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        for axis, x in (
            (by_step, [e["step"] for e in steps]),
            (by_time, [e["ms"] / 1e3 for e in steps]),
        ):
            axis.plot(x, loss, linewidth=0.5, color=colour, alpha=0.2)
            axis.plot(x[width - 1 :], smooth, linewidth=1.4, color=colour, label=f"seed {run.seed}")
    figure.suptitle(f"Training loss; thin: each step, thick: mean of {width} steps")
    by_step.set(xlabel="step", ylabel="nats a token (less is better)")
    by_time.set(xlabel="seconds of training")
    by_step.legend(frameon=False)
    save(figure, path)


def draw_bytes(path: Path, best) -> None:
    """Bytes of the best seed's artifact by role, as its log estimates them."""
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    sizes = {e["role"]: (e["entropy"] / 1e3, e["floats"] / 1e3) for e in best.all("size")}
    whole, names = sum(map(sum, sizes.values())), [ROLE_NAMES.get(r, r) for r in sizes]
    integers, floats = zip(*sizes.values(), strict=True)
    axis.barh(names, integers, color=BLUE, label="integers, by their entropy")
    axis.barh(names, floats, left=integers, color=ORANGE, label="scales and floats as they are")
    for y, both in enumerate(sizes.values()):
        axis.annotate(
            f"{sum(both) / (whole or 1):.0%}",
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
    axis.legend(frameon=False)
    save(figure, path)


def draw_bpb(path: Path, runs: list) -> None:
    """Bits per byte of the float weights, of the artifact, and the headline, all seeds."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for run, colour in colours(runs):
        scores = {e["name"]: e["val_bpb"] for e in run.all("eval") if not e["step"]}
        axis.plot(
            [name.replace("_", "\n", 1) for name in scores],
            list(scores.values()),
            marker="o",
            color=colour,
            label=f"seed {run.seed}",
        )
        axis.annotate(
            f"{run.one('final')['val_bpb']:.4f}",
            (len(scores) - 1, run.one("final")["val_bpb"]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
        )
    axis.margins(x=0.15)
    axis.set(
        ylabel="bits per byte (less is better)",
        title="Score of the float weights, of the artifact, and the headline (last)",
    )
    axis.legend(frameon=False)
    save(figure, path)


def draw_board(path: Path, found: list[tuple[str, dict]]) -> None:
    """Bits per byte against bytes of (text, entry); another text has a panel of its own."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for text, claims in found:
        groups.setdefault((claims["track"], text), []).append(claims)
    figure, axes = plt.subplots(
        1, len(groups), figsize=(7.5 * len(groups), 4.2), squeeze=False, layout="constrained"
    )
    for axis, ((track, text), mine) in zip(axes[0], sorted(groups.items()), strict=True):
        ranked = sorted(mine, key=lambda claims: claims["val_bpb"])
        for rank, claims in reversed(list(enumerate(ranked, start=1))):
            x, scores = (
                claims["bytes_total"] / 1e6,
                [result["val_bpb"] for result in claims["seed_results"].values()],
            )
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
        names = [
            f"{rank}  {claims['name']}  {claims['val_bpb']:.4f}"
            for rank, claims in enumerate(ranked, start=1)
        ]
        more = [f"and {len(names) - 12} more"] if len(names) > 12 else []
        axis.text(
            1.02,
            1.0,
            "\n".join([*names[:12], *more]),
            transform=axis.transAxes,
            va="top",
            fontsize=9,
            linespacing=1.6,
        )
        axis.set(
            title=f"{track}, {printable(text, 12)}\ndisc: mean of the seeds, dashes: each seed",
            ylabel="bits per byte (less is better)",
            xlabel="code and artifact, MB (the limit is 16)",
        )
        axis.margins(0.25)
    save(figure, path)


def draw_artifact(found: Anatomy, path: Path, limit: int, code_bytes: int) -> None:
    """Kinds of tensors by what they take, and the whole against the limit."""
    kinds: dict[str, list[Part]] = {}
    for part in found.parts:
        kinds.setdefault(kind_of(part.name), []).append(part)
    order = sorted(kinds, key=lambda kind: -sum(p.estimate for p in kinds[kind]))
    if len(order) > KINDS_SHOWN:
        kinds["all others"] = [part for kind in order[KINDS_SHOWN - 1 :] for part in kinds[kind]]
        order = [*order[: KINDS_SHOWN - 1], "all others"]
    figure, (axis, bar) = plt.subplots(
        2,
        1,
        figsize=(9, 2.4 + 0.3 * len(order)),
        gridspec_kw={"height_ratios": [max(3, len(order)), 1.6]},
        layout="constrained",
    )
    names = [f"{printable(kind, 34)}  ({len(kinds[kind])})" for kind in order]
    start = [0.0] * len(order)
    for label, field, colour in (
        ("entropy of the integers", "entropy", BLUE),
        ("scales and floats", "raw_floats", ORANGE),
    ):
        widths = [sum(getattr(p, field) for p in kinds[kind]) / 1e3 for kind in order]
        axis.barh(names, widths, left=start, color=colour, label=label)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    for y, (kind, width) in enumerate(zip(order, start, strict=True)):
        bits = sorted({str(p.bits or "fp16") for p in kinds[kind]}, key=lambda b: (len(b), b))
        share = 1e3 * width / (found.total("estimate") or 1.0)
        axis.annotate(
            f"{share:.1%}, {'/'.join(bits[:3])}{' bits' * (bits != ['fp16'])}",
            (width, y),
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
    left = 0.0
    for label, size, colour in (
        ("artifact", found.file_bytes, BLUE),
        ("code", code_bytes, GREY),
        ("left", max(0, limit - found.file_bytes - code_bytes), PALE),
    ):
        bar.barh([0], [size / 1e6], left=[left], color=colour, label=f"{label} {size:,}")
        left += size / 1e6
    bar.axvline(limit / 1e6, color="black", linewidth=1)
    bar.set(yticks=[], xlabel=f"MB of {limit / 1e6:g}", xlim=(0, max(left, limit / 1e6) * 1.01))
    bar.legend(loc="upper center", bbox_to_anchor=(0.5, 1.55), ncols=3, frameon=False, fontsize=8)
    bar.spines["left"].set_visible(False)
    save(figure, path)
