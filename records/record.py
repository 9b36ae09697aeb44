"""Make a records folder from runs, check anybody's, compare two, and draw the board.

    python records/record.py new runs/A runs/B runs/C --name Wide --author Ann --github-id ann \\
        --blurb "What is new in a sentence or two." --track track_cpu_5min
    python records/record.py check records/track_cpu_5min/*/ [--rescore] [--json]
    python records/record.py show FOLDER
    python records/record.py compare FOLDER_A FOLDER_B
    python records/record.py board

Every number of a folder comes from the runs' own logs. `check` derives them all again and exits 1,
one line a finding, if anything disagrees; it never runs what a folder holds unless --rescore is
given.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import stats

RECORDS = Path(__file__).resolve().parent
sys.path.insert(0, str(RECORDS.parent))
VERSION = 1  # of what `new` writes; stands in every marker
LIMIT_BYTES = 16_000_000
ROLE_NAMES = {"mlp": "MLP", "attn": "attention", "emb": "token embedding", "aux": "the rest"}

# What each track asks for. reasons: why train_gpt.py may call a run of it not eligible (it speaks
# of the GPU track), as beginnings of its words.
TRACKS: dict[str, dict] = {
    "track_10min_16mb": {
        "title": "10 minutes on 8xH100, 16 MB", "device": "cuda", "train_seconds": 600,
        "eval_seconds": 600, "seeds": 3, "reasons": (), "artifact": False, "dataset": "fineweb10B_",
        "command": "torchrun --standalone --nproc_per_node=8 train_gpt.py"},
    "track_cpu_5min": {
        "title": "5 minutes on two CPU cores, 16 MB, built-in corpus", "device": "cpu",
        "train_seconds": 300, "eval_seconds": 600, "seeds": 3, "artifact": True,
        "reasons": ("ran on ", "the text is not FineWeb"), "dataset": "docs_",
        "command": "PRESET=mini ./run.sh"},
    "track_non_record_16mb": {
        "title": "anything under 16 MB, not ranked as a record", "device": "", "seeds": 1,
        "train_seconds": math.inf, "eval_seconds": math.inf, "artifact": False, "dataset": "",
        "reasons": ("ran on ", "the text is not FineWeb", "MAX_WALLCLOCK_SECONDS",
                    "EVAL_WALLCLOCK_SECONDS", "scoring took", "training and calibration took"),
        "command": "./run.sh"},
}
# Validation splits by fingerprint: tokens and bytes, counted once by data/prepare.py.
KNOWN_SPLITS = {
    "77200814ad844a601a18461c27b0507005ef525d5da225459b973ee4efe257ff": (164_359, 365_438),
}
OWN_SETTINGS = ("run_id", "runs_dir", "seed")  # differ between the runs of one entry
FINAL_LINES = ("Serialized model", "Code size", "Total submission size", "params:", "artifact ",
               "val_bpb:")


class Wrong(ValueError):
    """Runs that cannot be an entry, or a folder that cannot be read; the message is one line."""


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# =================================================================================================
# Reading runs
# =================================================================================================


@dataclass
class SeedRun:
    """What one run left: its log, its events, its settings, and where a reader finds each."""

    log_path: Path
    metrics_path: Path
    log: str
    events: list[dict]
    settings: dict

    def all(self, kind: str) -> list[dict]:
        """Events of a kind, in order."""
        return [event for event in self.events if event.get("event") == kind]

    def one(self, kind: str) -> dict:
        """The one event of a kind; raises Wrong if there is none, or another."""
        found = self.all(kind)
        if len(found) != 1:
            raise Wrong(f"{self.metrics_path}: {len(found)} events {kind!r}, expected 1: the run "
                        "did not end, or the file was changed")
        return found[0]

    @property
    def seed(self) -> int:
        """Its seed, as its log lists it."""
        match = re.search(r"^[* ] SEED +(\d+) ", self.log, re.M)
        if match is None:
            raise Wrong(f"{self.log_path}: lists no SEED")
        return int(match[1])

    def score(self, name: str) -> dict | None:
        """The last evaluation called `name`."""
        return next((e for e in reversed(self.all("eval")) if e["name"] == name), None)


def read_events(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; raises Wrong for one that is not a JSON object."""
    events = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise Wrong(f"{path}:{number}: not a JSON object")
        events.append(event)
    return events


def read_json(path: Path) -> dict:
    """A JSON object of a file; raises Wrong if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Wrong(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise Wrong(f"{path}: not a JSON object")
    return content


def read_run(log: Path, metrics: Path, settings: Path) -> SeedRun:
    """One run from its three files; raises Wrong if one is missing or unreadable."""
    for path in (log, metrics, settings):
        if not path.is_file():
            raise Wrong(f"{path}: no such file")
    try:
        return SeedRun(log, metrics, log.read_text(encoding="utf-8"), read_events(metrics),
                       read_json(settings))
    except UnicodeDecodeError as error:
        raise Wrong(f"{log.parent}: not UTF-8 text ({error})") from None


def read_entry(folder: Path) -> list[SeedRun]:
    """The runs of a records folder that `new` made, by seed."""
    logs = sorted(folder.glob("train_seed*.log"), key=lambda p: int(re.sub(r"\D", "", p.stem)))
    return [read_run(log, folder / f"metrics_{log.stem.removeprefix('train_')}.jsonl",
                     folder / "settings.json") for log in logs]


# =================================================================================================
# Facts of an entry
# =================================================================================================


def seed_facts(run: SeedRun) -> dict:
    """Results of one seed in the words of submission.json."""
    final, summary, artifact = run.one("final"), run.one("summary"), run.one("artifact")
    floats = run.score("float_chunked")
    return {
        "val_bpb": final["val_bpb"], "val_loss": final["val_loss"], "steps": summary["steps"],
        "train_s": summary["seconds"], "eval_s": summary["eval_seconds"],
        "tokens_per_second": summary["rate"], "artifact_bytes": artifact["model_bytes"],
        "pre_quant_val_bpb": floats["val_bpb"] if floats else None,
    }


def show(value: object) -> str:
    """A setting as it is written in the environment."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def common_settings(settings: dict) -> dict:
    """What all runs of an entry share."""
    return {name: value for name, value in settings.items() if name not in OWN_SETTINGS}


def defaults_of(script: str) -> dict:
    """Defaults of the settings in a train_gpt.py, read from its text, never run."""
    defaults = {}
    for node in ast.walk(ast.parse(script)):
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Call):
                    defaults[line.target.id] = ast.literal_eval(line.value.args[0])
    return defaults


def entry_facts(runs: list[SeedRun], script: bytes, about: dict) -> dict:
    """submission.json without its list of files: every number from the runs."""
    seeds = {str(run.seed): seed_facts(run) for run in runs}
    scores = [facts["val_bpb"] for facts in seeds.values()]
    losses = [facts["val_loss"] for facts in seeds.values()]
    first, data = runs[0], runs[0].one("val_data")
    machine, versions = first.one("machine"), first.one("versions")
    settings, defaults = common_settings(first.settings), defaults_of(script.decode())
    changed = {name.upper(): show(value) for name, value in settings.items()
               if name in defaults and defaults[name] != value}
    largest = max(facts["artifact_bytes"] for facts in seeds.values())
    return {
        **about,
        "val_bpb": statistics.fmean(scores), "val_loss": statistics.fmean(losses),
        "val_bpb_std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "val_loss_std": statistics.stdev(losses) if len(losses) > 1 else 0.0,
        "seeds": [run.seed for run in runs], "seed_results": seeds,
        "bytes_total": largest + len(script), "bytes_code": len(script),
        "hardware": f"{machine['world_size']} x {machine['name']} ({machine['device']})",
        "pytorch_version": versions["torch"], "python_version": versions["python"],
        "params": first.one("model")["params"], "settings": changed,
        "data": {"dataset": first.one("train_data")["dataset"], "fingerprint": data["fingerprint"],
                 "val_tokens": data["tokens"], "val_bytes": data["num_bytes"]},
    }


# =================================================================================================
# Checking: each function yields findings, one line each, that name the place
# =================================================================================================


def templates_of(script: str) -> list[str]:
    """Texts of a script that look like log lines to be filled in; only plain fields count."""
    found = {}
    for node in ast.walk(ast.parse(script)):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and "\n" not in text:
            fields = re.findall(r"\{(\w+)(?::[,.\w]{1,5})?\}", text)
            if fields and len(fields) == text.count("{"):
                found[text] = None
    return list(found)


def said_by(templates: list[str], event: dict) -> Iterator[tuple[str, str]]:
    """The lines that a script's templates make of an event, and each one's template."""
    for template in templates:
        try:
            yield template.format(**event), template
        except (KeyError, ValueError, IndexError, TypeError):
            continue


def check_log(run: SeedRun, script: str) -> Iterator[str]:
    """The log and the metrics file of a run say the same, line by line."""
    lines, templates = run.log.splitlines(), templates_of(script)
    expected, shapes, here = set(), {}, set(lines)
    for number, event in enumerate(run.events, start=1):
        said = dict(said_by(templates, {k: v for k, v in event.items() if k != "event"}))
        expected |= said.keys()
        shapes |= {re.sub(r"\\{.*?\\}", ".*", re.escape(template)): None
                   for template in said.values()}
        if said and not said.keys() & here and event.get("event") != "step":
            yield (f"{run.metrics_path.name}:{number}: event {event.get('event')!r} stands in no "
                   f"line of {run.log_path.name}")
    of_events = re.compile("|".join(shapes) or r"(?!)")
    for number, line in enumerate(lines, start=1):
        if line not in expected and of_events.fullmatch(line):
            yield f"{run.log_path.name}:{number}: not what {run.metrics_path.name} says: {line!r}"
    for beginning in FINAL_LINES:
        if not any(line.startswith(beginning) for line in lines):
            yield f"{run.log_path.name}: final line {beginning!r} is missing"


def check_listing(run: SeedRun) -> Iterator[str]:
    """The settings listed at the head of the log are those of settings.json."""
    listed = dict(re.findall(r"^[* ] ([A-Z][A-Z0-9_]+) +(\S.*)$", run.log, re.M))
    for name, value in common_settings(run.settings).items():
        stated, expected = listed.get(name.upper(), "not listed"), show(value) or "''"
        if not f"{stated} ".startswith(f"{expected} "):
            yield (f"{run.log_path.name}: {name.upper()} is {stated.split(' ')[0]}, but "
                   f"settings.json says {expected}")


def check_numbers(run: SeedRun, script: bytes) -> Iterator[str]:
    """A run's own numbers agree with each other and with the script."""
    place, source, artifact = run.metrics_path.name, run.one("source"), run.one("artifact")
    if source["sha256"] != hashlib.sha256(script).hexdigest():
        yield f"{place}: another train_gpt.py ran (sha256 {source['sha256'][:12]})"
    if source["num_bytes"] != len(script) or artifact["code_bytes"] != len(script):
        yield f"{place}: code bytes are not the {len(script):,} of train_gpt.py"
    if artifact["total"] != artifact["model_bytes"] + artifact["code_bytes"]:
        yield f"{place}: bytes do not add up: {artifact['total']:,}"
    if artifact["total"] > LIMIT_BYTES:
        yield f"{place}: {artifact['total']:,} bytes are over the cap of {LIMIT_BYTES:,}"
    for event in run.all("eval"):
        bpb = event["val_loss"] * event["targets"] / (math.log(2) * event["num_bytes"])
        if not math.isclose(bpb, event["val_bpb"], rel_tol=1e-9):
            yield f"{place}: {event['name']}: val_bpb {event['val_bpb']} is not {bpb:.8f}"
    data, final = run.one("val_data"), run.one("final")
    if data["num_bytes"] != data["recorded"]:
        yield f"{place}: {data['num_bytes']:,} bytes counted, {data['recorded']:,} recorded"
    known = KNOWN_SPLITS.get(data["fingerprint"])
    if known and known != (data["tokens"], data["num_bytes"]):
        yield f"{place}: this validation split has {known[0]:,} tokens and {known[1]:,} bytes"
    scored = run.score(final["name"])
    if scored is None or (scored["val_bpb"], scored["val_loss"]) != (
            final["val_bpb"], final["val_loss"]):
        yield f"{place}: the final val_bpb is not the score of {final['name']}"
    elif not data["tokens"] - run.settings["eval_seq_len"] <= scored["targets"] < data["tokens"]:
        yield f"{place}: {scored['targets']:,} targets scored of {data['tokens']:,} tokens"
    if not scored or not scored["legal"]:
        yield f"{place}: the headline is not a legal score"
    for event in run.all("activity"):
        if not 0 < event["steps"] <= event["of"]:
            yield f"{place}: {event['name']} was configured and acted {event['steps']} times"
    steps = [event["step"] for event in run.all("step")]
    if steps != list(range(1, run.one("summary")["steps"] + 1)):
        yield f"{place}: the steps are not 1, 2, ... to the last"
    times = [event["ms"] for event in run.all("step")]
    if times != sorted(times):
        yield f"{place}: step times run backwards"


def check_track(run: SeedRun, track: str) -> Iterator[str]:
    """A run keeps the rules of its track."""
    rules, place, summary = TRACKS[track], run.metrics_path.name, run.one("summary")
    settings, machine = run.settings, run.one("machine")
    if rules["device"] and machine["device"] != rules["device"]:
        yield f"{place}: ran on {machine['device']}, {track} is for {rules['device']}"
    if not run.one("train_data")["dataset"].startswith(rules["dataset"]):
        yield f"{place}: the data must be {rules['dataset']}*, not another text"
    if summary["seconds"] > rules["train_seconds"]:
        yield f"{place}: training and calibration took {summary['seconds']:.1f} s"
    if summary["eval_seconds"] > rules["eval_seconds"]:
        yield f"{place}: scoring took {summary['eval_seconds']:.1f} s"
    if rules["seeds"] > 1 and (settings["max_wallclock_seconds"] == 0 or
                               settings["max_wallclock_seconds"] > rules["train_seconds"]):
        yield f"settings.json: MAX_WALLCLOCK_SECONDS={settings['max_wallclock_seconds']}"
    for reason in filter(None, run.one("eligibility")["reasons"].split("; ")):
        if not reason.startswith(rules["reasons"]):
            yield f"{place}: not eligible: {reason}"
    if run.all("resumed"):
        yield f"{place}: the run was resumed from a checkpoint"


def check_together(runs: list[SeedRun], track: str) -> Iterator[str]:
    """The runs of one entry belong together: one script, one configuration, different seeds."""
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        yield f"seeds {seeds}: one stands twice"
    if len(runs) < TRACKS[track]["seeds"]:
        yield f"{len(runs)} seeds, {track} asks for {TRACKS[track]['seeds']}"
    for kind, keys in (("source", ("sha256",)), ("val_data", ("fingerprint", "tokens")),
                       ("train_data", ("dataset", "tokens")), ("model", ("params",)),
                       ("machine", ("device", "world_size")), ("versions", ("torch",))):
        for key in keys:
            if len(values := {run.one(kind)[key] for run in runs}) > 1:
                yield f"the runs differ in {kind} {key}: {sorted(map(str, values))}"
    first = common_settings(runs[0].settings)
    for run in runs[1:]:
        for name, value in common_settings(run.settings).items():
            if first.get(name) != value:
                yield (f"{run.log_path}: {name.upper()}={show(value)}, but "
                       f"{show(first.get(name))} in {runs[0].log_path}")
    curves = [tuple(e["train_loss"] for e in run.all("step")[:20]) for run in runs]
    if len(set(curves)) < len(curves):
        yield "two seeds have the same loss curve"


def check_claims(folder: Path, runs: list[SeedRun], script: bytes, claims: dict) -> Iterator[str]:
    """submission.json and README.md say what the logs say, and no file was exchanged."""
    about = {key: claims.get(key) for key in ABOUT}
    derived = entry_facts(runs, script, about)
    yield from differences("submission.json", derived, {k: claims.get(k) for k in derived})
    for path in sorted(folder.iterdir()):
        if path.name in ("submission.json", "NOTES.md") or path.name.startswith("."):
            continue
        recorded = claims.get("files", {}).get(path.name)
        if recorded is None:
            yield f"{path.name}: not listed in submission.json"
        elif sha256(path) != recorded:
            yield f"{path.name}: changed since submission.json was written (sha256)"
    for name in claims.get("files", {}):
        if not (folder / name).is_file():
            yield f"{name}: listed in submission.json, but missing"
    for run in runs:
        if run.log_path.name != f"train_seed{run.seed}.log":
            yield f"{run.log_path.name}: its log says SEED {run.seed}"
    best = min(runs, key=lambda run: run.one("final")["val_bpb"])
    artifact = folder / "artifact.bin"
    if artifact.is_file() and sha256(artifact) != best.one("artifact")["sha256"]:
        yield "artifact.bin: not the artifact of the best seed's log"
    if not artifact.is_file() and TRACKS[about["track"]]["artifact"]:
        yield "artifact.bin: missing; this track keeps the best seed's"
    page = folder / "README.md"
    found = blocks_in(page.read_text(encoding="utf-8")) if page.is_file() else {}
    for name, text in readme_blocks(derived, runs, claims.get("base")).items():
        if found.get(name) != text:
            wrong = next((a for a, b in zip((found.get(name) or "").splitlines(),
                                            text.splitlines(), strict=False) if a != b), "a line")
            yield f"README.md: block {name!r} is not what the logs give: {wrong!r}"


def differences(place: str, derived: object, claimed: object) -> Iterator[str]:
    """Where a claimed JSON value is not the derived one, by path."""
    if isinstance(derived, dict) and isinstance(claimed, dict):
        for key in sorted({*derived, *claimed}):
            yield from differences(f"{place}: {key}", derived.get(key), claimed.get(key))
    elif isinstance(derived, float) and isinstance(claimed, (int, float)):
        if not math.isclose(derived, claimed, rel_tol=1e-12, abs_tol=1e-15):
            yield f"{place} is {claimed}, the logs give {derived}"
    elif derived != claimed:
        yield f"{place} is {claimed!r}, the logs give {derived!r}"


def check_own(folder: Path, rescore: bool) -> tuple[list[str], list[str]]:
    """Findings on a folder that `new` made, and what was not looked at."""
    claims, script_path = read_json(folder / "submission.json"), folder / "train_gpt.py"
    if not script_path.is_file():
        raise Wrong(f"{script_path}: no such file")
    if claims.get("track") not in TRACKS:
        raise Wrong(f"{folder}/submission.json: track {claims.get('track')!r} is not one of "
                    f"{', '.join(TRACKS)}")
    script, runs = script_path.read_bytes(), read_entry(folder)
    if not runs:
        raise Wrong(f"{folder}: no train_seed*.log")
    findings = list(check_together(runs, claims["track"]))
    for run in runs:
        findings += check_listing(run)
        findings += check_log(run, script.decode())
        findings += check_numbers(run, script)
        findings += check_track(run, claims["track"])
    findings += check_claims(folder, runs, script, claims)
    unverified, base = [], claims.get("base")
    if base and (folder.parent / base["folder"]).is_dir():
        findings += differences("submission.json: base", against(
            folder.parent / base["folder"], claims["settings"], script), base)
    elif base:
        unverified.append(f"what changed against {base['folder']}, which is not beside it")
    if not rescore or not (folder / "artifact.bin").is_file():
        unverified.append("the artifact's score and the rules (--rescore, with the artifact there)")
    else:
        findings += check_score_again(folder, runs)
        findings += check_rules_again(folder, runs[0], claims)
    return findings, unverified


def check_rules_again(folder: Path, run: SeedRun, claims: dict) -> Iterator[str]:
    """The compliance suite gives on artifact.bin what the folder claims."""
    from compliance import suite
    yield from differences("submission.json: compliance", suite(
        folder / "train_gpt.py", folder / "artifact.bin", run.settings), claims.get("compliance"))


def check_score_again(folder: Path, runs: list[SeedRun]) -> Iterator[str]:
    """Score artifact.bin with the folder's own script; data is looked for where we stand."""
    best = min(run.one("final")["val_bpb"] for run in runs)
    done = subprocess.run([sys.executable, str(folder.resolve() / "train_gpt.py"), "--eval",
                           str(folder.resolve() / "artifact.bin")], cwd=RECORDS.parent, text=True,
                          capture_output=True)
    match = re.search(r"^val_bpb:([0-9.]+)", done.stdout, re.M)
    if match is None:
        yield f"artifact.bin: --eval failed: {done.stderr.strip().splitlines()[-1:]}"
    elif abs(float(match[1]) - best) > 1e-4:  # another processor rounds differently
        yield f"artifact.bin: scores {match[1]} here, the log says {best:.8f}"


# What reviewers find in folders of the official repository, by log line.
OFFICIAL_LINES = {
    "final score": r"^(?:final_int\d\w*_exact|legal_ttt_exact)\b.*?val_bpb:([0-9.]+)",
    "total bytes": r"^Total submission size[^:]*: ?(\d+)",
    "training stop": r"^stopping_early: wallclock_cap train_time:(\d+)ms",
    "code bytes": r"^Code size: ?(\d+)",
    "evaluation time": r"^(?:final|legal_ttt)\w*.*eval_time:(\d+)ms",
}
SIZE_NAMES = ("bytes_total", "artifact_bytes", "artifact_size_bytes", "artifact_bytes_max",
              "bytes_model_int6_zstd", "bytes_model_int8_zlib")


def check_official(folder: Path) -> tuple[list[str], list[str]]:
    """Findings on a folder of the official repository's format, and what cannot be verified."""
    claims, findings = read_json(folder / "submission.json"), []
    unknown = ["no metrics and no activity ledger: whether each technique acted",
               "no artifact: whether the score can be had again"]
    logs = sorted({*folder.glob("*.log"), *folder.glob("train*.txt")})
    found: dict[str, dict[Path, float]] = {name: {} for name in OFFICIAL_LINES}
    for log in logs:
        text = log.read_text(encoding="utf-8", errors="replace")
        for name, pattern in OFFICIAL_LINES.items():
            if values := re.findall(pattern, text, re.M):
                found[name][log] = float(values[-1])
            elif name in ("final score", "total bytes"):
                findings.append(f"{log.name}: no line of the {name}")
            else:
                unknown.append(f"{log.name}: no line of the {name}")
    if len(logs) < 3:
        findings.append(f"{len(logs)} logs, a record needs 3 seeds")
    scores = list(found["final score"].values())
    if scores and isinstance(claims.get("val_bpb"), (int, float)):
        mean, stated = statistics.fmean(scores), claims["val_bpb"]
        digits = max(4, len(str(stated).partition(".")[2]))
        if abs(stated - mean) > 0.51 * 10.0**-min(digits, 8):
            findings.append(f"submission.json: val_bpb is {stated}, the logs' mean is {mean:.8f}")
    for log, total in found["total bytes"].items():
        if total > LIMIT_BYTES:
            findings.append(f"{log.name}: {total:,.0f} bytes are over the cap of {LIMIT_BYTES:,}")
    sizes = {name: claims[name] for name in SIZE_NAMES if name in claims}
    totals = set(found["total bytes"].values())
    for name, value in sizes.items():
        if totals and name == "bytes_total" and value not in totals:
            findings.append(f"submission.json: {name} is {value}, the logs say "
                            f"{', '.join(f'{t:.0f}' for t in sorted(totals))}")
    if not sizes:
        findings.append(f"submission.json: no size under any of {', '.join(SIZE_NAMES)}")
    for log, ms in found["training stop"].items():
        if ms > 600_500:
            findings.append(f"{log.name}: training took {ms / 1e3:.1f} s")
    for log, ms in found["evaluation time"].items():
        if ms > 600_000:
            findings.append(f"{log.name}: evaluation took {ms / 1e3:.1f} s")
    script = folder / "train_gpt.py"
    if not script.is_file():
        findings.append("train_gpt.py: missing")
    for log, size in found["code bytes"].items():
        if script.is_file() and size != script.stat().st_size:
            findings.append(f"{log.name}: code bytes {size:.0f}, but train_gpt.py has "
                            f"{script.stat().st_size}")
    results = claims.get("seed_results")
    if isinstance(results, dict):
        stated = sorted(r["val_bpb"] for r in results.values()
                        if isinstance(r, dict) and isinstance(r.get("val_bpb"), (int, float)))
        for value in stated:
            if scores and min(abs(value - score) for score in scores) > 5.1e-5:
                findings.append(f"submission.json: val_bpb {value} of a seed is in no log")
    if not (folder / "README.md").is_file():
        findings.append("README.md: missing")
    return findings, unknown


def check_folder(folder: Path, rescore: bool) -> dict:
    """What is wrong with a folder, and what cannot be told."""
    try:
        if not folder.is_dir():
            raise Wrong(f"{folder}: no such folder")
        if list(folder.glob("metrics_seed*.jsonl")):
            findings, unverified = check_own(folder, rescore)
            return {"folder": str(folder), "format": "own", "findings": findings,
                    "unverified": unverified}
        findings, unverified = check_official(folder)
        return {"folder": str(folder), "format": "official", "findings": findings,
                "unverified": unverified}
    except Wrong as wrong:
        findings = [str(wrong)]
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        findings = [f"not in the form that `new` writes ({type(error).__name__}: {error})"]
    return {"folder": str(folder), "format": "unreadable", "findings": findings, "unverified": []}


# =================================================================================================
# Writing a folder
# =================================================================================================

ABOUT = ("author", "github_id", "name", "date", "track", "blurb", "base", "compliance")


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a block of numbers in README.md."""
    return f"<!-- record.py {VERSION}: {name} -->", f"<!-- end {name} -->"


def blocks_in(page: str) -> dict[str, str]:
    """The blocks between markers, by name."""
    return {name: text.strip("\n") for name, text in re.findall(
        r"<!-- record\.py \d+: (\w+) -->\n(.*?)<!-- end \1 -->", page, re.S)}


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def readme_blocks(facts: dict, runs: list[SeedRun], base: dict | None) -> dict[str, str]:
    """Every number of README.md, from the logs: block name to text."""
    rows = [(seed, f"{r['val_bpb']:.6f}", f"{r['val_loss']:.6f}", f"{r['pre_quant_val_bpb']:.6f}",
             r["steps"], f"{r['artifact_bytes']:,}") for seed, r in facts["seed_results"].items()]
    rows.append(("mean (std)", f"**{facts['val_bpb']:.6f}** ({facts['val_bpb_std']:.6f})",
                 f"{facts['val_loss']:.6f} ({facts['val_loss_std']:.6f})", "", "", ""))
    sizes = [f"Code {facts['bytes_code']:,} bytes; code and largest artifact "
             f"{facts['bytes_total']:,} of {LIMIT_BYTES:,} bytes.",
             f"Validation text: {facts['data']['val_tokens']:,} tokens, "
             f"{facts['data']['val_bytes']:,} bytes, split {facts['data']['fingerprint'][:12]}."]
    settings = runs[0].settings
    shape = (("parameters", f"{facts['params']:,}"), ("layers", settings["num_layers"]),
             ("width", settings["model_dim"]),
             ("query / key-value heads", f"{settings['num_heads']} / {settings['num_kv_heads']}"),
             ("MLP width", int(settings["mlp_mult"] * settings["model_dim"])),
             ("vocabulary", settings["vocab_size"]), ("tokens a row", settings["train_seq_len"]),
             ("tokens a step", f"{settings['train_batch_tokens']:,}"), ("bits", settings["bits"]))
    timing = [(seed, f"{r['train_s']:.1f}", f"{r['eval_s']:.1f}",
               f"{run.one('trained')['ms'] / r['steps']:.1f}",
               f"{r['tokens_per_second']:,.0f}")
              for (seed, r), run in zip(facts["seed_results"].items(), runs, strict=True)]
    own = " ".join(f"{name}={value}" for name, value in facts["settings"].items()
                   if name == "PRESET") or "the defaults"
    changed = "\n".join(f"    {name}={value}" for name, value in facts["settings"].items())
    against = "" if base is None else (
        f"Against {base['name']} (val_bpb {base['val_bpb']:.6f}, difference "
        f"{facts['val_bpb'] - base['val_bpb']:+.6f}): "
        f"{', '.join(base['changes']) or 'the same settings'}; source {base['source']}.\n\n")
    compliance = facts["compliance"] or {}
    return {
        "results": table(("seed", "val_bpb", "val_loss", "before quantisation", "steps",
                          "artifact bytes"), rows) + "\n\n" + "\n".join(sizes),
        "changes": f"{against}Settings that differ from the defaults of this script ({own}):\n\n"
                   + changed,
        "architecture": table(("", ""), list(shape)),
        "timing": table(("seed", "train and calibrate, s", "score, s", "ms a step",
                         "tokens a second"), timing)
                  + f"\n\n{facts['hardware']}, torch {facts['pytorch_version']}.",
        "compliance": table(("condition", "holds"), [
            (name.replace("_", " "), "yes" if holds else "NO")
            for name, holds in compliance.items()]),
    }


def readme(facts: dict, blocks: dict[str, str], command: str) -> str:
    """The page of an entry."""
    def block(name: str) -> str:
        begin, end = markers(name)
        return f"{begin}\n{blocks[name]}\n{end}"

    return f"""# {facts['name']}

{facts['blurb']}

{facts['author']} (GitHub: {facts['github_id']}), \
{facts['date']}, {TRACKS[facts['track']]['title']}.

## Results

{block('results')}

![Training loss](loss.png)
![Bits per byte from float weights to the headline](bpb.png)

## What it is

{block('changes')}

{block('architecture')}

![Artifact bytes](bytes.png)

## Timing

{block('timing')}

## Rules

{block('compliance')}

## Again

    {command}

with SEED set to each of {', '.join(map(str, facts['seeds']))} and this folder's `train_gpt.py`;
then `python records/record.py check` on this folder, with `--rescore` to score its artifact.
"""


def draw(folder: Path, runs: list[SeedRun]) -> None:
    """loss.png, bytes.png and bpb.png of an entry."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for run in runs:
        steps = run.all("step")
        loss = np.array([e["train_loss"] for e in steps])
        width = max(1, len(loss) // 60)
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        where = np.arange(width - 1, len(loss))
        for axis, x in ((by_step, [e["step"] for e in steps]),
                        (by_time, [e["ms"] / 1e3 for e in steps])):
            axis.plot(np.array(x)[where], smooth, linewidth=1, label=f"seed {run.seed}")
    by_step.set(xlabel="step", ylabel="training loss, nats a token (running mean)")
    by_time.set(xlabel="seconds of training")
    by_step.legend()
    save(figure, folder / "loss.png", plt)

    best = min(runs, key=lambda run: run.one("final")["val_bpb"])
    figure, axis = plt.subplots(figsize=(7, 3))
    sizes = {e["role"]: (e["entropy"], e["floats"]) for e in best.all("size")}
    names = [ROLE_NAMES.get(role, role) for role in sizes]
    integers, floats = (np.array([s[i] for s in sizes.values()]) / 1e3 for i in (0, 1))
    axis.barh(names, integers, label="integers (entropy)")
    axis.barh(names, floats, left=integers, label="scales and floats")
    axis.invert_yaxis()
    axis.set(xlabel="kB before compression of the whole", title=f"seed {best.seed}: "
             f"{best.one('artifact')['model_bytes']:,} bytes in the artifact")
    axis.legend()
    save(figure, folder / "bytes.png", plt)

    figure, axis = plt.subplots(figsize=(7, 4))
    for run in runs:
        scores = {e["name"]: e["val_bpb"] for e in run.all("eval") if not e["step"]}
        axis.plot(list(scores), list(scores.values()), marker="o", label=f"seed {run.seed}")
    axis.set(ylabel="bits per byte")
    axis.tick_params(axis="x", rotation=12)
    axis.legend()
    save(figure, folder / "bpb.png", plt)


def save(figure, path: Path, plt) -> None:
    """Write a picture and let go of it."""
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def refuse(findings: list[str]) -> None:
    """Raise Wrong with the first of the findings, and how many there are."""
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise Wrong(findings[0] + more)


def against(base: Path | None, facts_settings: dict, script: bytes) -> dict | None:
    """What changed against another entry: settings, and lines of source."""
    if base is None:
        return None
    claims = read_json(base / "submission.json")
    theirs, ours = claims["settings"], facts_settings
    changes = [f"{name} {theirs.get(name, 'default')} -> {ours.get(name, 'default')}"
               for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    import difflib
    old = (base / "train_gpt.py").read_text(encoding="utf-8").splitlines()
    delta = [line[0] for line in difflib.unified_diff(old, script.decode().splitlines(), n=0)
             if not line.startswith(("---", "+++", "@@"))]
    source = f"+{delta.count('+')} -{delta.count('-')} lines" if delta else "the same"
    return {"folder": base.name, "name": claims["name"], "val_bpb": claims["val_bpb"],
            "changes": changes, "source": source}


def make_entry(run_folders: list[Path], about: dict, base: Path | None, root: Path) -> Path:
    """Build an entry's folder from run folders alone; raises Wrong, leaving nothing behind."""
    if about["track"] not in TRACKS:
        raise Wrong(f"--track {about['track']}: expected one of {', '.join(TRACKS)}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,60}", about["name"]):
        raise Wrong(f"--name {about['name']!r}: letters, digits, '_', '-' and '.', at most 61")
    runs = [read_run(f / "log.txt", f / "metrics.jsonl", f / "settings.json") for f in run_folders]
    scripts = {(f / "train_gpt.py").read_bytes() for f in run_folders
               if (f / "train_gpt.py").is_file()}
    if len(scripts) != 1:
        raise Wrong(f"{len(scripts)} different train_gpt.py in the run folders, expected one")
    (script,) = scripts
    order = sorted(range(len(runs)), key=lambda n: runs[n].seed)
    runs, run_folders = [runs[n] for n in order], [run_folders[n] for n in order]
    findings = list(check_together(runs, about["track"]))
    for run, folder in zip(runs, run_folders, strict=True):
        mine = [*check_numbers(run, script), *check_track(run, about["track"]),
                *check_listing(run), *check_log(run, script.decode())]
        artifact = folder / "artifact.bin"
        if not artifact.is_file() or sha256(artifact) != run.one("artifact")["sha256"]:
            mine.append("artifact.bin is not the one the log speaks of")
        findings += [f"{folder}: {finding}" for finding in mine]
    refuse(findings)
    best = min(range(len(runs)), key=lambda n: runs[n].one("final")["val_bpb"])
    from compliance import suite  # runs the script that ran: ours, or the entrant's own
    about["compliance"] = suite(run_folders[best] / "train_gpt.py",
                                run_folders[best] / "artifact.bin", runs[best].settings)
    if broken := [name for name, holds in about["compliance"].items() if not holds]:
        raise Wrong(f"the artifact of seed {runs[best].seed} breaks the rules: {broken}")
    target = root / about["track"] / f"{about['date']}_{about['name']}"
    if target.exists():
        raise Wrong(f"{target} exists already; nothing in it was touched")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
        folder = Path(scratch, "entry")
        folder.mkdir()
        write_entry(folder, runs, script, about, base, run_folders[best])
        folder.rename(target)
    return target


def write_entry(folder: Path, runs: list[SeedRun], script: bytes, about: dict, base: Path | None,
                best: Path) -> None:
    """The files of an entry."""
    (folder / "train_gpt.py").write_bytes(script)
    for run in runs:
        shutil.copyfile(run.log_path, folder / f"train_seed{run.seed}.log")
        shutil.copyfile(run.metrics_path, folder / f"metrics_seed{run.seed}.jsonl")
    (folder / "settings.json").write_text(json.dumps(common_settings(runs[0].settings), indent=1)
                                          + "\n", encoding="utf-8")
    shutil.copyfile(RECORDS.parent / "requirements.txt", folder / "requirements.txt")
    if TRACKS[about["track"]]["artifact"]:
        shutil.copyfile(best / "artifact.bin", folder / "artifact.bin")
    facts = entry_facts(runs, script, {key: about.get(key) for key in ABOUT})
    facts["base"] = against(base, facts["settings"], script)
    draw(folder, runs)
    overrides = facts["settings"]
    command = "SEED=$SEED " + (f"PRESET={overrides['PRESET']} " if "PRESET" in overrides else "") \
        + "".join(f"{name}={value} " for name, value in given_by_hand(facts, runs[0]).items()) \
        + ("torchrun --standalone --nproc_per_node=8 train_gpt.py"
           if TRACKS[about["track"]]["device"] == "cuda" else "./run.sh")
    (folder / "README.md").write_text(
        readme(facts, readme_blocks(facts, runs, facts["base"]), command), encoding="utf-8")
    facts["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / "submission.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def given_by_hand(facts: dict, run: SeedRun) -> dict[str, str]:
    """Settings that neither the defaults nor PRESET give, so that the command must."""
    from train_gpt import Config
    preset = facts["settings"].get("PRESET", "")
    expected = common_settings(vars(Config.from_env({"PRESET": preset} if preset else {})[0]))
    return {name.upper(): show(value) for name, value in common_settings(run.settings).items()
            if name in expected and expected[name] != value and name != "preset"}


# =================================================================================================
# Comparing two entries, and the board
# =================================================================================================


@dataclass
class Comparison:
    """B minus A in one unit; less is better."""

    paired: bool
    count: int
    difference: float
    interval: tuple[float, float]
    p_better: float  # one-sided: that B is no better than A and chance made it look so
    p_by_margin: float = field(default=1.0)  # the same for "better by the README's 0.005 nats"


def compare_scores(a: dict[str, float], b: dict[str, float], margin: float = 0.0) -> Comparison:
    """Paired t-test over common seeds if there are two or more, else Welch's t-test (scipy)."""
    common = sorted(set(a) & set(b))
    if len(common) >= 2:
        x, y = ([scores[seed] for seed in common] for scores in (a, b))

        def test(shift: float, alternative: str):
            return stats.ttest_rel([v + shift for v in y], x, alternative=alternative)
    else:
        if min(len(a), len(b)) < 2:
            raise Wrong("at least two seeds on each side are needed")
        x, y = list(a.values()), list(b.values())

        def test(shift: float, alternative: str):
            return stats.ttest_ind([v + shift for v in y], x, equal_var=False,
                                   alternative=alternative)
    interval = test(0.0, "two-sided").confidence_interval(0.95)
    return Comparison(len(common) >= 2, len(common) if len(common) >= 2 else len(x) + len(y),
                      statistics.fmean(y) - statistics.fmean(x),
                      (float(interval.low), float(interval.high)),
                      float(test(0.0, "less").pvalue), float(test(margin, "less").pvalue))


def compare_text(a: dict, b: dict) -> str:
    """Two entries in words that take no statistics to read."""
    units = {}
    for unit, margin in (("val_loss", 0.005), ("val_bpb", 0.0)):
        units[unit] = compare_scores(*({seed: r[unit] for seed, r in claims["seed_results"].items()}
                                       for claims in (a, b)), margin)
    nats, bpb = units["val_loss"], units["val_bpb"]
    same_text = a["data"]["fingerprint"] == b["data"]["fingerprint"]
    better = bpb.difference < 0
    clear = bpb.interval[1] < 0 or bpb.interval[0] > 0
    how = f"the same {bpb.count} seeds on both sides" if bpb.paired else \
        f"{bpb.count} runs, different seeds on the two sides"
    lines = [
        f"A  {a['name']}: {a['val_bpb']:.6f} bits per byte", f"B  {b['name']}: "
        f"{b['val_bpb']:.6f} bits per byte",
        f"B is {'better' if better else 'worse'} by {abs(bpb.difference):.6f} bits per byte, "
        f"{abs(nats.difference):.6f} nats a token, judged by {how}.",
        f"If the runs were repeated many times, the true difference (B - A) would be expected "
        f"between {bpb.interval[0]:+.6f} and {bpb.interval[1]:+.6f} bits per byte (95 %).",
        "That range leaves out zero: the difference is not chance." if clear else
        "That range holds zero: these runs cannot tell which is better.",
        f"Challenge README (better by 0.005 nats at p < 0.01): "
        f"{'met' if nats.p_by_margin < 0.01 else 'not met'} (p = {nats.p_by_margin:.3g}).",
        f"Practice since (better than the frontier of its day at p < 0.25): "
        f"{'met' if nats.p_better < 0.25 else 'not met'} (p = {nats.p_better:.3g}).",
    ]
    if not same_text:
        lines.insert(0, "warning: A and B were scored on different validation text; nothing below "
                        "means anything")
    return "\n".join(lines)


def entries(root: Path) -> list[tuple[Path, dict]]:
    """All entries under the tracks, best first."""
    found = [(path.parent, read_json(path)) for track in TRACKS
             for path in (root / track).glob("*/submission.json")]
    return sorted(found, key=lambda pair: pair[1]["val_bpb"])


def board(root: Path) -> str:
    """records/README.md: one table a track and validation text."""
    lines = ["# Records", "", "Written by `python records/record.py board`; less is better. "
             "Different validation text is never ranked together. Each folder can be checked with "
             "`python records/record.py check FOLDER`.", ""]
    found = entries(root)
    for track, rules in TRACKS.items():
        lines += [f"## {rules['title']} (`{track}`)", ""]
        mine = [pair for pair in found if pair[1]["track"] == track]
        if not mine:
            lines += [f"Nobody has run it yet. To be the first: three seeds of "
                      f"`{rules['command']}`, then `python records/record.py new`.", ""]
        for fingerprint in sorted({claims["data"]["fingerprint"] for _, claims in mine}):
            rows = [(rank, f"[{c['name']}]({folder.relative_to(root)})", f"{c['val_bpb']:.5f}",
                     f"{c['val_bpb_std']:.5f}", len(c["seeds"]), f"{c['bytes_total']:,}",
                     f"{c['params']:,}", c["author"], c["date"])
                    for rank, (folder, c) in enumerate(
                        (p for p in mine if p[1]["data"]["fingerprint"] == fingerprint), start=1)]
            data = next(c["data"] for _, c in mine if c["data"]["fingerprint"] == fingerprint)
            lines += [f"Text: {data['dataset']}, {data['val_bytes']:,} validation bytes, split "
                      f"{fingerprint[:12]}.", "",
                      table(("", "entry", "val_bpb", "std", "seeds", "bytes", "parameters",
                             "author", "date"), rows), ""]
    if found:
        lines += ["![Score of every entry](board.png)", ""]
    lines += ["[SYSTEMS.md](SYSTEMS.md) says what each preset is.", ""]
    return "\n".join(lines)


def draw_board(root: Path) -> None:
    """board.png: bits per byte with the spread of the seeds, entry by entry."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = entries(root)
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.45 * len(found)))
    for track in TRACKS:
        mine = [c for _, c in found if c["track"] == track]
        if mine:
            axis.errorbar([c["val_bpb"] for c in mine], [c["name"] for c in mine], fmt="o",
                          xerr=[c["val_bpb_std"] for c in mine], capsize=3, label=track)
    axis.set(xlabel="bits per byte, mean and standard deviation over seeds (less is better)")
    axis.invert_yaxis()
    axis.margins(y=0.4)
    axis.legend()
    save(figure, root / "board.png", plt)


# =================================================================================================
# Verbs
# =================================================================================================


def verb_new(args: argparse.Namespace) -> int:
    about = {"author": args.author, "github_id": args.github_id, "name": args.name,
             "date": args.date, "track": args.track, "blurb": args.blurb.strip()}
    print(make_entry(args.runs, about, args.base, args.root))
    return 0


def verb_check(args: argparse.Namespace) -> int:
    results = [check_folder(folder, args.rescore) for folder in args.folders]
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        for result in results:
            for finding in result["findings"]:
                print(f"{result['folder']}: {finding}")
            for doubt in result["unverified"]:
                print(f"{result['folder']}: cannot be verified: {doubt}")
            verdict = f"{len(result['findings'])} findings" if result["findings"] else "ok"
            print(f"{result['folder']}: {verdict} ({result['format']} format)")
    return int(any(result["findings"] for result in results))


def verb_show(args: argparse.Namespace) -> int:
    claims, runs = read_json(args.folder / "submission.json"), read_entry(args.folder)
    for text in readme_blocks(claims, runs, claims.get("base")).values():
        print(text, end="\n\n")
    return 0


def verb_compare(args: argparse.Namespace) -> int:
    print(compare_text(*(read_json(f / "submission.json") for f in (args.a, args.b))))
    return 0


def verb_board(args: argparse.Namespace) -> int:
    (args.root / "README.md").write_text(board(args.root), encoding="utf-8")
    if entries(args.root):
        draw_board(args.root)
    print(args.root / "README.md")
    return 0


def main(arguments: list[str]) -> int:
    """Do what the command line asks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    new = verbs.add_parser("new", help="build an entry's folder from run folders")
    new.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs/<RUN_ID>, one a seed")
    for name, text in (("name", "short, becomes the folder's name"), ("author", "who ran it"),
                       ("github-id", "account of the author"), ("blurb", "what is new")):
        new.add_argument(f"--{name}", required=True, help=text)
    new.add_argument("--track", default="track_cpu_5min", help=", ".join(TRACKS))
    new.add_argument("--base", type=Path, help="entry it is based on: its changes are listed")
    new.add_argument("--date", default=time.strftime("%Y-%m-%d", time.gmtime()))
    new.set_defaults(do=verb_new)
    check = verbs.add_parser("check", help="derive every claim of folders again")
    check.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    check.add_argument("--rescore", action="store_true",
                       help="run the folder's script on its artifact (takes minutes)")
    check.add_argument("--json", action="store_true", help="findings as JSON")
    check.set_defaults(do=verb_check)
    one = verbs.add_parser("show", help="an entry's tables")
    one.add_argument("folder", type=Path)
    one.set_defaults(do=verb_show)
    two = verbs.add_parser("compare", help="is B better than A, or is it chance?")
    two.add_argument("a", type=Path)
    two.add_argument("b", type=Path)
    two.set_defaults(do=verb_compare)
    table_of_all = verbs.add_parser("board", help="write records/README.md and board.png")
    table_of_all.set_defaults(do=verb_board)
    for verb in (new, table_of_all):
        verb.add_argument("--root", type=Path, default=RECORDS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    try:
        return args.do(args)
    except (Wrong, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
