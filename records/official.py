"""Check a records folder in the format of the challenge's own repository, which has no metrics.

Its logs are what three generations of that repository's script printed, and its submission.json
has gone under several names for the same number; what cannot be told from them is said.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from reading import Wrong, content, read_json
from tracks import TRACKS, VAL_TOLERANCE

RULES = TRACKS["track_10min_16mb"]
GRACE_MS = 500  # a step may end that much after the budget

# What reviewers find in logs of the official repository; the last line of a kind counts. The score
# has gone under three names.
OFFICIAL_LINES = {
    "final score": r"^(?:final_int\w+_exact|legal_ttt_exact|quantized(?:_\w+)?)"
    r"(?: val_loss:([0-9.]+))? val_bpb:([0-9.]+)",
    "total bytes": r"^Total submission size[^:]*: ?([0-9]+)",
    "training stop": r"^stopping_early: wallclock_cap train_time: ?([0-9]+)ms",
    "code bytes": r"^Code size(?: \(compressed\))?: ?([0-9]+)",
    "evaluation time": r"^(?:final_int|legal_ttt|quantized)\w*(?: .*)? eval_time:([0-9]+)ms",
    "validation tokens": r"^(?:val_tokens: ?|val_loader:.* tokens:)([0-9]+)",
    "seed": r"^[ \t]*seed: ?([0-9]+)$",
}
SIZE_NAMES = (
    "bytes_total",
    "artifact_bytes",
    "artifact_size_bytes",
    "artifact_bytes_max",
    "bytes_model_int6_zstd",
    "bytes_model_int8_zlib",
)
OF_ONE_RUN = ("seed", "rank", "local_rank", "step", "train_time", "val_loss", "val_bpb")


def number_in(claims: dict, *names: str) -> float | None:
    """The first of the names that holds a number; raises Wrong if one holds something else."""
    for name in names:
        if name in claims:
            if type(claims[name]) not in (int, float):
                raise Wrong(f"submission.json: {name} is {claims[name]!r}, not a number")
            return claims[name]
    return None


def check_official(folder: Path) -> tuple[list[str], list[str]]:
    """Findings on a folder of the official repository's format, and what cannot be verified."""
    claims, findings = read_json(folder / "submission.json"), []
    unknown = [
        "no metrics and no activity ledger: whether each technique acted",
        "no artifact: whether the score can be had again",
        "README.md and the compliance claims are prose",
    ]
    logs = {
        log.name: content(log).decode(errors="replace")
        for log in sorted({*folder.glob("*.log"), *folder.glob("train*.txt")})
    }
    found: dict[str, dict[str, float]] = {name: {} for name in (*OFFICIAL_LINES, "loss")}
    for log, text in logs.items():
        for name, pattern in OFFICIAL_LINES.items():
            if values := re.findall(pattern, text, re.M):
                loss, value = values[-1] if name == "final score" else ("", values[-1])
                found[name][log] = float(value)
                if loss:
                    found["loss"][log] = float(loss)
            elif name in ("final score", "total bytes"):
                findings.append(f"{log}: no line of the {name}")
            else:
                unknown.append(f"{log}: no line of the {name}")
    findings += check_official_logs(logs, found)
    findings += check_official_claims(claims, found)
    script, results = folder / "train_gpt.py", claims.get("seed_results")
    size = len(content(script)) if script.exists() else None
    findings += [
        f"{log}: code bytes {stated:.0f}, but train_gpt.py has {size}"
        for log, stated in found["code bytes"].items()
        if size not in (None, stated)
    ]
    findings += [
        f"{name}: missing" for name in ("train_gpt.py", "README.md") if not (folder / name).exists()
    ]
    for seed, result in results.items() if isinstance(results, dict) else ():
        for key, kind in (("val_bpb", "final score"), ("artifact_bytes", "total bytes")):
            value = number_in(result, key) if isinstance(result, dict) else None
            near = 5.1e-5 if key == "val_bpb" else 0
            logged = [
                v
                for log, v in found[kind].items()
                if found["seed"].get(log, float(seed)) == float(seed)
            ]
            if value is not None and logged and min(abs(value - v) for v in logged) > near:
                findings.append(f"submission.json: {key} {value} of a seed is in no log ({seed})")
    return findings, unknown


def check_official_logs(logs: dict[str, str], found: dict) -> Iterator[str]:
    """Rules that the logs of an official folder break, each alone or together."""
    if len(logs) < 3:
        yield f"{len(logs)} logs, a record needs 3 seeds"
    seeds = list(found["seed"].values())
    if len(set(seeds)) < len(seeds):
        yield f"seeds {sorted(map(int, seeds))}: one stands twice"
    for kind, limit, words in (
        ("total bytes", RULES.max_bytes, "{:,.0f} bytes are over the cap"),
        ("training stop", 1000 * RULES.max_train_seconds + GRACE_MS, "training took {:,.0f} ms"),
        ("evaluation time", 1000 * RULES.max_eval_seconds, "evaluation took {:,.0f} ms"),
    ):
        for log, value in found[kind].items():
            if value > limit:
                yield f"{log}: {words.format(value)}, more than {limit:,.0f}"
    for log, tokens in found["validation tokens"].items():
        if log in found["loss"]:
            nats, bpb = found["loss"][log], found["final score"][log]
            counted = tokens * nats / (math.log(2) * bpb) if bpb else math.inf
            if not math.isclose(counted, RULES.val_bytes, rel_tol=VAL_TOLERANCE):
                yield (
                    f"{log}: val_loss and val_bpb imply {counted:,.0f} validation bytes, "
                    f"the text has {RULES.val_bytes:,}"
                )
    settings = {}
    for log, text in logs.items():
        head, found_it, _ = text.partition("warmup_step")
        settings[log] = dict(
            re.findall(
                r"\b([a-z][a-z_0-9]+): ?([-+.0-9e]+|True|False)(?=\s|$)", head if found_it else ""
            )
        )
    for name in sorted(
        set.intersection(*map(set, settings.values())) - set(OF_ONE_RUN) if settings else ()
    ):
        usual = statistics.mode(mine[name] for mine in settings.values())
        for log, mine in settings.items():
            if mine[name] != usual:
                yield f"{log}: {name} is {mine[name]}, but {usual} in the other logs"


def check_official_claims(claims: dict, found: dict) -> Iterator[str]:
    """Totals of an official submission.json that the logs contradict."""
    scores, totals = list(found["final score"].values()), set(found["total bytes"].values())
    stated = number_in(claims, "val_bpb", "mean_val_bpb")
    if stated is None:
        yield "submission.json: no val_bpb"
    elif scores:
        mean, digits = statistics.fmean(scores), len(str(stated).partition(".")[2])
        if not abs(stated - mean) <= 0.51 * 10.0 ** -min(max(4, digits), 8):
            yield f"submission.json: val_bpb is {stated}, the logs' mean is {mean:.8f}"
    spread = number_in(claims, "val_bpb_std")
    if (
        spread is not None
        and len(scores) > 1
        and min(abs(spread - f(scores)) for f in (statistics.stdev, statistics.pstdev)) > 5.1e-5
    ):
        yield (
            f"submission.json: val_bpb_std is {spread}, the logs give "
            f"{statistics.stdev(scores):.8f}"
        )
    sizes = {name: number_in(claims, name) for name in SIZE_NAMES if name in claims}
    for name, value in sizes.items():
        if value is not None and value > RULES.max_bytes:
            yield f"submission.json: {name} is {value:,}, over the cap of {RULES.max_bytes:,}"
        elif totals and not name.startswith("bytes_model") and value not in totals:
            yield (
                f"submission.json: {name} is {value}, the logs say "
                f"{', '.join(f'{t:.0f}' for t in sorted(totals))}"
            )
    if not sizes and "artifact_bytes" not in json.dumps(claims.get("seed_results")):
        yield f"submission.json: no size under any of {', '.join(SIZE_NAMES)}"
