"""One technique at a time against the defaults with `mini`: jobs, table and picture.

    python benchmarks/ablations.py jobs --seeds 1 2 3 > ablations.txt
    python benchmarks/run_queue.py ablations.txt RUNS --at-once 2
    python benchmarks/ablations.py collect RUNS records/ablations.json
    python benchmarks/ablations.py times > times.json
    python benchmarks/ablations.py table records/ablations.json [--times times.json] \
        --plot records/ablations.png

Runs are step-driven, so that all see the same tokens whatever a step costs; what it costs is
measured apart, by `times`, on a quiet machine. An effect is the headline score (bits per byte of
the artifact) without the technique minus with it, paired by seed, on one machine with one
train_gpt.py: above zero the technique helps. Its interval takes one variance for all ablations,
pooled from their paired differences: three seeds are too few for a variance of their own.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

BASE = "PRESET=mini ITERATIONS=500 MAX_WALLCLOCK_SECONDS=0 VAL_LOSS_EVERY=0 EVAL_STRIDE=128"
# Name: (what it is, settings that take it away from the defaults or, where the name says
# with_, that bring it in).
ABLATIONS = {
    "xsa": ("exclusive self attention, all layers", "XSA_LAST_N=0"),
    "xsa_last_4": ("XSA in all layers, not the last 4", "XSA_LAST_N=4"),
    "smear": ("SmearGate", "SMEAR_ENABLED=0"),
    "bigram": ("BigramHash", "BIGRAM_VOCAB_SIZE=0"),
    "bos_masks": ("masks at document starts", "SMEAR_BOS_MASK=0 BIGRAM_BOS_MASK=0"),
    "skips": ("U-Net skips", "SKIP_PER_DIM=off"),
    "skip_per_dim": ("U-Net skip weights a channel, not a layer", "SKIP_PER_DIM=0"),
    "value_embeddings": ("value embeddings, layers 9 and 10", "VE_ENABLED=0"),
    "ln_scale": ("layer scale 1/sqrt(l+1)", "LN_SCALE=0"),
    "with_ln_scale_learned": ("layer scale, learned", "LN_SCALE=learned"),
    "partial_rope": ("partial RoPE, half of the head", "ROPE_DIMS=0"),
    "leaky_relu": ("LeakyReLU(0.5) squared, not ReLU squared", "MLP_ACT=relu2"),
    "with_leaky_0.25": ("slope 0.25, not 0.5", "LEAKY_SLOPE=0.25"),
    "with_vrl_add": ("VRL, added", "VRL_MODE=add"),
    "with_vrl_mix": ("VRL, mixed", "VRL_MODE=mix"),
    "with_resid_phase": ("residual mix by depth at the start", "RESID_MIX_INIT=phase"),
    "with_backout": ("Backout, middle layer", "BACKOUT_MODE=mid"),
    "with_cache_backout": ("Cache+Backout", "BACKOUT_MODE=cache BACKOUT_INIT=0.1"),
    "with_mile": ("MiLe loss, gamma 1.1", "MILE_GAMMA=1.1"),
    "with_svd_init": ("embedding starts with a spectrum", "EMB_SVD_INIT=1"),
    "with_ortho_mup": ("orthogonal output projections at the start", "PROJ_INIT=ortho_mup"),
    "with_qk_gain_4": ("query gain 4 at the start, not 1.5", "QK_GAIN_INIT=4"),
    "muon": (
        "Muon, not AdamW at 0.003, for block matrices",
        "OPTIMIZER_ROUTING=adam MATRIX_LR=0.003",
    ),
    "muon_0.006": ("Muon, not AdamW at 0.006", "OPTIMIZER_ROUTING=adam MATRIX_LR=0.006"),
    "momentum_ramp": ("momentum ramp, not 0.99 from step 0", "MUON_MOMENTUM_WARMUP_STEPS=0"),
    "with_momentum_0.95": ("momentum 0.95, not 0.99", "MUON_MOMENTUM=0.95"),
    "with_polar": ("Polar Express, not Newton-Schulz", "MUON_NS=polar"),
    "with_row_norm": ("rows of one norm before Muon's step", "MUON_ROW_NORM=1"),
    "with_normuon": ("even neurons after it (NorMuon)", "MUON_NEURON_NORM=0.95"),
    "with_slow_momentum": (
        "a slower momentum beside Muon's",
        "MUON_MOMENTUM=0.85 MUON_SLOW_SHARE=0.5615",
    ),
    "with_cooldown": ("momentum cool-down", "MUON_MOMENTUM_COOLDOWN_FRAC=0.1"),
    "with_cautious": ("cautious decay at 1", "MUON_WD_FORM=cautious MUON_WD=1"),
    "with_cautious_0.5": ("cautious decay at 0.5", "MUON_WD_FORM=cautious MUON_WD=0.5"),
    "with_cautious_1.5": ("cautious decay at 1.5", "MUON_WD_FORM=cautious MUON_WD=1.5"),
    "with_plain_decay_1": ("plain decay at 1", "MUON_WD=1"),
    "with_beta2": ("AdamW's second beta 0.99, not 0.95", "BETA2=0.99"),
    "with_rate_floor": ("a floor of 0.1 under the rates", "MIN_LR=0.1"),
    "with_prefix_target": ("prefix-token target", "PREFIX_TARGET=0.25"),
    "with_mask": ("token mask in training and scoring", "TOKEN_MASK=1"),
    "with_last_weights": ("0.4 of the last weights beside the EMA", "AVG_LAST_SHARE=0.4"),
    "weight_decay": ("weight decay 0.04", "MUON_WD=0 ADAM_WD=0"),
    "grad_clip": ("gradient clip 0.3", "GRAD_CLIP_NORM=0"),
    "ema": ("EMA 0.9", "AVG_MODE=none"),
    "with_swa": ("SWA, not EMA", "AVG_MODE=swa"),
    "with_swa_of_ema": ("SWA of the EMA, not EMA", "AVG_MODE=swa_of_ema"),
    "with_cosine": ("cosine warmdown, not linear", "WARMDOWN_TYPE=cosine"),
    "shuffled": ("shuffled loader, not stream order", "LOADER=sequential"),
    "late_qat": ("late QAT", "QAT_MODE=off"),
    "with_always_qat": ("QAT from the first step, not late", "QAT_MODE=always"),
    "gptq": ("full GPTQ, not nearest", "GPTQ_VARIANT=off"),
    "with_std_clip": ("std clips (12.85 of CLIP_SIGMAS), not percentiles", "QUANT_CLIP=std"),
    "sliding": ("sliding windows, stride 128, not chunks", "EVAL_STRIDE=0"),
    "with_stride_64": ("sliding windows, stride 64, not 128", "EVAL_STRIDE=64"),
    "with_ttt": ("score-first adaptation", "TTT_MODE=score_first"),
}
# What comes last in the list of jobs: variants of the others.
VARIANTS = (
    "xsa_last_4",
    "bos_masks",
    "skip_per_dim",
    "with_ln_scale_learned",
    "with_leaky_0.25",
    "with_vrl_mix",
    "with_qk_gain_4",
    "muon_0.006",
    "with_momentum_0.95",
    "with_cautious_0.5",
    "with_cautious_1.5",
    "with_plain_decay_1",
    "weight_decay",
    "grad_clip",
    "with_swa_of_ema",
    "with_cosine",
    "with_always_qat",
    "with_stride_64",
)


@dataclass
class Effect:
    """What a technique is worth: bits per byte without it minus with it, paired by seed."""

    name: str
    what: str
    differences: list[float]
    half_width: float = math.nan

    mean = property(lambda self: statistics.fmean(self.differences))

    @property
    def verdict(self) -> str:
        if abs(self.mean) <= self.half_width:
            return "cannot tell"
        return "helps" if self.mean > 0 else "hurts"


def finished(runs: Path) -> dict[str, dict]:
    """Of every run with a final score: by name and machine, that score and how it came about."""
    results = {}
    for metrics in sorted(runs.glob("*_seed*/metrics.jsonl")):
        lines = metrics.read_text().splitlines()
        events = {event["event"]: event for event in map(json.loads, lines)}
        if "final" in events:
            results[f"{metrics.parent.name} on {events['machine']['name']}"] = {
                "val_bpb": events["final"]["val_bpb"],
                "steps": events["summary"]["steps"],
                "source": events["source"]["sha256"][:12],
            }
    return results


def collect(runs: Path, path: Path) -> None:
    """Add the results of a folder of runs to the file; refuses to change one that is there."""
    known = json.loads(path.read_text()) if path.exists() else {}
    for key, result in finished(runs).items():
        if known.setdefault(key, result) != result:
            raise SystemExit(f"{path}: {key} is there with {known[key]}, {runs} has {result}")
    path.write_text(json.dumps(dict(sorted(known.items())), indent=0) + "\n")


def effects(results: dict[str, dict]) -> list[Effect]:
    """Every ablation with two or more seeds that have a base alike, with intervals of 95 %."""
    found = []
    for name, (what, _) in ABLATIONS.items():
        pairs: dict[str, list[float]] = {}  # by seed; machines of one seed are no new evidence
        for key in sorted(key for key in results if key.startswith(f"{name}_seed")):
            place, mine = key.removeprefix(f"{name}_seed"), results[key]
            base = results.get(f"base_seed{place}")
            if base and all(base[same] == mine[same] for same in ("steps", "source")):
                pairs.setdefault(place.split()[0], []).append(mine["val_bpb"] - base["val_bpb"])
        if len(pairs) > 1:
            sign = -1 if name.startswith("with_") else 1
            found.append(
                Effect(
                    name,
                    what,
                    [sign * statistics.fmean(pairs[seed]) for seed in sorted(pairs, key=int)],
                )
            )
    freedom = sum(len(e.differences) - 1 for e in found)
    variance = sum(
        statistics.variance(e.differences) * (len(e.differences) - 1) for e in found
    ) / max(1, freedom)
    for effect in found:
        effect.half_width = float(
            stats.t.ppf(0.975, freedom) * math.sqrt(variance / len(effect.differences))
        )
    return sorted(found, key=lambda e: -e.mean)


def print_jobs(seeds: list[int]) -> None:
    """The job list: seed after seed, so that an interrupted queue leaves whole pairs."""
    techniques = [name for name in ABLATIONS if name not in VARIANTS]
    for names in (["base", *techniques], VARIANTS):
        for seed in seeds:
            for name in names:
                settings = ABLATIONS[name][1] + " " if name != "base" else ""
                print(f"{name}_seed{seed} {BASE} {settings}SEED={seed}")


def times(steps: int) -> dict[str, float]:
    """Median milliseconds of a training step of each ablation and of the base, in turn.

    Turn and turn about, so that a slow minute of the machine meets all of them.
    """
    import torch
    from measure import Bench, median, seconds
    from tqdm import tqdm

    torch.manual_seed(0)
    benches = {
        name: Bench(f"{BASE} {settings}")
        for name, settings in {
            "base": "",
            **{name: given for name, (_, given) in ABLATIONS.items()},
        }.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in benches}
    for step in tqdm(range(steps + 1), unit="round"):
        for name, bench in benches.items():
            taken[name].append(1e3 * seconds(lambda b=bench, n=step: b.step(n)))
    return {name: median(values[1:]) for name, values in taken.items()}


def table(found: list[Effect], ms: dict[str, float]) -> str:
    """The effects as Markdown; a step's cost, if known, is with the technique minus without it."""
    lines = [
        f"| technique | effect, bpb | by seed |{' ms a step |' if ms else ''} verdict |",
        f"|---|---|---|{'---|' if ms else ''}---|",
    ]
    for effect in found:
        by_seed = " ".join(f"{1e3 * d:+.1f}" for d in effect.differences)
        sign = 1 if effect.name.startswith("with_") else -1
        known = f"{sign * (ms[effect.name] - ms['base']):+.1f}" if effect.name in ms else ""
        cost = f" {known} |" if ms else ""
        lines.append(
            f"| {effect.what} | {effect.mean:+.4f} +- {effect.half_width:.4f} | "
            f"{by_seed} |{cost} {effect.verdict} |"
        )
    return "\n".join(lines)


def draw(found: list[Effect], path: Path) -> None:
    """Effects as points with their intervals, the best on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"helps": "tab:green", "hurts": "tab:red", "cannot tell": "tab:gray"}
    figure, axes = plt.subplots(figsize=(9, 1 + 0.28 * len(found)), layout="constrained")
    for place, effect in enumerate(reversed(found)):
        axes.errorbar(
            1e3 * effect.mean,
            place,
            xerr=1e3 * effect.half_width,
            fmt="o",
            capsize=3,
            color=colours[effect.verdict],
        )
        axes.plot(
            [1e3 * d for d in effect.differences],
            [place] * len(effect.differences),
            "|",
            color=colours[effect.verdict],
            alpha=0.6,
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), [effect.what for effect in reversed(found)])
    axes.set_xlabel("bits per byte saved by the technique, thousandths (marks: seeds; bars: 95 %)")
    # One large effect would press the others together.
    axes.set_xscale("symlog", linthresh=5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title("One technique at a time, defaults with mini, equal tokens")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the job list, the step times or the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("jobs").add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    verbs.add_parser("times").add_argument("--steps", type=int, default=20)
    take = verbs.add_parser("collect")
    take.add_argument("runs", type=Path)
    take.add_argument("results", type=Path)
    show = verbs.add_parser("table")
    show.add_argument("results", type=Path)
    show.add_argument("--times", type=Path)
    show.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if given.verb == "jobs":
        print_jobs(given.seeds)
    elif given.verb == "times":
        print(json.dumps(times(given.steps)))
    elif given.verb == "collect":
        collect(given.runs, given.results)
    else:
        found = effects(json.loads(given.results.read_text()))
        if not found:
            raise SystemExit(f"{given.results}: no ablation has two seeds and their base")
        print(table(found, json.loads(given.times.read_text()) if given.times else {}))
        if given.plot:
            draw(found, given.plot)


if __name__ == "__main__":
    main()
