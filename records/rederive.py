"""What the numbers of a run must be: from its settings, its clock, and each other.

The schedule is stated here once more, on its own, from techniques and README; nothing of the
script is run. What cannot be derived is named in TRUSTED, and `doubts` says it in words.
"""

from __future__ import annotations

import ast
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

# Facts of events that nothing else in a folder gives: the log line, where there is one, has fewer
# digits. Of every other fact one changed digit is found, up to the ninth.
TRUSTED = {
    "step": ("train_loss",),
    "eval": ("ms",),
    "reserve": ("seconds",),
    "memory": ("mib",),
    "quantized": ("objective",),
    "size": ("entropy",),
    "size_pass": ("factor", "total"),
    "summary": ("eval_seconds",),
}
DIGITS = 1e-9  # relative; of what is derived from times in ms, which are rounded once
# Log lines whose numbers no event holds, and that a run may have alone.
ALONE = (
    r"scoring expected:\d+s budget:\d+s",
    r"checkpoint step:\d+ bytes:\d+",
    r"out of memory: trying \d+ rows a forward",
    r"swa:start step:\d+",
    r"warning: .*",
    r"peak memory allocated: \d+ MiB reserved: \d+ MiB",
)


def same_code(script: ast.Module, ours: ast.Module, *names: str) -> bool:
    """Whether what has these names is the same code in both; comments do not count."""

    def defines(node: ast.stmt) -> bool:
        made = (
            [
                n.id
                for n in ast.walk(node)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            ]
            if isinstance(node, ast.Assign)
            else []
        )
        return bool({getattr(node, "name", ""), *made} & set(names))

    def said(tree: ast.Module) -> list[str]:
        return [ast.unparse(node) for node in tree.body if defines(node)]

    return said(script) == said(ours)


def scales(run) -> Iterator[tuple[float, float]]:
    """Rate scale of each step, from settings and step times, and how exact it can be had."""
    cfg, reserve = run.settings, run.all("reserve")
    budget = max(cfg["max_wallclock_seconds"] - (reserve[0]["seconds"] if reserve else 0.0), 0.0)
    times = [0.0, *(event["ms"] / 1e3 for event in run.all("step"))]
    spent = [after - before for before, after in zip(times, times[1:], strict=False)]
    for n, now in enumerate(times[:-1]):
        recent = spent[max(0, n - 50) : n]
        median = statistics.median(recent) if len(recent) >= 5 else 0.0
        exact = DIGITS
        if cfg["max_wallclock_seconds"] == 0:
            whole, left, decay = cfg["iterations"], cfg["iterations"] - n, cfg["warmdown_iters"]
        else:
            whole = min(budget, now + (cfg["iterations"] - n) * median) if median else budget
            left, decay = whole - now, cfg["warmdown_iters"] * median
            # Before the first step the clock stood at some fraction of a millisecond, not at 0.
            if (
                median
                and n <= 50
                and (whole < budget or not cfg["warmdown_frac"])
                and statistics.median([recent[0] - 0.01, *recent[1:]]) != median
            ):
                exact = 0.01
        decay = cfg["warmdown_frac"] * whole if cfg["warmdown_frac"] else min(decay, whole)
        scale = min(1.0, max(0.0, left) / decay) if decay > 0 else 1.0
        yield (
            (scale if cfg["warmdown_type"] == "linear" else (1 - math.cos(math.pi * scale)) / 2),
            exact,
        )


def check_schedule(run) -> Iterator[str]:
    """Rate scale of every step, the start of QAT, and the ledger, against the schedule."""
    place, cfg, steps = run.metrics_name, run.settings, run.all("step")
    for event, (scale, exact) in zip(steps, scales(run), strict=True):
        if not math.isclose(event["lr_scale"], scale, rel_tol=exact, abs_tol=exact):
            yield (
                f"{place}: step {event['step']}: lr_scale {event['lr_scale']}, settings and "
                f"step times give {scale:.9g}"
            )
            return
    rates, mode = [event["lr_scale"] for event in steps], cfg["qat_mode"]
    starts = (
        0
        if mode == "always"
        else next(
            (n for n, scale in enumerate(rates) if scale < cfg["late_qat_threshold"]), len(rates)
        )
    )
    for event in run.all(f"{mode}_qat"):
        if (event["step"], [event["scale"]]) != (starts, rates[starts : starts + 1]):
            yield f"{place}: QAT started at step {event['step']}, the schedule says {starts}"
    ramp = cfg["muon_momentum_warmup_steps"]
    snapshots = sum(
        scale < cfg["swa_start_frac"] and (n + 1) % cfg["swa_every"] == 0
        for n, scale in enumerate(rates)
    )
    acted = {
        f"{mode}_qat": len(rates) - starts if mode != "off" else 0,
        "warmdown": sum(scale < 1.0 for scale in rates),
        "ema": len(rates),
        "swa": snapshots,
        "momentum_ramp": min(len(rates), ramp),
    }
    for event in run.all("activity"):
        name = event["name"]
        if name in acted and (event["steps"], event["of"]) != (acted[name], len(rates)):
            yield (
                f"{place}: activity {name} {event['steps']} of {event['of']}, the steps give "
                f"{acted[name]} of {len(rates)}"
            )
    for event in run.all("swa"):
        if event["snapshots"] != snapshots:
            yield f"{place}: swa has {event['snapshots']} snapshots, the steps give {snapshots}"


def check_clock(run) -> Iterator[str]:
    """Times, rates and settings that the events repeat."""
    place, cfg, summary = run.metrics_name, run.settings, run.one("summary")
    trained, budget = run.one("trained"), run.settings["max_wallclock_seconds"]
    for event in run.all("step"):
        seconds = event["ms"] / 1e3
        share = seconds / budget if budget else event["step"] / cfg["iterations"]
        eta = max(0.0, seconds * (1 - share) / max(share, 1e-9))
        if not math.isclose(event["eta"], eta, rel_tol=DIGITS, abs_tol=DIGITS * max(1, budget)):
            yield f"{place}: step {event['step']}: eta {event['eta']}, its time gives {eta:.6f}"
            break
    ends = [*run.all("calibrated"), trained]
    for stated, derived, what in (
        (summary["seconds"], ends[0]["ms"] / 1e3, "train_seconds"),
        (
            summary["rate"],
            summary["steps"] * cfg["train_batch_tokens"] / trained["ms"] * 1e3,
            "tokens a second",
        ),
        (trained["step"], summary["steps"], "steps of 'trained'"),
        (trained["iterations"], cfg["iterations"], "iterations of 'trained'"),
        *((e["batches"], cfg["gptq_calib_batches"], "batches") for e in run.all("reserve")),
    ):
        if not math.isclose(stated, derived, rel_tol=DIGITS):
            yield f"{place}: {what} {stated}, the other events give {derived}"
    for event in run.all("calibrated"):
        rows, rest = divmod(event["tokens"], cfg["train_seq_len"])
        if (
            event["source"] != cfg["gptq_calib"]
            or rest
            or not 0 < rows <= 8 * cfg["gptq_calib_batches"]
        ):
            yield f"{place}: calibrated on {event['tokens']:,} tokens ({event['source']})"
    timed = [e["ms"] for e in run.all("eval") if e["name"] == run.one("final")["name"]]
    if (
        cfg["ttt_mode"] != "train_then_score"
        and timed
        and not -1 <= summary["eval_seconds"] * 1e3 - timed[-1] <= 1000 + 0.05 * timed[-1]
    ):
        yield f"{place}: scoring took {timed[-1] / 1e3:.1f} s, not {summary['eval_seconds']}"
    for event in run.all("eval"):
        if event["step"] and event["step"] % cfg["val_loss_every"]:
            yield f"{place}: validation at step {event['step']}"


def check_artifact_facts(run) -> Iterator[str]:
    """What the events say of the artifact agrees with the settings and with itself."""
    place, cfg, artifact = run.metrics_name, run.settings, run.one("artifact")
    for key, right in (
        ("limit", cfg["artifact_limit_bytes"]),
        ("left", artifact["limit"] - artifact["total"]),
    ):
        if artifact[key] != right:
            yield f"{place}: artifact {key} {artifact[key]:,}, expected {right:,}"
    if not artifact["label"].endswith("+" + cfg["codec"]):
        yield f"{place}: artifact {artifact['label']}, but CODEC is {cfg['codec']}"
    passes = run.all("size_pass")
    target = cfg.get("artifact_target_bytes") or cfg["artifact_limit_bytes"]
    totals = [event["total"] for event in passes]
    kept = max((total for total in totals if total <= target), default=min(totals, default=0))
    if passes and artifact["total"] != kept:
        yield f"{place}: the passes of the size end at {kept:,} bytes, not {artifact['total']:,}"
    for number, event in enumerate(passes):
        if (event["solved"], event["target"]) != (number, target) or (
            number == 0 and event["factor"] != 1.0
        ):
            yield f"{place}: size_pass {event['solved']} of {event['target']:,} bytes"
    data, folder = run.one("val_data"), cfg["data_path"]
    if data["pattern"] != f"{folder}/fineweb_val_*.bin":
        yield f"{place}: validation text {data['pattern']}, but DATA_PATH is {folder}"
    if run.one("train_data")["dataset"] != re.split(r"[/\\]", folder.rstrip("/\\"))[-1]:
        yield f"{place}: training data {run.one('train_data')['dataset']}, DATA_PATH is {folder}"
    if run.one("final")["stride"] != cfg["eval_stride"]:
        yield f"{place}: the headline's stride is {run.one('final')['stride']}"


def check_words(run, loose: dict[str, int], defaults: dict) -> Iterator[str]:
    """Numbers of log lines without an event: a setting's is the setting's, names agree."""
    place, cfg, machine = run.log_name, run.settings, run.one("machine")
    known = {
        **{k: v for k, v in cfg.items() if type(v) in (int, float)},
        "seed": run.seed,
        "world_size": machine["world_size"],
        "budget": cfg["eval_wallclock_seconds"],
        "rows_per_step": cfg["train_batch_tokens"] // cfg["train_seq_len"],
    }
    rates = [event["lr_scale"] for event in run.all("step")]
    first = next(
        (
            n + 1
            for n, scale in enumerate(rates)
            if scale < cfg["swa_start_frac"] and (n + 1) % cfg["swa_every"] == 0
        ),
        0,
    )
    for line, number in loose.items():
        for name, text in re.findall(r"(?<![\w.])([a-z_]+):([0-9]+(?:\.[0-9]+)?)", line):
            if (
                not re.match(r"\s+[0-9,]+ parameters", line)
                and name in known
                and not math.isclose(float(text), known[name], abs_tol=5e-4)
            ):
                yield f"{place}:{number}: {name}:{text}, but it is {known[name]}"
        found = re.fullmatch(r"warmup_step:(\d+)/(\d+)", line)
        if found and not 1 <= int(found[1]) <= int(found[2]):
            yield f"{place}:{number}: {line}"
        if (found := re.fullmatch(r"swa:start step:(\d+)", line)) and int(found[1]) != first:
            yield f"{place}:{number}: {line}, the schedule says {first}"
        if (found := re.fullmatch(r"checkpoint step:(\d+) bytes:\d+", line)) and int(
            found[1]
        ) > len(rates):
            yield f"{place}:{number}: {line}, the run has {len(rates)} steps"
    groups = [
        int(n.replace(",", ""))
        for n in re.findall(r"^ *([0-9][0-9,]*) parameters  (?:adam|muon) ", run.log, re.M)
    ]
    if groups and sum(groups) != run.one("model")["params"]:
        yield f"{place}: the groups have {sum(groups):,} parameters, the model another number"
    yield from check_own_lines(run, defaults)


def check_own_lines(run, defaults: dict) -> Iterator[str]:
    """Lines that differ between the runs of an entry by right: names, seed, warnings."""
    lines, place = run.log.splitlines(), run.log_name
    named = [
        re.sub(r"^(log|artifact): |/(log\.txt|artifact\.bin)$", "", line)
        for line in lines
        if re.fullmatch(r".*/log\.txt|artifact: .*/artifact\.bin", line)
    ]
    if len(named) != 3 or len(set(named)) != 1:
        yield f"{place}: names its folder {named}, expected one name at head and end"
    for mark, name, value, text in re.findall(
        r"^([* ]) (RUN_ID|RUNS_DIR|SEED) +(\S.*?) +([A-Z][^\[]*\[.*\])$", run.log, re.M
    ):
        right = {"SEED": str(run.seed)}.get(name, value)
        inside = value == "''" or name == "SEED" or str(Path(value)) in (named or [""])[0]
        default = str(defaults.get(name.lower(), "")) or "''"
        if (
            right != value
            or not inside
            or (mark == "*") == (value == default)
            or ("; default" in text) != (mark == "*")
            or (mark == "*" and not text.endswith(f"; default {default}]"))
        ):
            yield f"{place}: {name} {value}: not as the run is called, or not the default"
    reasons = [
        line.removeprefix("warning: not eligible as a record: ")
        for line in lines
        if line.startswith("warning: not eligible as a record: ")
    ]
    if "; ".join(reasons) != run.one("eligibility")["reasons"]:
        yield f"{place}: the warnings of eligibility are not those of its event"
    seeds = [line for line in lines if line.startswith("seed:")]
    if seeds != [f"seed:{run.seed}"]:
        yield f"{place}: {seeds}, but SEED is {run.seed}"


def check_kept(run, found) -> Iterator[str]:
    """The kept artifact, taken apart, is what the log of its run says. found: artifact.Anatomy."""
    artifact, place = run.one("artifact"), "artifact.bin"
    if found.file_bytes != artifact["model_bytes"]:
        yield f"{place}: {found.file_bytes:,} bytes, the log says {artifact['model_bytes']:,}"
    if found.validation != run.one("val_data")["fingerprint"]:
        yield f"{place}: scored on the split {found.validation[:12]}, the log says another"
    for name, value in found.settings.items():
        ours = run.settings.get(name.lower())
        if str(int(ours) if isinstance(ours, bool) else ours) != value:
            yield f"{place}: its header says {name}={value}, settings.json {ours}"
    for event in run.all("size"):
        mine = [part for part in found.parts if part.role == event["role"]]
        facts = {
            "tensors": len(mine),
            "integers": sum(p.raw_integers for p in mine),
            "floats": sum(p.raw_floats for p in mine),
        }
        for key, value in facts.items():
            if event[key] != value:
                yield f"{place}: {event['role']} has {value:,} {key}, the log says {event[key]:,}"
        if not math.isclose(found.role_entropy(event["role"]), event["entropy"], rel_tol=DIGITS):
            yield f"{place}: the entropy of {event['role']} is not the log's"


def doubts(runs: list, loose: list[dict[str, int]], shown: list[int]) -> list[str]:
    """What nobody can derive from the files, in words; `shown`: steps that each log shows."""
    said = [
        f"train_loss of {len(run.all('step')) - count:,} steps that {run.log_name} does not "
        "show: only that the other facts of these steps follow from each other"
        for run, count in zip(runs, shown, strict=True)
        if len(run.all("step")) > count
    ]
    facts = ", ".join(
        f"{kind}'s {' and '.join(names)}"
        for kind, names in TRUSTED.items()
        if any(run.all(kind) for run in runs)
    )
    said.append(
        f"digits that the log line rounds away, of {facts}; of derived facts any beyond "
        "the ninth digit; artifact's sha256 of seeds whose artifact is not kept"
    )
    shapes = {re.sub(r"[0-9][0-9.,]*", "N", line) for part in loose for line in part}
    said += [f"log line {shape!r}: its numbers stand nowhere else" for shape in sorted(shapes)]
    return said
