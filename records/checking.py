"""What speaks against a folder: files, sums and rules; and the proof of its score.

Every check yields findings, one line each, that name the place. Nothing that a folder holds is run
but by `score_again` and `try_rules_again`.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import math
import os
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import run as run_process

import official
import pack
import tracks
from reading import (
    Run,
    Wrong,
    common_settings,
    content,
    is_entry,
    one_line,
    parse_json,
    portable,
    read_entry,
    read_json,
    seed_facts,
    sha256,
    shown,
    text,
)
from tracks import TRACKS

RECORDS = Path(__file__).resolve().parent
ROOT = RECORDS.parent
SAME_SCORE = 1e-4  # bits per byte: another processor rounds differently
LEAST_SCORED = 0.95  # of all targets, where EVAL_TRUNCATE leaves the last row out
MOST_BYTES_A_TOKEN = 64
ABOUT = ("author", "github_id", "name", "date", "track", "blurb", "base", "compliance")
NEEDED = ("README.md", "train_gpt.py", "settings.json", "requirements.txt")
PICTURES = ("runs.png", "bytes.png")
OLDER_PICTURES = ("loss.png", "bpb.png")
# Written by hand or after the others, so that no sha256 of them is listed.
UNLISTED, MAX_NOTES_BYTES = ("submission.json", "NOTES.md"), 1 << 20
# What reading a stranger's folder may raise, apart from Wrong.
MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
)
NOT_VERIFIED = (
    "what the trainer wrote into metrics and logs, but for the sums: its script or what it wrote "
    "may have been changed; read the script, or train again by the README's command",
    "seeds whose artifact is not kept",
    "README.md beyond the scores, requirements.txt, pictures and NOTES.md: they are for people",
)


# =================================================================================================
# Runs
# =================================================================================================


def check_sums(run: Run, script: bytes) -> Iterator[str]:
    """A run's own numbers add up, and are those of this script."""
    source, artifact, data = run.one("source"), run.one("artifact"), run.one("val_data")
    if source["sha256"] != hashlib.sha256(script).hexdigest():
        yield f"another train_gpt.py ran (sha256 {source['sha256'][:12]})"
    if (source["num_bytes"], artifact["code_bytes"]) != (len(script), len(script)):
        yield f"code bytes are not the {len(script):,} of train_gpt.py"
    if artifact["total"] != artifact["model_bytes"] + artifact["code_bytes"]:
        yield f"the bytes of code and artifact do not add up to {artifact['total']:,}"
    if data["num_bytes"] != data["recorded"]:
        yield f"{data['num_bytes']:,} validation bytes counted, {data['recorded']:,} recorded"
    steps, summary = run.all("step"), run.one("summary")
    if [event["step"] for event in steps] != list(range(1, summary["steps"] + 1)):
        yield f"its steps are not 1, 2, ... to the {summary['steps']:,} of the summary"
    if summary["params"] != run.one("model")["params"]:
        yield f"{summary['params']:,} parameters in the summary, the model has others"
    for event in run.all("activity"):
        if not 0 < event["steps"] <= event["of"]:
            yield f"{event['name']} was configured and acted in {event['steps']} steps"
    yield from check_scores(run)


def check_scores(run: Run) -> Iterator[str]:
    """Bits per byte are nats over bytes, and the headline is one of the scores, of all targets."""
    data, final = run.one("val_data"), run.one("final")
    for event in run.all("eval"):
        bits = event["val_loss"] * event["targets"] / math.log(2)
        if not math.isclose(bits / event["num_bytes"], event["val_bpb"], rel_tol=1e-9):
            yield f"{event['name']}: val_bpb {event['val_bpb']} is not its nats over its bytes"
        left_out = data["tokens"] - 1 - event["targets"]
        missing = data["num_bytes"] - event["num_bytes"]
        # A published form of sliding windows counts some targets twice; it is never the headline.
        if left_out >= 0 and not 0 <= missing <= MOST_BYTES_A_TOKEN * left_out:
            yield f"{event['name']}: {event['num_bytes']:,} bytes in {event['targets']:,} targets"
    scored = run.score(final["name"])
    if scored is None or any(scored[key] != final[key] for key in ("val_bpb", "val_loss")):
        yield f"the final val_bpb is not the score of {final['name']}"
        return
    whole = data["tokens"] - 1
    truncated = run.settings.get("eval_truncate") and scored["targets"] >= LEAST_SCORED * whole
    if scored["targets"] > whole or (scored["targets"] < whole and not truncated):
        yield f"{scored['targets']:,} targets of {whole:,} were scored"


def check_together(runs: Sequence[Run], track: str) -> Iterator[str]:
    """The runs of one entry belong together: one script, one recipe, different seeds."""
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        yield f"seeds {seeds}: one stands twice"
    if len(runs) < TRACKS[track].min_seeds:
        yield f"{len(runs)} seeds; {track} asks for {TRACKS[track].min_seeds}"
    for kind, key in (
        ("source", "sha256"),
        ("val_data", "fingerprint"),
        ("train_data", "dataset"),
        ("train_data", "tokens"),
        ("model", "params"),
        ("machine", "device"),
        ("machine", "world_size"),
        ("machine", "name"),
        ("versions", "torch"),
    ):
        values = {str(run.one(kind)[key]) for run in runs}
        if len(values) > 1:
            yield f"the runs differ in {kind} {key}: {sorted(values)}"
    first = common_settings(runs[0].settings)
    for run in runs[1:]:
        for name, value in common_settings(run.settings).items():
            if name not in first or first[name] != value:
                yield f"{run.name}: {name.upper()}={shown(value)} in this run alone"
    for one, other in itertools.combinations(runs, 2):
        losses = [[event["train_loss"] for event in run.all("step")] for run in (one, other)]
        pairs = list(zip(*losses, strict=False))
        same = sum(first == second for first, second in pairs)
        if same > 0.1 * len(pairs):  # by chance hardly one
            yield f"seeds {one.seed} and {other.seed} have the same loss curve"
        if one.one("artifact")["sha256"] == other.one("artifact")["sha256"]:
            yield f"seeds {one.seed} and {other.seed} have the same artifact"


def check_runs(runs: Sequence[Run], script: bytes, track: str) -> Iterator[str]:
    """All that speaks against runs as an entry, before or after it was made of them."""
    yield from check_together(runs, track)
    for run in runs:
        try:
            found = [*check_sums(run, script)]
            found += tracks.reasons_against(track, run.settings, run.events)
        except MALFORMED as error:
            found = [f"not in the form that a run writes ({type(error).__name__}: {error})"]
        yield from (f"{run.name}: {finding}" for finding in found)


# =================================================================================================
# Folders
# =================================================================================================


def entry_facts(runs: Sequence[Run], script: bytes, about: dict) -> dict:
    """What submission.json says that follows from the runs."""
    seeds = {str(run.seed): seed_facts(run) for run in runs}
    scores = [facts["val_bpb"] for facts in seeds.values()]
    losses = [facts["val_loss"] for facts in seeds.values()]
    first, data = runs[0], runs[0].one("val_data")
    machine, versions = first.one("machine"), first.one("versions")
    largest = max(facts["artifact_bytes"] for facts in seeds.values())
    facts = {
        **{key: about.get(key) for key in ABOUT},
        "val_bpb": statistics.fmean(scores),
        "val_loss": statistics.fmean(losses),
        "val_bpb_std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "val_loss_std": statistics.stdev(losses) if len(losses) > 1 else 0.0,
        "seeds": [run.seed for run in runs],
        "seed_results": seeds,
        "bytes_total": largest + len(script),
        "bytes_code": len(script),
        "hardware": f"{machine['world_size']} x {machine['name']} ({machine['device']})",
        "pytorch_version": versions["torch"],
        "python_version": versions["python"],
        "params": first.one("model")["params"],
        "data": {
            "dataset": first.one("train_data")["dataset"],
            "fingerprint": data["fingerprint"],
            "val_tokens": data["tokens"],
            "val_bytes": data["num_bytes"],
        },
    }
    if pack.is_packed(script):
        facts["bytes_text"] = len(pack.text_of(script))
    if all("tflops" in seed for seed in seeds.values()):
        facts["tflops"] = statistics.fmean(seed["tflops"] for seed in seeds.values())
    return facts


def check_about(about: dict) -> Iterator[str]:
    """What goes on the board is one line of text each, and can pass for nothing else."""
    lines = {key: about.get(key) for key in ("author", "github_id", "name", "date", "blurb")}
    lines |= {key: about[key] for key in ("hardware", "pytorch_version") if key in about}
    lines |= about.get("data", {})
    for key, words in lines.items():
        if tracks.is_number(words) and key.startswith("val_"):
            continue
        sound = isinstance(words, str) and words.strip() and words.isprintable()
        if not sound or re.search(r"^\s*#|[<|`]|\]\(", str(words)):
            yield f"{key} {words!r}: expected a line of text without '|', '<', '`' and links"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}", str(about.get("name"))):
        yield f"name {about.get('name')!r}: letters, digits, '_', '-' and '.', at most 61"
    try:
        day = datetime.date.fromisoformat(str(about.get("date"))).isoformat()
    except ValueError:
        day = ""
    if not day or day != about.get("date"):  # other spellings are read as well
        yield f"date {about.get('date')!r}: expected YYYY-MM-DD, a day"


def check_files(folder: Path, claims: dict, runs: Sequence[Run]) -> Iterator[str]:
    """All files of an entry are there, none was exchanged, and no other lies among them."""
    listed = claims["files"] if isinstance(claims.get("files"), dict) else {}
    needed = [*NEEDED, *(f"train_seed{run.seed}.log" for run in runs)]
    needed += [run.path.name for run in runs]
    if TRACKS[claims["track"]].keeps_artifact:
        needed.append("artifact.bin")
    known = {*needed, *UNLISTED, *PICTURES, *OLDER_PICTURES, "artifact.bin", "source.diff"}
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            yield f"{path.name}: not a plain file"
        elif path.name not in known:
            yield f"{path.name}: no file of an entry; code beside train_gpt.py is not counted"
        elif path.name in UNLISTED:
            if path.stat().st_size > MAX_NOTES_BYTES:
                yield f"{path.name}: more than {MAX_NOTES_BYTES:,} bytes"
        elif listed.get(path.name) != sha256(path):
            yield f"{path.name}: not the file that submission.json lists (sha256)"
    for name in sorted({*needed, *listed}):
        if "/" in name or not (folder / name).is_file():
            yield f"{name}: belongs to the entry, but is not in its folder"


def differences(place: str, derived: object, claimed: object) -> Iterator[str]:
    """Where a claimed JSON value is not the derived one, by path."""
    if isinstance(derived, dict) and isinstance(claimed, dict):
        for key in sorted({*derived, *claimed}):
            yield from differences(f"{place}: {key}", derived.get(key), claimed.get(key))
    elif derived != claimed or type(derived) is not type(claimed):
        yield f"{place} is {claimed!r}, the runs give {derived!r}"


def check_claims(folder: Path, claims: dict, runs: Sequence[Run], script: bytes) -> Iterator[str]:
    """submission.json, README.md and the logs say what the metrics say."""
    yield from (f"submission.json: {finding}" for finding in check_about(claims))
    if folder.parent.name in TRACKS and folder.parent.name != claims["track"]:
        yield f"submission.json: {claims['track']}, but it lies in {folder.parent.name}"
    name = f"{claims.get('date')}_{claims.get('name')}"
    if folder.resolve().name != name:
        yield f"submission.json: its date and name make {name!r}, the folder has another name"
    derived = entry_facts(runs, script, claims)
    own = ("files", "settings", "command")
    stated = {key: value for key, value in claims.items() if key not in own}
    yield from differences("submission.json", derived, stated)
    settings = {key.upper(): shown(value) for key, value in portable(runs[0].settings).items()}
    for setting, value in dict(claims.get("settings", {})).items():
        if settings.get(setting) != value:
            yield f"submission.json: {setting}={value}, but settings.json says otherwise"
    if not all(holds in (True, None) for holds in dict(claims["compliance"]).values()):
        yield "submission.json: compliance: a rule does not hold"
    page = text(folder / "README.md")
    for score in (
        claims["val_bpb"],
        *(seed["val_bpb"] for seed in derived["seed_results"].values()),
    ):
        if f"{score:.6f}" not in page:
            yield f"README.md: does not state the score {score:.6f}"
    for run in runs:
        score = run.one("final")["val_bpb"]
        if f"{score:.8f}" not in text(folder / f"train_seed{run.seed}.log"):
            yield f"train_seed{run.seed}.log: does not state the score {score:.8f}"
    artifact = folder / "artifact.bin"
    if artifact.is_file() and sha256(artifact) != best_of(runs).one("artifact")["sha256"]:
        yield "artifact.bin: not the one that the metrics of the best seed name (sha256)"
    yield from check_base(folder, claims)


def check_base(folder: Path, claims: dict) -> Iterator[str]:
    """What is said of the entry that this one builds on is so, where that one lies beside it."""
    base = claims.get("base")
    if not base or "/" in str(base["folder"]):
        return
    beside = folder.resolve().parent / base["folder"] / "submission.json"
    if beside.is_file():
        theirs = read_json(beside)
        right = {"val_bpb": theirs["val_bpb"], "changes": settings_between(theirs, claims)}
        yield from differences("submission.json: base", right, {key: base[key] for key in right})


def settings_between(base: dict, claims: dict) -> list[list[str]]:
    """Settings in which two entries differ: [name, of the base, here]."""
    theirs, ours = base["settings"], claims["settings"]
    return [
        [name, theirs.get(name, "default"), ours.get(name, "default")]
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]


def best_of(runs: Sequence[Run]) -> Run:
    """The run with the lowest headline, whose artifact an entry keeps."""
    return min(runs, key=lambda run: run.one("final")["val_bpb"])


@dataclass
class Result:
    """What was found in one folder."""

    folder: Path
    form: str = "unreadable"  # or "entry", or "official"
    about: str = ""  # a few words for the line of a folder that passes
    findings: list[str] = field(default_factory=list)
    not_verified: list[str] = field(default_factory=list)


def check_entry(folder: Path, rescore: bool, result: Result) -> None:
    """Look at a folder that `new` made."""
    claims = read_json(folder / "submission.json")
    if claims.get("track") not in list(TRACKS):
        raise Wrong(
            f"submission.json: track {claims.get('track')!r}, expected one of {', '.join(TRACKS)}"
        )
    runs, script = read_entry(folder), content(folder / "train_gpt.py")
    result.findings += check_files(folder, claims, runs)
    result.findings += check_runs(runs, script, claims["track"])
    result.findings += check_claims(folder, claims, runs, script)
    seeds = f"{len(runs)} seeds" if len(runs) > 1 else "1 seed"
    result.about = f"{claims['val_bpb']:.5f} bits per byte, {seeds}"
    result.not_verified += NOT_VERIFIED
    if not rescore:
        result.not_verified.append("the score itself: --rescore computes it from the artifact")
    elif result.findings:
        result.not_verified.append("the score itself: only a folder without findings is scored")
    elif not (folder / "artifact.bin").is_file():
        raise Wrong("artifact.bin: not kept here, so that nothing can be scored again")
    else:
        result.findings += score_again(folder, best_of(runs), result)
        if not result.findings:
            result.findings += try_rules_again(folder, claims)


def check_folder(folder: Path, rescore: bool = False) -> Result:
    """What is wrong with a folder, and what nobody can tell from it."""
    result = Result(folder)
    try:
        if not folder.is_dir():
            raise Wrong(f"{folder}: no such folder")
        if is_entry(folder) or TRACKS.get(folder.resolve().parent.name):
            result.form = "entry"
            check_entry(folder, rescore, result)
        else:
            result.form = "official"
            result.findings, result.not_verified = official.check_official(folder)
            result.about = "in the challenge's own form, of which much cannot be verified"
    except (Wrong, *MALFORMED, ValueError) as error:
        words = str(error)
        if not isinstance(error, Wrong):
            words = f"not in the form that `new` writes ({type(error).__name__}: {error})"
        result.findings.append(words)
    result.findings = [one_line(finding) for finding in result.findings]
    return result


# =================================================================================================
# The proof of a score, which runs the folder's script
# =================================================================================================


def environment_without(settings: dict) -> dict[str, str]:
    """This process's environment without settings of whoever checks.

    Where the data lie and whether to compile say nothing about the score, and stay.
    """
    kept = ("DATA_PATH", "TOKENIZER_PATH", "COMPILE")
    found = {
        name: value
        for name, value in os.environ.items()
        if name in kept or name.lower() not in settings
    }
    # Threads that spin while they wait take minutes for seconds where the cores are shared.
    return {"OMP_WAIT_POLICY": "passive"} | found


def score_again(folder: Path, best: Run, result: Result) -> Iterator[str]:
    """Score artifact.bin with the folder's own script; data are looked for in this repository."""
    logged, seconds = best.one("final")["val_bpb"], best.one("summary")["eval_seconds"]
    print(f"{folder}: scoring its artifact; the run took {seconds:,.0f} s for it", file=sys.stderr)
    done = run_process(
        [
            sys.executable,
            str(folder.resolve() / "train_gpt.py"),
            "--eval",
            str(folder.resolve() / "artifact.bin"),
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=environment_without(best.settings),
    )
    found = re.search(r"^val_bpb:([0-9.]+)", done.stdout, re.M)
    if done.returncode or found is None:
        yield f"artifact.bin: --eval failed: {' '.join(done.stderr.strip().splitlines()[-1:])}"
    elif not abs(float(found[1]) - logged) <= SAME_SCORE:
        yield f"artifact.bin: scores {found[1]} here, the metrics say {logged:.8f}"
    else:
        result.about += f", scored again: {found[1]} (seed {best.seed}: {logged:.8f})"


def ask_script(script: Path, artifact: Path, settings: Path) -> dict:
    """What compliance.py says of a script and its artifact, in a process of its own."""
    paths = [str(path.resolve()) for path in (script, artifact, settings)]
    done = run_process(
        [sys.executable, "-B", str(RECORDS / "compliance.py"), *paths],
        text=True,
        capture_output=True,
        env=environment_without(read_json(settings)),
    )
    try:
        return parse_json(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        reason = " ".join(done.stderr.strip().splitlines()[-1:])
        raise Wrong(f"{artifact}: the rules cannot be tried: {reason}") from None


def try_rules_again(folder: Path, claims: dict) -> Iterator[str]:
    """The rules that the folder claims to keep hold on its artifact, where they can be tried."""
    paths = [folder / name for name in ("train_gpt.py", "artifact.bin", "settings.json")]
    found = ask_script(*paths)["compliance"]
    tried = {name: holds for name, holds in found.items() if holds is not None}
    claimed = {name: claims["compliance"].get(name) for name in tried}
    yield from differences("submission.json: compliance", tried, claimed)
