"""Make a records folder from runs, check anybody's, compare two, and draw the board.

    python records/record.py new runs/A runs/B runs/C --name Wide --author Ann --github-id ann \\
        --blurb "What is new in a sentence or two." --track track_cpu_5min
    python records/record.py check records/track_cpu_5min/*/ [--rescore] [--json]
    python records/record.py show FOLDER | ARTIFACT [--plot FILE.png]
    python records/record.py compare FOLDER_A FOLDER_B
    python records/record.py board
    python records/record.py redraw FOLDER

Every number of a folder comes from the runs' own logs. `check` derives them all again and exits 1,
one line a finding, if anything disagrees; it never runs what a folder holds unless --rescore is
given.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import changes
import pack
import rederive
from scipy import stats

RECORDS = Path(__file__).resolve().parent
VERSION = 3  # of what `new` writes; stands in every marker
LIMIT_BYTES = 16_000_000
MAX_FILE_BYTES = 1 << 26  # of a file in a folder; larger ones are not read
LEAST_SCORED = 0.95  # of all targets, where EVAL_TRUNCATE leaves the last row out
# Validation text of the challenge. Its published tokenizers fold characters, so that the count of
# one differs from another's by some thousandths.
FINEWEB_VAL_BYTES, FINEWEB_TOLERANCE = 151_080_891, 0.005

# What each track asks for. reasons: why train_gpt.py may call a run of it not eligible (it speaks
# of the GPU track), as beginnings of its words.
TRACKS: dict[str, dict] = {
    "track_10min_16mb": {
        "title": "10 minutes on 8xH100, 16 MB",
        "device": "cuda",
        "train_seconds": 600,
        "eval_seconds": 600,
        "seeds": 3,
        "reasons": (),
        "artifact": False,
        "dataset": "fineweb10B_",
        "machine": r"8 x .*H100.*",
        "machine_words": "8 x H100",
        "val_bytes": FINEWEB_VAL_BYTES,
        "command": "torchrun --standalone --nproc_per_node=8 train_gpt.py",
    },
    "track_cpu_5min": {
        "title": "5 minutes on two CPU cores, 16 MB, built-in corpus",
        "device": "cpu",
        "train_seconds": 300,
        "eval_seconds": 600,
        "seeds": 3,
        "artifact": True,
        "machine": r"(1 x [12]|2 x 1) threads( of .*)?",
        "machine_words": "two threads",
        "reasons": ("ran on ", "the text is not FineWeb"),
        "dataset": "docs_",
        "command": "OMP_NUM_THREADS=2 PRESET=mini ./run.sh",
    },
    "track_non_record_16mb": {
        "title": "anything under 16 MB, not ranked as a record",
        "device": "",
        "seeds": 1,
        "train_seconds": math.inf,
        "eval_seconds": math.inf,
        "artifact": False,
        "dataset": "",
        "reasons": (
            "ran on ",
            "the text is not FineWeb",
            "MAX_WALLCLOCK_SECONDS",
            "EVAL_WALLCLOCK_SECONDS",
            "scoring took",
            "training and calibration took",
        ),
        "command": "./run.sh",
    },
}
# Validation splits by fingerprint: their text, tokens and bytes, counted once by data/prepare.py.
# Tokenizers cut one text into different shards; scores of one text are compared all the same.
DOCS = "docs"  # data/prepare.py docs: all of its vocabularies decode to the same documents
KNOWN_SPLITS = {
    "77200814ad844a601a18461c27b0507005ef525d5da225459b973ee4efe257ff": (DOCS, 164_359, 365_438),
    "f1e1571a2a2c1ce474087f5ea479c4c1bbca9bbe0e9308a19009baf93b6cdc4f": (DOCS, 136_040, 365_438),
    "ff42b6162c397210e93ac47d05569644f3eabba4349b323983d66f4fc091c842": (DOCS, 120_309, 365_438),
    "ad8a659e33aa12bc5baabad65c508004aba470a0c501ee599e2e14a91a0753d6": (DOCS, 110_390, 365_438),
}
OWN_SETTINGS = ("run_id", "runs_dir", "seed")  # differ between the runs of one entry
FINAL_LINES = (
    "Serialized model",
    "Code size",
    "Total submission size",
    "params:",
    "artifact ",
    "val_bpb:",
)
# Final lines that no event of the trainer carries itself, by the event that has their numbers.
DERIVED_LINES = {
    "artifact": (
        "Serialized model {label}: {model_bytes} bytes",
        "Code size: {code_bytes} bytes",
        "artifact {model_bytes:,} bytes + code {code_bytes:,} = {total:,} of {limit:,} "
        "bytes, {left:,} left",
    ),
    "eval": ("{name} val_bpb:{val_bpb:.8f}",),
}
CONDITIONS = (
    "causality",
    "full_distribution",
    "single_pass",
    "score_before_update",
    "determinism",
    "legal_settings",
)  # what compliance.suite looks at
UNLISTED, MAX_NOTES_BYTES = ("submission.json", "NOTES.md"), 1 << 20  # without a sha256
# Files of every entry, beside those of its seeds and the artifact.
FILES = (
    "README.md",
    "train_gpt.py",
    "settings.json",
    "requirements.txt",
    "loss.png",
    "bytes.png",
    "bpb.png",
)


# What reading a stranger's folder may raise, apart from Wrong.
MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class Wrong(ValueError):
    """Runs that cannot be an entry, or a folder that cannot be read; the message is one line."""


def content(path: Path) -> bytes:
    """What a plain file of bearable size holds; raises Wrong for anything else."""
    if not path.exists():
        raise Wrong(f"{path}: no such file")
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
        raise Wrong(f"{path}: not a plain file of at most {MAX_FILE_BYTES:,} bytes")
    return path.read_bytes()


def readable(script: bytes) -> str:
    """The text of a train_gpt.py, packed or not; raises Wrong for what Python reads otherwise."""
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(script).readline)[0]
        text = pack.text_of(script).decode()
    except (SyntaxError, ValueError) as error:
        raise Wrong(f"train_gpt.py: cannot be read ({error})") from None
    if encoding not in ("utf-8", "utf-8-sig"):  # in another one a comment may hold code
        raise Wrong(f"train_gpt.py: written in {encoding}, expected UTF-8")
    return text


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    return hashlib.sha256(content(path)).hexdigest()


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

    # How findings name its files: in an entry the names suffice, in run folders they do not.
    log_name = property(lambda self: self.place_of(self.log_path))
    metrics_name = property(lambda self: self.place_of(self.metrics_path))

    def place_of(self, path: Path) -> str:
        """Name of one of its files, with the folder where that is called the same in all runs."""
        return str(path) if path.name in ("log.txt", "metrics.jsonl") else path.name

    def all(self, kind: str) -> list[dict]:
        """Events of a kind, in order."""
        return [event for event in self.events if event.get("event") == kind]

    def one(self, kind: str) -> dict:
        """The one event of a kind; raises Wrong if there is none, or another."""
        found = self.all(kind)
        if len(found) != 1:
            raise Wrong(
                f"{self.metrics_path}: {len(found)} events {kind!r}, expected 1: the run "
                "did not end, or the file was changed"
            )
        return found[0]

    @property
    def seed(self) -> int:
        """Its seed, as its log lists it."""
        match = re.search(r"^[* ] SEED +([0-9]+) ", self.log, re.M)
        if match is None:
            raise Wrong(f"{self.log_path}: lists no SEED")
        return int(match[1])

    def score(self, name: str) -> dict | None:
        """The last evaluation called `name`."""
        return next((e for e in reversed(self.all("eval")) if e["name"] == name), None)


def parse_json(text: str) -> dict:
    """A JSON object of plain numbers that says nothing twice; raises ValueError otherwise."""

    def once(pairs: list[tuple[str, object]]) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice in one object")
        return found

    def no_number(word: str) -> None:
        raise ValueError(f"{word} is not a number")

    try:
        parsed = json.loads(text, object_pairs_hook=once, parse_constant=no_number)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    return parsed


def read_events(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; raises Wrong for one that is not a JSON object."""
    events = []
    for number, line in enumerate(content(path).decode().splitlines(), start=1):
        try:
            events.append(parse_json(line))
        except ValueError as error:
            raise Wrong(f"{path}:{number}: {error}") from None
    return events


def read_json(path: Path) -> dict:
    """A JSON object of a file; raises Wrong if it holds none."""
    try:
        return parse_json(content(path).decode())
    except ValueError as error:
        raise error if isinstance(error, Wrong) else Wrong(f"{path}: {error}") from None


def read_run(log: Path, metrics: Path, settings: Path) -> SeedRun:
    """One run from its three files; raises Wrong if one is missing or unreadable."""
    try:
        return SeedRun(
            log, metrics, content(log).decode(), read_events(metrics), read_json(settings)
        )
    except UnicodeDecodeError as error:
        raise Wrong(f"{log.parent}: not UTF-8 text ({error})") from None


def read_entry(folder: Path) -> list[SeedRun]:
    """The runs of a records folder that `new` made, by seed."""
    logs = {}
    for log in folder.glob("train_seed*"):
        if not (number := re.fullmatch(r"train_seed([0-9]{1,10})\.log", log.name)):
            raise Wrong(f"{log}: expected train_seed<N>.log")
        logs[int(number[1])] = log
    return [
        read_run(
            log,
            folder / f"metrics_{log.stem.removeprefix('train_')}.jsonl",
            folder / "settings.json",
        )
        for _, log in sorted(logs.items())
    ]


# =================================================================================================
# Facts of an entry
# =================================================================================================


def seed_facts(run: SeedRun) -> dict:
    """Results of one seed in the words of submission.json."""
    final, summary, artifact = run.one("final"), run.one("summary"), run.one("artifact")
    floats, chunks = (run.score(name) for name in ("float_chunked", "artifact_chunked"))
    if floats is None or chunks is None:
        raise Wrong(f"{run.metrics_path}: no eval 'float_chunked' or none 'artifact_chunked'")
    return {
        "val_bpb": final["val_bpb"],
        "val_loss": final["val_loss"],
        "steps": summary["steps"],
        "train_s": summary["seconds"],
        "eval_s": summary["eval_seconds"],
        "tokens_per_second": summary["rate"],
        "artifact_bytes": artifact["model_bytes"],
        "pre_quant_val_bpb": floats["val_bpb"],
        "post_quant_val_bpb": chunks["val_bpb"],
    }


def show(value: object) -> str:
    """A setting as it is written in the environment."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def common_settings(settings: dict) -> dict:
    """What all runs of an entry share."""
    return {name: value for name, value in settings.items() if name not in OWN_SETTINGS}


def portable(settings: dict) -> dict:
    """Settings with the data that data/prepare.py names where any clone has them."""
    prepared = (
        r"^/.*/(data/(?:datasets/(?:docs|fineweb10B)_sp\d+|"
        r"tokenizers/(?:docs|fineweb)_\d+_bpe\.model))$"
    )
    return {
        name: re.sub(prepared, r"./\1", value)
        if name in ("data_path", "tokenizer_path") and isinstance(value, str)
        else value
        for name, value in settings.items()
    }


@lru_cache(maxsize=4)
def parsed(script: str) -> ast.Module:
    """The syntax tree of a script that is never run; raises Wrong for what is none."""
    try:
        return ast.parse(script)
    except (MemoryError, RecursionError, SyntaxError, ValueError) as error:
        raise Wrong(f"train_gpt.py: not to be read as Python ({error})") from None


def defaults_of(script: str) -> dict:
    """Defaults of the settings in a train_gpt.py, read from its text."""
    defaults = {}
    for node in parsed(script).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            for line in node.body:
                if (
                    isinstance(line, ast.AnnAssign)
                    and isinstance(line.value, ast.Call)
                    and isinstance(line.target, ast.Name)
                ):
                    defaults[line.target.id] = ast.literal_eval(line.value.args[0])
    return defaults


def given_by_hand(settings: dict, script: str) -> dict[str, str]:
    """Settings that neither the defaults nor PRESET give, so that a command must.

    PRESETS is read from the script's text: literals, names of earlier ones, `|` and Fraction.
    """
    known: dict[str, Any] = {}

    def value(node: ast.expr | None) -> Any:
        if node is None:  # of a name without a value, or `**` in a dictionary
            raise ValueError("no literal")
        if isinstance(node, ast.Dict):
            return {value(k): value(v) for k, v in zip(node.keys, node.values, strict=True)}
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return value(node.left) | value(node.right)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Fraction":
            parts = [value(part) for part in node.args]
            if not all(type(part) is int for part in parts):  # a text may ask for any power of 10
                raise ValueError("no plain fraction")
            return Fraction(*parts)
        return known[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)

    for line in parsed(script).body:
        if not isinstance(line, ast.AnnAssign | ast.Assign):
            continue
        target = line.target if isinstance(line, ast.AnnAssign) else line.targets[0]
        if isinstance(target, ast.Name):
            with contextlib.suppress(
                AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError
            ):
                known[target.id] = value(line.value)
    values = defaults_of(script)
    for name in filter(None, str(settings.get("preset", "")).split(",")):
        for setting, chosen in known.get("PRESETS", {}).get(name.strip(), {}).items():
            if isinstance(chosen, Fraction):  # of what it would be without this preset
                chosen = values[setting] and max(1, round(values[setting] * chosen))
            values[setting] = chosen
    return {
        name.upper(): show(chosen)
        for name, chosen in common_settings(settings).items()
        if name in values and values[name] != chosen and name != "preset"
    }


def entry_facts(runs: list[SeedRun], script: bytes, about: dict) -> dict:
    """submission.json without its list of files: every number from the runs."""
    seeds = {str(run.seed): seed_facts(run) for run in runs}
    scores = [facts["val_bpb"] for facts in seeds.values()]
    losses = [facts["val_loss"] for facts in seeds.values()]
    first, data = runs[0], runs[0].one("val_data")
    machine, versions = first.one("machine"), first.one("versions")
    settings = portable(common_settings(first.settings))
    defaults = defaults_of(readable(script))
    changed = {
        name.upper(): show(value)
        for name, value in settings.items()
        if name in defaults and defaults[name] != value
    }
    largest = max(facts["artifact_bytes"] for facts in seeds.values())
    return {
        **{key: about.get(key) for key in ABOUT},
        "val_bpb": statistics.fmean(scores),
        "val_loss": statistics.fmean(losses),
        "val_bpb_std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "val_loss_std": statistics.stdev(losses) if len(losses) > 1 else 0.0,
        "seeds": [run.seed for run in runs],
        "seed_results": seeds,
        "bytes_total": largest + len(script),
        "bytes_code": len(script),
        **({"bytes_text": len(pack.text_of(script))} if pack.is_packed(script) else {}),
        "hardware": f"{machine['world_size']} x {machine['name']} ({machine['device']})",
        "pytorch_version": versions["torch"],
        "python_version": versions["python"],
        "params": first.one("model")["params"],
        "settings": changed,
        "data": {
            "dataset": first.one("train_data")["dataset"],
            "fingerprint": data["fingerprint"],
            "val_tokens": data["tokens"],
            "val_bytes": data["num_bytes"],
        },
    }


# =================================================================================================
# Checking: each function yields findings, one line each, that name the place
# =================================================================================================


@lru_cache(maxsize=4)
def templates_of(script: str) -> tuple[tuple[frozenset[str], str], ...]:
    """Texts of a script that look like log lines to be filled in, each with its fields.

    Only plain fields count.
    """
    found = {}
    for node in ast.walk(parsed(script)):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and "\n" not in text:
            fields = re.findall(r"\{(\w+)(?::,?(?:\.\d)?[defg]?)?\}", text)  # of no width
            if fields and len(fields) == text.count("{"):
                found[text] = frozenset(fields)
    return tuple((fields, text) for text, fields in found.items())


def lines_of(run: SeedRun, script: str) -> Iterator[tuple[int, dict, dict[str, str], set[str]]]:
    """Every event with its number, the log lines it may give and must give: line to template."""
    by_fields: dict[frozenset, list[str]] = {}
    headline = run.one("final")["name"]
    for number, event in enumerate(run.events, start=1):
        kind, facts = event.get("event", ""), frozenset(event) - {"event"}
        if facts not in by_fields:
            by_fields[facts] = [text for fields, text in templates_of(script) if fields <= facts]
        derived = DERIVED_LINES.get(kind, ())
        if kind == "eval" and (event["step"] or event["name"] == headline):
            derived = ()
        said, must = {}, set()
        for template in (*by_fields[facts], *derived):
            with contextlib.suppress(ValueError, TypeError):
                said[template.format(**event)] = template
                must |= {template.format(**event)} if template in derived else set()
        yield number, event, said, must


def steps_to_show(run: SeedRun, script: str) -> set[int]:
    """Numbers of the step events that the trainer would have logged: the first ten, the last, and
    one every TRAIN_LOG_EVERY steps or fiftieth of the run after the one before."""
    cfg, lines, last, due = run.settings, set(run.log.splitlines()), -1, set()
    end = run.one("trained")["step"]
    for number, event, said, _ in lines_of(run, script):
        if event.get("event") == "step":
            share = (
                event["ms"] / 1e3 / cfg["max_wallclock_seconds"]
                if cfg["max_wallclock_seconds"]
                else event["step"] / cfg["iterations"]
            )
            wanted = (
                event["step"] % cfg["train_log_every"] == 0
                if cfg["train_log_every"]
                else int(50 * share) > last
            )
            if wanted or event["step"] <= 10 or event["step"] == end:
                due.add(number)
            if said.keys() & lines or number in due:
                last = int(50 * share)
    return due


def check_log(run: SeedRun, script: str) -> Iterator[str]:
    """The log and the metrics file of a run say the same, line by line."""
    lines = run.log.splitlines()
    expected: set[str] = set()
    templates: set[str] = set()
    here, due = set(lines), steps_to_show(run, script)
    for number, event, said, must in lines_of(run, script):
        expected |= said.keys()
        templates |= set(said.values())
        if (
            (told := said.keys() - must)
            and not told & here
            and (event.get("event") != "step" or number in due)
        ):
            yield (
                f"{run.metrics_name}:{number}: event {event.get('event')!r} stands in no "
                f"line of {run.log_name}"
            )
        for line in sorted(must - here):
            yield f"{run.log_name}: this line is missing: {line!r}"
    for number, line in enumerate(lines, start=1):
        if line not in expected and any(fits(line, template) for template in templates):
            yield f"{run.log_name}:{number}: not what {run.metrics_name} says: {line!r}"
    steps = [
        line
        for _, event, said, _ in lines_of(run, script)
        if event.get("event") == "step"
        for line in said
        if line in here
    ]
    known = set(steps)
    if [line for line in lines if line in known] != steps:
        yield f"{run.log_name}: its steps do not stand once each and in order"
    for beginning in FINAL_LINES:
        if not any(line.startswith(beginning) for line in lines):
            yield f"{run.log_name}: final line {beginning!r} is missing"


def fits(line: str, template: str) -> bool:
    """Whether a line is a template with anything in its fields; in linear time, unlike a regex."""
    first, *middle, last = re.split(r"\{[^{}]*\}", template)
    at, end = len(first), len(line) - len(last)
    if not (line.startswith(first) and line.endswith(last)):
        return False
    for part in middle:
        found = line.find(part, at, max(end, 0))
        if found < 0:
            return False
        at = found + len(part)
    return at <= end


def loose_lines(run: SeedRun, script: str) -> tuple[dict[str, int], dict[str, int]]:
    """Log lines that no event stands behind, before and after the first step, to their numbers.

    Left out: what holds the run's own name or seed, which `rederive` looks at.
    """
    own = re.compile(
        r"[* ] (?:RUN_ID|RUNS_DIR|SEED) |seed:|.*/log\.txt$|artifact: |log: |"
        r"warning: not eligible "
    )
    expected: set[str] = set()
    first = math.inf
    lines = run.log.splitlines()
    for _, event, said, _ in lines_of(run, script):
        expected |= said.keys()
        if event.get("event") == "step" and first == math.inf:
            first = min((lines.index(line) for line in said if line in lines), default=math.inf)
    head: dict[str, int] = {}
    tail: dict[str, int] = {}
    for number, line in enumerate(lines):
        if listed := re.match(r"[* ] (RUN_ID|RUNS_DIR|SEED) +\S.*? +([A-Z][^\[]*\[.*)", line):
            head[f"{listed[1]} {re.sub('; default .*', ']', listed[2])}"] = number + 1
        if line not in expected and not own.match(line):
            (head if number < first else tail)[line] = number + 1
    return head, tail


def check_loose_lines(runs: list[SeedRun], script: str) -> Iterator[str]:
    """What no event stands behind is the same in all logs, as far as it can be.

    After the first step the others need only have such a line, with numbers of their own; or the
    numbers are in the run's events. Some lines a run may have alone.
    """
    loose = [loose_lines(run, script) for run in runs]
    alone = re.compile("|".join(rederive.ALONE))
    for run, (head, tail) in zip(runs, loose, strict=True):
        yield from rederive.check_words(run, head | tail, defaults_of(script))
    for place, run in enumerate(runs if len(runs) > 1 else ()):
        head, tail = loose[place]
        heads = [set(part) for n, (part, _) in enumerate(loose) if n != place]
        shapes = [
            {shape_of(line) for line in part if not alone.fullmatch(line)}
            for n, (_, part) in enumerate(loose)
            if n != place
        ]
        events = [event for event in run.events if event.get("event") != "step"]
        known = set(numbers_in(json.dumps([events, run.settings]))) | {
            number
            for _, _, said, _ in lines_of(run, script)
            for line in said
            for number in numbers_in(line)
        }
        any_head, any_shape = set.union(*heads), set.union(*shapes)
        wrong = [
            (n, line)
            for line, n in head.items()
            if line not in any_head and not alone.fullmatch(line)
        ] + [
            (n, line)
            for line, n in tail.items()
            if shape_of(line) not in any_shape
            and not (numbers_in(line) and known.issuperset(numbers_in(line)))
            and not alone.fullmatch(line)
        ]
        for number, line in wrong:
            yield f"{run.log_name}:{number}: stands in no event and in no other log: {line!r}"
        for line in sorted(set.intersection(*heads) - head.keys()) + sorted(
            set.intersection(*shapes) - {shape_of(line) for line in tail}
        ):
            yield f"{run.log_name}: a line of the other logs is missing: {line!r}"


def untold(runs: list[SeedRun], script: str) -> list[str]:
    """What the runs' files say once and nothing confirms, in words."""
    loose = []
    for run in runs:
        head, tail = loose_lines(run, script)
        numbers = {**tail, **(head if len(runs) == 1 else {})}
        loose.append(
            {
                line.partition(" budget:")[0]: n
                for line, n in numbers.items()
                if re.search("[0-9]", line) and not re.match(r"[* ] [A-Z]|[A-Z_]+ |swa:start", line)
            }
        )
    logs = [set(run.log.splitlines()) for run in runs]
    shown = [
        sum(
            not said.keys().isdisjoint(here)
            for _, event, said, _ in lines_of(run, script)
            if event.get("event") == "step"
        )
        for run, here in zip(runs, logs, strict=True)
    ]
    return rederive.doubts(runs, loose, shown)


def shape_of(line: str) -> str:
    """A line with every number made 0."""
    return re.sub(r"[0-9][0-9.,]*", "0", line)


def numbers_in(text: str) -> list[str]:
    """The numbers of a text, without thousands separators."""
    return [n.replace(",", "") for n in re.findall(r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?", text)]


def check_listing(run: SeedRun, script: str) -> Iterator[str]:
    """The settings listed at the head of the log are those of settings.json, and the script's."""
    for name in sorted(
        common_settings(run.settings).keys() ^ common_settings(defaults_of(script)).keys()
    ):
        yield f"settings.json: {name} stands in only one of it and the script"
    listed = {
        name: (mark, text)
        for mark, name, text in re.findall(r"^([* ]) ([A-Z][A-Z0-9_]+) +(\S.*)$", run.log, re.M)
    }
    defaults = defaults_of(script)
    for name, value in common_settings(run.settings).items():
        mark, stated = listed.get(name.upper(), ("", "not listed"))
        expected, default = show(value) or "''", show(defaults.get(name, value)) or "''"
        if (
            mark
            and (mark == "*", stated.endswith(f"; default {default}]"))
            != (expected != default,) * 2
        ):
            yield (
                f"{run.log_name}: {name.upper()} is not marked as differing from its default "
                f"{default}, or is though it does not"
            )
        if not f"{stated} ".startswith(f"{expected} "):
            yield (
                f"{run.log_name}: {name.upper()} is {stated.split(' ')[0]}, but "
                f"settings.json says {expected}"
            )


def check_numbers(run: SeedRun, script: bytes) -> Iterator[str]:
    """A run's own numbers agree with each other and with the script."""
    place, source, artifact = run.metrics_name, run.one("source"), run.one("artifact")
    if source["sha256"] != hashlib.sha256(script).hexdigest():
        yield f"{place}: another train_gpt.py ran (sha256 {source['sha256'][:12]})"
    if source["num_bytes"] != len(script) or artifact["code_bytes"] != len(script):
        yield f"{place}: code bytes are not the {len(script):,} of train_gpt.py"
    if artifact["total"] != artifact["model_bytes"] + artifact["code_bytes"]:
        yield f"{place}: bytes do not add up: {artifact['total']:,}"
    if artifact["total"] > LIMIT_BYTES:
        yield f"{place}: {artifact['total']:,} bytes are over the cap of {LIMIT_BYTES:,}"
    data, final = run.one("val_data"), run.one("final")
    machine, versions = run.one("machine"), run.one("versions")
    for text in (
        machine["name"],
        machine["device"],
        run.one("train_data")["dataset"],
        data["fingerprint"],
        versions["torch"],
        versions["python"],
    ):
        if not isinstance(text, str) or not text.isprintable() or re.search(r"[<|`\[\]]", text):
            yield f"{place}: {text!r}: expected plain text, which goes on the board"
    for event in run.all("eval"):
        bpb = event["val_loss"] * event["targets"] / (math.log(2) * event["num_bytes"])
        if not math.isclose(bpb, event["val_bpb"], rel_tol=1e-12):
            yield f"{place}: {event['name']}: val_bpb {event['val_bpb']} is not {bpb:.8f}"
        # At most 64 bytes each. A published form of sliding counts some twice: never the headline.
        dropped = data["tokens"] - 1 - event["targets"]
        if dropped >= 0 and not 0 <= data["num_bytes"] - event["num_bytes"] <= 64 * dropped:
            yield (
                f"{place}: {event['name']}: {event['num_bytes']:,} bytes in "
                f"{event['targets']:,} targets, the split has {data['num_bytes']:,}"
            )
    if data["num_bytes"] != data["recorded"]:
        yield f"{place}: {data['num_bytes']:,} bytes counted, {data['recorded']:,} recorded"
    known = KNOWN_SPLITS.get(data["fingerprint"])
    if known and known[1:] != (data["tokens"], data["num_bytes"]):
        yield f"{place}: this validation split has {known[1]:,} tokens and {known[2]:,} bytes"
    scored = run.score(final["name"])
    if scored is None or (scored["val_bpb"], scored["val_loss"]) != (
        final["val_bpb"],
        final["val_loss"],
    ):
        yield f"{place}: the final val_bpb is not the score of {final['name']}"
    else:
        targets = whole = data["tokens"] - 1
        if run.settings["eval_truncate"]:
            targets -= targets % run.settings["eval_seq_len"]
        if scored["targets"] != targets or targets < LEAST_SCORED * whole:
            yield f"{place}: {scored['targets']:,} targets scored of {data['tokens']:,} tokens"
    if not scored or scored["legal"] is not True:
        yield f"{place}: the headline is not a legal score"
    yield from rederive.check_artifact_facts(run)


def check_training(run: SeedRun) -> Iterator[str]:
    """Steps, clock and ledger of a run agree with its summary and its settings."""
    place, summary, settings = run.metrics_name, run.one("summary"), run.settings
    steps, trained = run.all("step"), run.one("trained")
    if len(steps) != summary["steps"] or any(
        event["step"] != number for number, event in enumerate(steps, start=1)
    ):
        yield f"{place}: the steps are not 1, 2, ... to the last"
    times = [event["ms"] for event in (*steps, trained, *run.all("calibrated"))]
    if times != sorted(times):
        yield f"{place}: step times run backwards"
    for event in steps:
        if event["step_avg"] != event["ms"] / event["step"]:
            yield f"{place}: step {event['step']}: step_avg {event['step_avg']} is not ms / step"
        if event["iterations"] != settings["iterations"]:
            yield f"{place}: step {event['step']}: {event['iterations']} iterations"
    yield from rederive.check_clock(run)
    if summary["params"] != run.one("model")["params"]:
        yield f"{place}: {summary['params']:,} parameters in the summary, the model has others"
    ledger = {event["name"] for event in run.all("activity")}
    qat, averages = settings.get("qat_mode", "off"), settings.get("avg_mode", "")
    for name, configured in (
        (f"{qat}_qat", qat != "off"),
        ("mile", settings.get("mile_gamma")),
        ("warmdown", settings.get("warmdown_iters") or settings.get("warmdown_frac")),
        ("momentum_ramp", settings.get("muon_momentum_warmup_steps")),
        ("ttt", settings.get("ttt_mode", "off") != "off"),
        ("ema", "ema" in averages),
        ("swa", "swa" in averages),
    ):
        if configured and name not in ledger:
            yield f"{place}: {name} is configured and the activity ledger lacks it"
    for event in run.all("activity"):
        if not 0 < event["steps"] <= event["of"]:
            yield f"{place}: {event['name']} was configured and acted {event['steps']} times"


def check_track(run: SeedRun, track: str) -> Iterator[str]:
    """A run keeps the rules of its track."""
    rules, place, summary = TRACKS[track], run.metrics_name, run.one("summary")
    settings, machine = run.settings, run.one("machine")
    if rules["device"] and machine["device"] != rules["device"]:
        yield f"{place}: ran on {machine['device']}, {track} is for {rules['device']}"
    if not run.one("train_data")["dataset"].startswith(rules["dataset"]):
        yield f"{place}: the data must be {rules['dataset']}*, not another text"
    if summary["seconds"] > rules["train_seconds"]:
        yield f"{place}: training and calibration took {summary['seconds']:.1f} s"
    if summary["eval_seconds"] > rules["eval_seconds"]:
        yield f"{place}: scoring took {summary['eval_seconds']:.1f} s"
    if rules["seeds"] > 1 and (
        settings["max_wallclock_seconds"] == 0
        or settings["max_wallclock_seconds"] > rules["train_seconds"]
    ):
        yield f"settings.json: MAX_WALLCLOCK_SECONDS={settings['max_wallclock_seconds']}"
    name = f"{machine['world_size']} x {machine['name']}"
    if "machine" in rules and not re.fullmatch(rules["machine"], name):
        yield f"{place}: ran on {name}, {track} is for {rules['machine_words']}"
    counted = run.one("val_data")["num_bytes"]
    if "val_bytes" in rules and not math.isclose(
        counted, rules["val_bytes"], rel_tol=FINEWEB_TOLERANCE
    ):
        yield f"{place}: {counted:,} validation bytes, the challenge's text has 151 million"
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
    for kind, keys in (
        ("source", ("sha256",)),
        ("val_data", ("fingerprint", "tokens")),
        ("train_data", ("dataset", "tokens")),
        ("model", ("params",)),
        ("machine", ("device", "world_size", "name")),
        ("versions", ("torch", "python")),
    ):
        for key in keys:
            if len(values := {run.one(kind)[key] for run in runs}) > 1:
                yield f"the runs differ in {kind} {key}: {sorted(map(str, values))}"
    # How many passes the size took, and whether a validation fell into the run, may differ.
    kinds = [
        {
            (e.get("event"), e.get("name") or e.get("role"))
            for e in run.events
            if e.get("event") not in ("machine", "step", "size_pass", "pruned")
            and not (e.get("event") == "eval" and e["step"])
        }
        for run in runs
    ]
    for run, mine in zip(runs, kinds, strict=True):
        for missing in sorted(set.union(*kinds) - mine, key=str):
            yield f"{run.metrics_path}: no event {missing}, which another seed has"
    facts: list[set[tuple[str, ...]]] = [
        {(str(e.get("event")), *sorted(e)) for e in run.events} for run in runs
    ]
    in_all = set[str].intersection(*({kind for kind, *_ in mine} for mine in facts))
    differ = {kind for kind, *_ in facts[0].union(*facts) - facts[0].intersection(*facts)}
    for kind in sorted(differ & in_all):
        yield f"the runs differ in which facts their events {kind!r} hold"
    first = common_settings(runs[0].settings)
    for run in runs[1:]:
        for name, value in common_settings(run.settings).items():
            if first.get(name) != value:
                yield (
                    f"{run.log_path}: {name.upper()}={show(value)}, but "
                    f"{show(first.get(name))} in {runs[0].log_path}"
                )
    for a, b in itertools.combinations(runs, 2):
        pairs = list(zip(a.all("step"), b.all("step"), strict=False))
        for key, what in (("train_loss", "loss curve"), ("ms", "step times")):
            if sum(x[key] == y[key] for x, y in pairs) > 0.1 * len(pairs):  # by chance hardly one
                yield f"two seeds have the same {what}"
        if a.one("artifact")["sha256"] == b.one("artifact")["sha256"]:
            yield "two seeds have the same artifact"


def check_about(about: dict) -> Iterator[str]:
    """What a person may state freely is one line of text each, and can pass for nothing else."""
    for key in ("author", "github_id", "name", "date", "blurb"):
        text = about.get(key)
        if (
            not isinstance(text, str)
            or not text.strip()
            or not text.isprintable()
            or re.search(r"^\s*#|[<|]", text)
        ):
            yield f"{key} {text!r}: one line of text without '|', '<' and '#' at its beginning"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}", str(about.get("name"))):
        yield f"name {about.get('name')!r}: letters, digits, '_', '-' and '.', at most 61"
    try:
        day = datetime.date.fromisoformat(str(about.get("date"))).isoformat()
    except ValueError:
        day = ""
    if not day or day != about["date"]:  # other spellings are read as well
        yield f"date {about.get('date')!r}: expected YYYY-MM-DD, a day"


def check_claims(folder: Path, runs: list[SeedRun], script: bytes, claims: dict) -> Iterator[str]:
    """submission.json and README.md say what the logs say, and no file was exchanged."""
    track, files = claims["track"], claims.get("files")
    yield from (f"submission.json: {finding}" for finding in check_about(claims))
    if folder.parent.name in TRACKS and folder.parent.name != track:
        yield f"submission.json: track {track}, but the folder lies in {folder.parent.name}"
    if folder.resolve().name != (name := f"{claims.get('date')}_{claims.get('name')}"):
        yield f"submission.json: its date and name make {name!r}, the folder has another name"
    derived = entry_facts(runs, script, claims)
    derived["compliance"] = dict.fromkeys(CONDITIONS, True)
    yield from differences(
        "submission.json", derived, {k: v for k, v in claims.items() if k != "files"}
    )
    # Some digits are beyond a float's precision: the text shows them changed, the number does not.
    if content(folder / "submission.json").decode() != json.dumps(claims, indent=1) + "\n":
        yield "submission.json: not character by character as `new` writes it"
    if not isinstance(files, dict):
        files = {}
    known = {
        *FILES,
        "artifact.bin",
        *UNLISTED,
        *(["source.diff"] if claims.get("base") else []),
        *(path.name for run in runs for path in (run.log_path, run.metrics_path)),
    }
    for path in sorted(folder.iterdir()):
        if (
            path.name in UNLISTED
            and not path.is_symlink()
            and path.is_file()
            and path.stat().st_size <= MAX_NOTES_BYTES
        ):
            continue
        if path.name not in known:
            yield f"{path.name}: no file of an entry; code beside train_gpt.py would not be counted"
        if path.is_symlink() or not path.is_file():
            yield f"{path.name}: not a plain file"
        elif path.name not in files:
            yield f"{path.name}: not listed in submission.json"
        elif sha256(path) != files[path.name]:
            yield f"{path.name}: changed since submission.json was written (sha256)"
    for name in sorted({*files, *FILES, *(["source.diff"] if claims.get("base") else [])}):
        if "/" in name or not (folder / name).is_file():
            yield f"{name}: belongs to the entry, but is not in its folder"
    for run in runs:
        if run.log_name != f"train_seed{run.seed}.log":
            yield f"{run.log_name}: its log says SEED {run.seed}"
    best = min(runs, key=lambda run: run.one("final")["val_bpb"])
    artifact = folder / "artifact.bin"
    if artifact.is_file() and sha256(artifact) != best.one("artifact")["sha256"]:
        yield "artifact.bin: not the artifact of the best seed's log"
    if not artifact.is_file() and TRACKS[track]["artifact"]:
        yield "artifact.bin: missing; this track keeps the best seed's"
    page = folder / "README.md"
    if page.is_file():
        stated = content(page).decode().splitlines()
        given = readme(derived, runs, script).splitlines()
        for number, (line, right) in enumerate(itertools.zip_longest(stated, given), start=1):
            if line != right:
                yield f"README.md:{number}: {line!r}, the logs give {right!r}"
                break


def differences(place: str, derived: object, claimed: object) -> Iterator[str]:
    """Where a claimed JSON value is not the derived one, by path."""
    if isinstance(derived, dict) and isinstance(claimed, dict):
        for key in sorted({*derived, *claimed}):
            yield from differences(f"{place}: {key}", derived.get(key), claimed.get(key))
    elif derived != claimed or type(derived) is not type(claimed):
        yield f"{place} is {claimed!r}, the logs give {derived!r}"


def check_own(folder: Path, rescore: bool) -> tuple[list[str], list[str]]:
    """Findings on a folder that `new` made, and what was not looked at."""
    claims, script_path = read_json(folder / "submission.json"), folder / "train_gpt.py"
    if not script_path.is_file():
        raise Wrong(f"{script_path}: no such file")
    if not isinstance(claims.get("track"), str) or claims["track"] not in TRACKS:
        raise Wrong(
            f"{folder}/submission.json: track {claims.get('track')!r} is not one of "
            f"{', '.join(TRACKS)}"
        )
    script, runs = content(script_path), read_entry(folder)
    if not runs:
        raise Wrong(f"{folder}: no train_seed*.log")
    findings = list(check_runs(runs, script, claims["track"]))
    findings += check_claims(folder, runs, script, claims)
    unverified = [
        *untold(runs, readable(script)),
        *check_schedules(runs, readable(script))[1],
        "the pictures: only that they are those listed; `redraw` makes them anew",
        "requirements.txt: only that it is the one listed",
        "author, blurb and NOTES.md: written by hand",
        "what all seeds state alike and neither the artifact's header nor another number "
        "repeats: settings of training, versions, tokens of training data, which script "
        "ran",
    ]
    if len(runs) > 1:
        unverified.append(
            "seeds whose artifact is not kept: a forger who rewrites all that is "
            "said of one leaves no trace; ask for the artifact or run it again"
        )
    if runs[0].one("val_data")["fingerprint"] not in KNOWN_SPLITS:
        unverified.append("the bytes of the validation text: none was counted with its fingerprint")
    if foreign := foreign_imports(readable(script)):
        unverified.append(
            f"train_gpt.py imports {', '.join(foreign)}: code that is not counted, "
            "if it is no package of requirements.txt"
        )
    for found, said in (
        check_base(folder, runs, script, claims),
        check_contents(folder, runs, readable(script)),
    ):
        findings += found
        unverified += said
    if not rescore or not (folder / "artifact.bin").is_file():
        unverified.append("the artifact's score and the rules (--rescore, with the artifact there)")
    else:
        findings += check_score_again(folder, runs)
        findings += check_rules_again(folder, claims)
    return findings, unverified


def foreign_imports(script: str) -> list[str]:
    """Modules that a script imports and ours does not, but for the standard library."""

    def named(tree: ast.Module) -> set[str]:
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or ".").split(".")[0])
        return found

    return sorted(named(parsed(script)) - named(our_code()) - sys.stdlib_module_names)


def check_base(
    folder: Path, runs: list[SeedRun], script: bytes, claims: dict
) -> tuple[list[str], list[str]]:
    """What changed against the base is what is said, as far as the base is at hand."""
    base, diff = claims.get("base"), folder / "source.diff"
    if not base:
        return [], []
    beside = folder.resolve().parent / str(base["folder"])
    findings = list(changes.misfits(content(diff).decode(), readable(script)))
    if "/" in base["folder"] or not beside.is_dir():
        return findings, [
            f"score, p and changes of {base['folder']}, which is not beside it: only "
            "that source.diff fits this script"
        ]
    derived, text = against(beside, entry_facts(runs, script, claims), script)
    if text.encode() != content(diff):
        findings.append(f"source.diff: not the difference to {base['folder']}/train_gpt.py")
    return [*findings, *differences("submission.json: base", derived, base)], []


@lru_cache(maxsize=1)
def our_code() -> ast.Module:
    """The train_gpt.py of this repository."""
    return parsed((RECORDS.parent / "train_gpt.py").read_text(encoding="utf-8"))


def check_contents(folder: Path, runs: list[SeedRun], script: str) -> tuple[list[str], list[str]]:
    """artifact.bin, taken apart by this repository's reader, is what the best seed's log says."""
    if not (folder / "artifact.bin").is_file():
        return [], []
    import artifact  # torch: only where it is needed

    from train_gpt import Refusal

    best = min(runs, key=lambda run: run.one("final")["val_bpb"])
    try:
        return list(rederive.check_kept(best, artifact.anatomy(folder / "artifact.bin"))), []
    except Refusal as refusal:
        theirs = parsed(script)
        sealed = rederive.same_code(theirs, our_code(), "ARTIFACT_MAGIC", "PRELUDE")
        if rederive.same_code(theirs, our_code(), "decode_artifact", "cut_payload") or (
            sealed and not artifact.is_whole(folder / "artifact.bin")
        ):
            return [str(refusal)], []
        return [], [
            f"artifact.bin: this repository's train_gpt.py cannot read it ({refusal}); "
            "--rescore reads it with its own"
        ]


def check_schedules(runs: list[SeedRun], script: str) -> tuple[list[str], list[str]]:
    """The steps of all runs keep to the schedule, unless the script has one of its own."""
    found = []
    try:
        found = [list(rederive.check_schedule(run)) for run in runs]
    except MALFORMED:
        if not own_schedule(script):
            raise
    # A changed script whose other seeds keep to ours has no schedule of its own.
    if own_schedule(script) and (not found or all(found)):
        return [], ["lr_scale and the activity ledger: the script has a schedule of its own"]
    return [finding for mine in found for finding in mine], []


def own_schedule(script: str) -> bool:
    """Whether a script's schedule is another than this repository's."""
    return not rederive.same_code(
        parsed(script), our_code(), "Schedule", "decay_scale", "count_activity"
    )


def check_runs(runs: list[SeedRun], script: bytes, track: str) -> Iterator[str]:
    """All that can be found in the runs of an entry, before or after it was made of them."""
    yield from check_together(runs, track)
    text = readable(script)
    for run in runs:
        if missing := common_settings(defaults_of(text)).keys() - run.settings.keys():
            raise Wrong(f"settings.json: {min(missing)} stands in only one of it and the script")
        try:
            yield from check_numbers(run, script)
            yield from check_training(run)
            yield from check_track(run, track)
            yield from check_listing(run, text)
            yield from check_log(run, text)
        except MALFORMED as error:
            if isinstance(error, Wrong):
                raise
            yield (
                f"{run.metrics_name}: not in the form that a run writes "
                f"({type(error).__name__}: {error})"
            )
    yield from check_schedules(runs, text)[0]
    yield from check_loose_lines(runs, text)


def check_rules_again(folder: Path, claims: dict) -> Iterator[str]:
    """The compliance suite gives on artifact.bin what the folder claims, in its own process."""
    done = subprocess.run(
        [
            sys.executable,
            str(RECORDS / "compliance.py"),
            *(
                str((folder / name).resolve())
                for name in ("train_gpt.py", "artifact.bin", "settings.json")
            ),
        ],
        text=True,
        capture_output=True,
    )
    try:
        found = parse_json(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        yield f"artifact.bin: the rules cannot be tried: {done.stderr.strip().splitlines()[-1:]}"
    else:
        yield from differences("submission.json: compliance", found, claims.get("compliance"))


def check_score_again(folder: Path, runs: list[SeedRun]) -> Iterator[str]:
    """Score artifact.bin with the folder's own script; data is looked for where we stand."""
    best = min(run.one("final")["val_bpb"] for run in runs)
    # Settings of whoever checks would override the artifact's.
    env = {
        name: value
        for name, value in os.environ.items()
        if name.lower() not in runs[0].settings or name in ("DATA_PATH", "TOKENIZER_PATH")
    }
    done = subprocess.run(
        [
            sys.executable,
            str(folder.resolve() / "train_gpt.py"),
            "--eval",
            str(folder.resolve() / "artifact.bin"),
        ],
        cwd=RECORDS.parent,
        text=True,
        capture_output=True,
        env=env,
    )
    match = re.search(r"^val_bpb:([0-9.]+)", done.stdout, re.M)
    if done.returncode or match is None:
        yield f"artifact.bin: --eval failed: {done.stderr.strip().splitlines()[-1:]}"
    elif not abs(float(match[1]) - best) <= 1e-4:  # another processor rounds differently
        yield f"artifact.bin: scores {match[1]} here, the log says {best:.8f}"


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
        ("total bytes", LIMIT_BYTES, "{:,.0f} bytes are over the cap"),
        ("training stop", 600_500, "training took {:,.0f} ms"),
        ("evaluation time", 600_000, "evaluation took {:,.0f} ms"),
    ):
        for log, value in found[kind].items():
            if value > limit:
                yield f"{log}: {words.format(value)}, more than {limit:,}"
    for log, tokens in found["validation tokens"].items():
        if log in found["loss"]:
            nats, bpb = found["loss"][log], found["final score"][log]
            counted = tokens * nats / (math.log(2) * bpb) if bpb else math.inf
            if not math.isclose(counted, FINEWEB_VAL_BYTES, rel_tol=FINEWEB_TOLERANCE):
                yield (
                    f"{log}: val_loss and val_bpb imply {counted:,.0f} validation bytes, "
                    f"the text has {FINEWEB_VAL_BYTES:,}"
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
        if value is not None and value > LIMIT_BYTES:
            yield f"submission.json: {name} is {value:,}, over the cap of {LIMIT_BYTES:,}"
        elif totals and not name.startswith("bytes_model") and value not in totals:
            yield (
                f"submission.json: {name} is {value}, the logs say "
                f"{', '.join(f'{t:.0f}' for t in sorted(totals))}"
            )
    if not sizes and "artifact_bytes" not in json.dumps(claims.get("seed_results")):
        yield f"submission.json: no size under any of {', '.join(SIZE_NAMES)}"


def is_own(folder: Path) -> bool:
    """Whether a folder claims to be of `new`, by its files, its list of them, or its track."""
    with contextlib.suppress(Wrong):
        if isinstance(read_json(folder / "submission.json").get("files"), dict):
            return True
    return folder.parent.name == "track_cpu_5min" or any(folder.glob("metrics_seed*"))


def check_folder(folder: Path, rescore: bool = False) -> dict:
    """What is wrong with a folder, and what cannot be told."""
    kind = "unreadable"
    unverified: list[str] = []
    try:
        if not folder.is_dir():
            raise Wrong(f"{folder}: no such folder")
        own = is_own(folder)
        findings, unverified = check_own(folder, rescore) if own else check_official(folder)
        kind = "own" if own else "official"
    except Wrong as wrong:
        findings = [str(wrong)]
    except MALFORMED as error:
        findings = [f"not in the form that `new` writes ({type(error).__name__}: {error})"]
    findings, unverified = ([one_line(text) for text in texts] for texts in (findings, unverified))
    return {"folder": str(folder), "format": kind, "findings": findings, "unverified": unverified}


def plain(text: str) -> str:
    """Lines for a terminal, without control characters."""
    return "\n".join(one_line(line, None) for line in text.split("\n"))


def one_line(text: str, longest: int | None = 400) -> str:
    """A finding for a terminal: no control characters, of bearable length."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:longest])


# =================================================================================================
# Writing a folder
# =================================================================================================

ABOUT = ("author", "github_id", "name", "date", "track", "blurb", "base", "compliance")


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a block of numbers in README.md."""
    return f"<!-- record.py {VERSION}: {name} -->", f"<!-- end {name} -->"


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def readme_blocks(facts: dict, runs: list[SeedRun], base: dict | None) -> dict[str, str]:
    """Every number of README.md, from the logs: block name to text."""
    rows = [
        (
            seed,
            f"{r['val_bpb']:.6f}",
            f"{r['val_loss']:.6f}",
            f"{r['pre_quant_val_bpb']:.6f}",
            f"{r['post_quant_val_bpb']:.6f}",
            r["steps"],
            f"{r['artifact_bytes']:,}",
        )
        for seed, r in facts["seed_results"].items()
    ]
    several = len(facts["seed_results"]) > 1  # one seed does not scatter
    rows.append(
        (
            "mean (std)",
            f"**{facts['val_bpb']:.6f}**" + f" ({facts['val_bpb_std']:.6f})" * several,
            f"{facts['val_loss']:.6f}" + f" ({facts['val_loss_std']:.6f})" * several,
            "",
            "",
            "",
            "",
        )
    )
    packed = f" (packed; {facts['bytes_text']:,} as text)" if "bytes_text" in facts else ""
    sizes = [
        "val_bpb: bits per byte of the validation text under the artifact, less is better; "
        "val_loss: the same in nats a token; in chunks: without sliding windows, of the float "
        "weights and of the artifact, so that their difference is what quantisation costs; "
        "std: how far the seeds scatter.",
        f"Code {facts['bytes_code']:,} bytes{packed}; code and largest artifact "
        f"{facts['bytes_total']:,} of {LIMIT_BYTES:,} bytes.",
        f"Validation text: {facts['data']['val_tokens']:,} tokens, "
        f"{facts['data']['val_bytes']:,} bytes, split {facts['data']['fingerprint'][:12]}.",
    ]
    settings = runs[0].settings
    shape = (
        ("parameters", f"{facts['params']:,}"),
        ("layers", settings["num_layers"]),
        ("width", settings["model_dim"]),
        ("query / key-value heads", f"{settings['num_heads']} / {settings['num_kv_heads']}"),
        ("MLP width", int(settings["mlp_mult"] * settings["model_dim"])),
        ("vocabulary", settings["vocab_size"]),
        ("tokens a row", settings["train_seq_len"]),
        ("tokens a step", f"{settings['train_batch_tokens']:,}"),
        ("bits", settings["bits"]),
    )
    timing = [
        (
            seed,
            f"{r['train_s']:.1f}",
            f"{r['eval_s']:.1f}",
            f"{run.one('trained')['ms'] / r['steps']:.1f}",
            f"{r['tokens_per_second']:,.0f}",
        )
        for (seed, r), run in zip(facts["seed_results"].items(), runs, strict=True)
    ]
    own = (
        " ".join(f"{name}={value}" for name, value in facts["settings"].items() if name == "PRESET")
        or "the defaults"
    )
    changed = "\n".join(f"    {name}={value}" for name, value in facts["settings"].items())
    against = "" if base is None else against_text(facts, base)
    compliance = facts["compliance"] or {}
    return {
        "results": table(
            (
                "seed",
                "val_bpb",
                "val_loss",
                "float, in chunks",
                "artifact, in chunks",
                "steps",
                "artifact bytes",
            ),
            rows,
        )
        + "\n\n"
        + "\n".join(sizes),
        "changes": f"{against}Settings that differ from the defaults of this script ({own}):\n\n"
        + changed,
        "architecture": table(("", ""), list(shape)),
        "timing": table(
            ("seed", "train and calibrate, s", "score, s", "ms a step", "tokens a second"), timing
        )
        + f"\n\n{facts['hardware']}, torch {facts['pytorch_version']}.",
        "compliance": table(
            ("condition", "holds"),
            [
                (name.replace("_", " "), "yes" if holds else "NO")
                for name, holds in compliance.items()
            ],
        )
        + "\n\nDeterminism: scoring the artifact again "
        "gives the same bits.",
    }


def against_text(facts: dict, base: dict) -> str:
    """What changed against the base, in settings and source."""
    places = base["source"]
    rows = [(place, f"+{added}", f"-{removed}") for place, added, removed in places]
    more = rows[changes.PLACES_SHOWN :]
    source = (
        "The script is the base's."
        if not rows
        else (
            f"Source, [line by line](source.diff): +{sum(p[1] for p in places)} "
            f"-{sum(p[2] for p in places)} lines.\n\n"
            + table(("where", "added", "removed"), rows[: changes.PLACES_SHOWN])
            + (f"\n\nand {len(more)} places more." if more else "")
        )
    )
    settings = (
        table(("setting", base["name"], "here"), base["changes"])
        if base["changes"]
        else "The settings are the base's."
    )
    p = (
        ""
        if base["p"] is None
        else f"; if it were no better, chance would make it look so with probability {base['p']}"
    )
    return (
        f"Against {base['name']} (val_bpb {base['val_bpb']:.6f}): "
        f"{facts['val_bpb'] - base['val_bpb']:+.6f} bits per byte{p}.\n\n"
        f"{settings}\n\n{source}\n\n"
    )


def command_of(facts: dict, run: SeedRun, script: bytes) -> str:
    """The command that runs an entry again."""
    by_hand = given_by_hand(portable(run.settings), readable(script))
    given = {"PRESET": str(run.settings["preset"])} | by_hand
    start = "./run.sh"
    if TRACKS[facts["track"]]["device"] == "cuda":
        start = "torchrun --standalone --nproc_per_node=8 train_gpt.py"
        given = {name: value for name, value in given.items() if value or name != "PRESET"}
    elif threads := re.match(r"(\d+) threads", run.one("machine")["name"]):
        given = {"OMP_NUM_THREADS": threads[1]} | given
    again = " ".join(["SEED=$SEED", *(f"{k}={shlex.quote(v)}" for k, v in given.items()), start])
    return f"for SEED in {' '.join(map(str, facts['seeds']))}; do {again}; done"


def readme(facts: dict, runs: list[SeedRun], script: bytes) -> str:
    """The page of an entry: nothing in it but the blurb is written by hand."""
    blocks = readme_blocks(facts, runs, facts["base"])

    def block(name: str) -> str:
        begin, end = markers(name)
        return f"{begin}\n{blocks[name]}\n{end}"

    return f"""# {facts["name"]}

{facts["blurb"]}

{facts["author"]} (GitHub: {facts["github_id"]}), \
{facts["date"]}, {TRACKS[facts["track"]]["title"]}.

## Results

{block("results")}

![Training loss](loss.png)
![Bits per byte from float weights to the headline](bpb.png)

## What it is

{block("changes")}

{block("architecture")}

![Artifact bytes](bytes.png)

## Timing

{block("timing")}

## Rules

{block("compliance")}

## Again

    {command_of(facts, runs[0], script)}

with this folder's `train_gpt.py`
{"(packed: `python records/pack.py --text train_gpt.py` prints it) " * ("bytes_text" in facts)}\
in place of the repository's; then `python records/record.py check` on this folder, with
`--rescore` to score its artifact.
"""


def draw(folder: Path, runs: list[SeedRun]) -> None:
    """loss.png, bytes.png and bpb.png of an entry."""
    import pictures  # matplotlib and torch: only where they are needed

    pictures.draw_loss(folder / "loss.png", runs)
    pictures.draw_bytes(folder / "bytes.png", min(runs, key=lambda r: r.one("final")["val_bpb"]))
    pictures.draw_bpb(folder / "bpb.png", runs)


def refuse(findings: list[str]) -> None:
    """Raise Wrong with the first of the findings, and how many there are."""
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise Wrong(findings[0] + more)


def against(base: Path, facts: dict, script: bytes) -> tuple[dict, str]:
    """What changed against another entry (score, settings, lines by function), and source.diff."""
    claims = read_json(base / "submission.json")
    theirs, ours = claims["settings"], facts["settings"]
    if text_scored(claims) != text_scored(facts):
        raise Wrong(f"--base {base.name}: scored on another validation text")
    settings = [
        [name, theirs.get(name, "default"), ours.get(name, "default")]
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    old, new = readable(content(base / "train_gpt.py")), readable(script)
    try:
        # Three digits: beyond them versions of scipy may differ.
        p = float(f"{compare_scores(*scores_of(claims, facts, 'val_loss')).p_better:.3g}")
    except Wrong:
        p = None
    return {
        "folder": base.resolve().name,
        "name": claims["name"],
        "val_bpb": claims["val_bpb"],
        "p": p,
        "changes": settings,
        "source": changes.counted(old, new, parsed(old), parsed(new)),
    }, changes.source_diff(old, new)


def make_entry(run_folders: list[Path], about: dict, base: Path | None, root: Path) -> Path:
    """Build an entry's folder from run folders alone; raises Wrong, leaving nothing behind."""
    if about["track"] not in TRACKS:
        raise Wrong(f"--track {about['track']}: expected one of {', '.join(TRACKS)}")
    refuse([f"--{finding}" for finding in check_about(about)])
    if base and base.resolve().parent.name != about["track"]:
        raise Wrong(f"--base {base}: expected an entry of {about['track']}, where `check` finds it")
    runs = [read_run(f / "log.txt", f / "metrics.jsonl", f / "settings.json") for f in run_folders]
    scripts = {
        (f / "train_gpt.py").read_bytes() for f in run_folders if (f / "train_gpt.py").is_file()
    }
    if len(scripts) != 1:
        raise Wrong(f"{len(scripts)} different train_gpt.py in the run folders, expected one")
    (script,) = scripts
    order = sorted(range(len(runs)), key=lambda n: runs[n].seed)
    runs, run_folders = [runs[n] for n in order], [run_folders[n] for n in order]
    findings = list(check_runs(runs, script, about["track"]))
    for run, folder in zip(runs, run_folders, strict=True):
        artifact = folder / "artifact.bin"
        if not artifact.is_file() or sha256(artifact) != run.one("artifact")["sha256"]:
            findings.append(f"{folder}: artifact.bin is not the one the log speaks of")
    refuse(findings)
    best = min(range(len(runs)), key=lambda n: runs[n].one("final")["val_bpb"])
    from compliance import suite  # runs the script that ran: ours, or the entrant's own

    about["compliance"] = suite(
        run_folders[best] / "train_gpt.py", run_folders[best] / "artifact.bin", runs[best].settings
    )
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


def write_entry(
    folder: Path, runs: list[SeedRun], script: bytes, about: dict, base: Path | None, best: Path
) -> None:
    """The files of an entry."""
    (folder / "train_gpt.py").write_bytes(script)
    for run in runs:
        shutil.copyfile(run.log_path, folder / f"train_seed{run.seed}.log")
        shutil.copyfile(run.metrics_path, folder / f"metrics_seed{run.seed}.jsonl")
    (folder / "settings.json").write_text(
        json.dumps(common_settings(runs[0].settings), indent=1) + "\n", encoding="utf-8"
    )
    shutil.copyfile(RECORDS.parent / "requirements.txt", folder / "requirements.txt")
    if TRACKS[about["track"]]["artifact"]:
        shutil.copyfile(best / "artifact.bin", folder / "artifact.bin")
    about["base"] = None
    if base:
        about["base"], diff = against(base, entry_facts(runs, script, about), script)
        (folder / "source.diff").write_text(diff, encoding="utf-8")
    write_generated(folder, runs, script, about)


def write_generated(folder: Path, runs: list[SeedRun], script: bytes, about: dict) -> None:
    """README.md, pictures and submission.json, from what else lies in the folder."""
    facts = entry_facts(runs, script, about)
    draw(folder, runs)
    (folder / "README.md").write_text(readme(facts, runs, script), encoding="utf-8")
    facts["files"] = {
        path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name not in UNLISTED
    }
    # Whole or not at all: what was written by hand stands nowhere else.
    partial = folder / ".submission.json.partial"
    partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / "submission.json")


def redraw(folder: Path) -> None:
    """Write an entry's generated files anew, as this version does; its runs must be sound.

    Raises Wrong if anything but README, pictures and derived numbers is not what is listed.
    """
    claims, script = read_json(folder / "submission.json"), content(folder / "train_gpt.py")
    if claims.get("track") not in TRACKS or not isinstance(claims.get("files"), dict):
        raise Wrong(f"{folder}: not an entry that `new` made")
    runs = read_entry(folder)
    generated = {"README.md", "loss.png", "bytes.png", "bpb.png"}
    findings = [
        f"{name}: not as submission.json lists it"
        for name, known in claims["files"].items()
        if name not in generated and sha256(folder / name) != known
    ]
    findings += check_about(claims)
    refuse([*findings, *check_runs(runs, script, claims["track"])])
    write_generated(folder, runs, script, claims)


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


def text_scored(claims: dict) -> str:
    """The text that a submission.json was scored on; its tokens' fingerprint if it is not known."""
    fingerprint = claims["data"]["fingerprint"]
    return KNOWN_SPLITS.get(str(fingerprint), (fingerprint,))[0]  # a stranger's may be a list


def scores_of(a: dict, b: dict, unit: str) -> tuple[dict[str, float], dict[str, float]]:
    """Scores by seed of two submission.json; where tokenizers differ, a token is one of A's."""
    of_a, of_b = (
        {seed: r[unit] for seed, r in claims["seed_results"].items()} for claims in (a, b)
    )
    if unit == "val_loss" and a["data"]["fingerprint"] != b["data"]["fingerprint"]:
        of_b = {
            seed: r["val_bpb"] * a["val_loss"] / a["val_bpb"]
            for seed, r in b["seed_results"].items()
        }
    return of_a, of_b


def compare_scores(a: dict[str, float], b: dict[str, float], margin: float = 0.0) -> Comparison:
    """Paired t-test over common seeds if there are two or more, else Welch's t-test (scipy)."""
    common = sorted(set(a) & set(b))
    paired = len(common) >= 2
    x, y = (
        [scores[seed] for seed in common] if paired else list(scores.values()) for scores in (a, b)
    )
    if min(len(x), len(y)) < 2:
        raise Wrong("at least two seeds on each side are needed")
    if len({round(v - w, 12) for v, w in zip(y, x, strict=True)} if paired else {*x, *y}) == 1:
        raise Wrong("the seeds do not scatter at all: these are no independent runs")

    def test(shift: float, alternative: str):
        moved = [v + shift for v in y]
        if paired:
            return stats.ttest_rel(moved, x, alternative=alternative)
        return stats.ttest_ind(moved, x, equal_var=False, alternative=alternative)

    interval = test(0.0, "two-sided").confidence_interval(0.95)
    return Comparison(
        paired,
        len(x) if paired else len(x) + len(y),
        statistics.fmean(y) - statistics.fmean(x),
        (float(interval.low), float(interval.high)),
        float(test(0.0, "less").pvalue),
        float(test(margin, "less").pvalue),
    )


def compare_text(a: dict, b: dict) -> str:
    """Two entries in words that take no statistics to read."""
    if a["seed_results"] == b["seed_results"]:
        return (
            f"A and B are the same runs ({a['name']}, {len(a['seed_results'])} seeds):\n"
            "a thing compared with itself is neither better nor worse."
        )
    nats = compare_scores(*scores_of(a, b, "val_loss"), margin=0.005)
    bpb = compare_scores(*scores_of(a, b, "val_bpb"))
    how = (
        f"Over the {bpb.count} seeds that both have"
        if bpb.paired
        else f"Over {bpb.count} runs, with different seeds on the two sides"
    )
    low, high = bpb.interval
    verdict = (
        f"B is better: chance alone would rarely give {bpb.count} such runs."
        if high < 0
        else f"A is better: chance alone would rarely give {bpb.count} such runs."
        if low > 0
        else "Nobody can tell from these runs which is better: the difference may be luck of seeds."
    )
    lines = [
        *(
            f"{letter}  {claims['name']}: {claims['val_bpb']:.6f} bits per byte, the mean of "
            f"{len(claims['seed_results'])} seeds, {mean_steps(claims):,.0f} steps each"
            for letter, claims in (("A", a), ("B", b))
        ),
        "Bits per byte is what a byte of text costs under the model; less is better.",
        f"{how}, B is {'lower' if bpb.difference < 0 else 'higher'} on average by "
        f"{abs(bpb.difference):.6f} bits per byte.",
        "Each seed has its luck. With many more seeds the difference B - A would settle; these "
        f"runs say between {low:+.6f} and {high:+.6f} (of 20 such statements about 19 come true).",
        verdict,
        "",
        "What the challenge asks, in its own unit: the loss in nats a token (a nat is 1.44 bits; "
        f"a token is a piece of the tokenizer), here {abs(nats.difference):.6f} "
        f"{'lower' if nats.difference < 0 else 'higher'} for B. p is how often luck alone would "
        "give B such a lead if it had none: 0.01 is once in a hundred.",
        f"  README of the challenge, better by 0.005 nats at p < 0.01: "
        f"{'met' if nats.p_by_margin < 0.01 else 'not met'} (p = {nats.p_by_margin:.3g}).",
        f"  Practice since, better than the best entry of its day at p < 0.25: "
        f"{'met' if nats.p_better < 0.25 else 'not met'} (p = {nats.p_better:.3g}).",
    ]
    if text_scored(a) != text_scored(b):
        lines.insert(
            0,
            "warning: A and B were scored on different validation text; nothing below "
            "means anything",
        )
    elif a["hardware"] != b["hardware"]:
        lines.insert(
            0,
            f"warning: A ran on {a['hardware']}, B on {b['hardware']}: machines make "
            "different numbers of steps in the same time, and the difference has that "
            "in it",
        )
    return "\n".join(line if line.startswith(" ") else textwrap.fill(line, 98) for line in lines)


def entries(root: Path) -> tuple[list[tuple[Path, dict]], list[tuple[Path, str]]]:
    """Entries under the tracks, best first; and what cannot be ranked, with the reason."""
    ranked, rest = [], []
    for folder in sorted(
        path for track in TRACKS for path in (root / track).glob("[!.]*") if path.is_dir()
    ):
        result = check_folder(folder)
        if result["findings"]:
            rest.append((folder, f"`check` has {len(result['findings'])} findings"))
        elif result["format"] == "own":
            ranked.append((folder, read_json(folder / "submission.json")))
        else:
            rest.append((folder, "the official format, where much cannot be verified"))
    return sorted(ranked, key=lambda pair: pair[1]["val_bpb"]), rest


def mean_steps(claims: dict) -> float:
    """Training steps of an entry, the mean of its seeds."""
    return statistics.fmean(seed["steps"] for seed in claims["seed_results"].values())


def board(root: Path, found: list[tuple[Path, dict]], rest: list[tuple[Path, str]]) -> str:
    """records/README.md: one table a track and validation text."""
    lines = [
        "# Records",
        "",
        "Written by `python records/record.py board`. val_bpb: bits per "
        "byte of the validation text, mean of the seeds, less is better; std: how far the "
        "seeds scatter (standard deviation); steps: mean of the seeds; bytes: code and the "
        "largest artifact. Time is what is limited, and a slow machine makes few steps in it: "
        "only entries of one machine say which recipe is better. Different "
        "validation text is never ranked together. Each folder can be checked with "
        "`python records/record.py check FOLDER`.",
        "",
    ]
    for track, rules in TRACKS.items():
        lines += [
            f"## {rules['title']}",
            "",
            f"[Rules, how to make an entry]({track}/README.md) (`{track}`).",
            "",
        ]
        mine = [pair for pair in found if pair[1]["track"] == track]
        lines += [
            f"Not ranked: [{folder.name}]({folder.relative_to(root)}): {reason}.\n"
            for folder, reason in rest
            if folder.parent.name == track
        ]
        if not mine:
            lines += ["Nobody has run it yet.", ""]
        for text in sorted({text_scored(claims) for _, claims in mine}):
            same = [pair for pair in mine if text_scored(pair[1]) == text]
            rows = [
                (
                    rank,
                    f"[{c['name']}]({folder.relative_to(root)})",
                    f"{c['val_bpb']:.5f}",
                    f"{c['val_bpb_std']:.5f}" if len(c["seeds"]) > 1 else "-",
                    len(c["seeds"]),
                    f"{mean_steps(c):,.0f}",
                    f"{c['bytes_total']:,}",
                    f"{c['params']:,}",
                    c["data"]["dataset"],
                    c["hardware"],
                    c["author"],
                    c["date"],
                )
                for rank, (folder, c) in enumerate(same, start=1)
            ]
            lines += [
                f"Text: {text[:12]}, {same[0][1]['data']['val_bytes']:,} validation bytes.",
                "",
                table(
                    (
                        "",
                        "entry",
                        "val_bpb",
                        "std",
                        "seeds",
                        "steps",
                        "bytes",
                        "parameters",
                        "data",
                        "machine",
                        "author",
                        "date",
                    ),
                    rows,
                ),
                "",
            ]
    if found:
        lines += ["![Score against bytes](board.png)", ""]
    lines += ["[SYSTEMS.md](SYSTEMS.md) says what each preset is.", ""]
    return "\n".join(lines)


def track_page(track: str) -> str:
    """README.md of a track: its rules and the command of an entry."""
    rules = TRACKS[track]
    train, score = (
        f"at most {rules[kind]} s" if math.isfinite(rules[kind]) else "no limit"
        for kind in ("train_seconds", "eval_seconds")
    )
    return f"""# {rules["title"]}

Training and calibration: {train}; scoring: {score}; code and artifact: at most
{LIMIT_BYTES:,} bytes; seeds: {rules["seeds"]} or more; machine: \
{rules.get("machine_words", "any")}; data: {rules["dataset"] + "*" if rules["dataset"] else "any"}.

At the root of the repository:

    for SEED in 1 2 3; do SEED=$SEED RUN_ID=mine_$SEED {rules["command"]}; done
    python records/record.py new runs/mine_* --name Name --author You --github-id you \\
        --blurb "What is new." --track {track} [--base ENTRY_IT_BUILDS_ON]
    python records/record.py board

[Entries](../README.md). `python records/pack.py train_gpt.py packed/train_gpt.py` makes a smaller
file that runs the same (`python packed/train_gpt.py`, settings as above); its size counts where it
is the file that ran.
"""


# =================================================================================================
# Verbs
# =================================================================================================


def verb_new(args: argparse.Namespace) -> int:
    about = {
        "author": args.author,
        "github_id": args.github_id,
        "name": args.name,
        "date": args.date,
        "track": args.track,
        "blurb": args.blurb.strip(),
    }
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
    if not args.what.is_dir():
        return show_artifact(args.what, args.plot)
    if args.plot:
        raise Wrong("--plot: expected an artifact; an entry has its pictures in its folder")
    claims, runs = read_json(args.what / "submission.json"), read_entry(args.what)
    facts = entry_facts(runs, content(args.what / "train_gpt.py"), claims)
    for text in readme_blocks(facts, runs, claims.get("base")).values():
        print(plain(text), end="\n\n")
    return 0


def show_artifact(path: Path, plot: Path | None) -> int:
    """Say what an artifact holds; its code is the train_gpt.py beside it, else ours."""
    import artifact  # torch: only where it is needed

    from train_gpt import Refusal

    script = next(
        f for f in (path.parent / "train_gpt.py", RECORDS.parent / "train_gpt.py") if f.is_file()
    )
    try:
        found = artifact.anatomy(path)
    except Refusal as refusal:
        raise Wrong(str(refusal)) from None
    print(f"{path}, with the code of {script}", end="\n\n")
    print(*artifact.lines(found, script.stat().st_size, LIMIT_BYTES), sep="\n")
    if plot:
        from pictures import draw_artifact

        draw_artifact(found, plot, LIMIT_BYTES, script.stat().st_size)
        print(f"\n{plot}")
    return 0


def verb_compare(args: argparse.Namespace) -> int:
    for letter, folder in (("A", args.a), ("B", args.b)):
        if findings := check_folder(folder)["findings"]:
            print(f"warning: {letter} does not pass check: {findings[0]}")
    print(plain(compare_text(*(read_json(f / "submission.json") for f in (args.a, args.b)))))
    return 0


def verb_redraw(args: argparse.Namespace) -> int:
    redraw(args.folder)
    print(args.folder / "README.md")
    return 0


def verb_board(args: argparse.Namespace) -> int:
    if not args.root.is_dir():
        raise Wrong(f"{args.root}: no such folder; it is the one that holds the tracks")
    found, rest = entries(args.root)
    (args.root / "README.md").write_text(board(args.root, found, rest), encoding="utf-8")
    for track in TRACKS:
        (args.root / track).mkdir(exist_ok=True)
        (args.root / track / "README.md").write_text(track_page(track), encoding="utf-8")
    if found:
        from pictures import draw_board  # matplotlib and torch: only where they are needed

        draw_board(args.root / "board.png", [(text_scored(claims), claims) for _, claims in found])
    print(
        args.root / "README.md",
        *(f"{folder}: not ranked: {reason}" for folder, reason in rest),
        sep="\n",
    )
    return 0


def main(arguments: list[str]) -> int:
    """Do what the command line asks; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    new = verbs.add_parser("new", help="build an entry's folder from run folders")
    new.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs/<RUN_ID>, one a seed")
    for name, text in (
        ("name", "short, becomes the folder's name"),
        ("author", "who ran it"),
        ("github-id", "account of the author"),
        ("blurb", "what is new"),
    ):
        new.add_argument(f"--{name}", required=True, help=text)
    new.add_argument(
        "--track", default="track_cpu_5min", help=f"{', '.join(TRACKS)} (default: %(default)s)"
    )
    new.add_argument("--base", type=Path, help="entry it is based on: its changes are listed")
    new.add_argument(
        "--date",
        default=time.strftime("%Y-%m-%d", time.gmtime()),
        help="of the entry (default: today, %(default)s)",
    )
    new.set_defaults(do=verb_new)
    check = verbs.add_parser("check", help="derive every claim of folders again")
    check.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    check.add_argument(
        "--rescore",
        action="store_true",
        help="run the folder's script on its artifact (takes minutes)",
    )
    check.add_argument("--json", action="store_true", help="findings as JSON")
    check.set_defaults(do=verb_check)
    one = verbs.add_parser("show", help="an entry's tables, or what an artifact holds")
    one.add_argument("what", type=Path, metavar="FOLDER|ARTIFACT")
    one.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of the artifact")
    one.set_defaults(do=verb_show)
    two = verbs.add_parser("compare", help="is B better than A, or is it chance?")
    two.add_argument("a", type=Path)
    two.add_argument("b", type=Path)
    two.set_defaults(do=verb_compare)
    again = verbs.add_parser("redraw", help="write an entry's README and pictures anew")
    again.add_argument("folder", type=Path)
    again.set_defaults(do=verb_redraw)
    table_of_all = verbs.add_parser("board", help="write records/README.md and board.png")
    table_of_all.set_defaults(do=verb_board)
    for verb in (new, table_of_all):
        verb.add_argument("--root", type=Path, default=RECORDS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    try:
        return args.do(args)
    except Wrong as wrong:
        print(f"error: {one_line(str(wrong))}", file=sys.stderr)
        return 1
    except MALFORMED as error:
        print(f"error: {type(error).__name__}: {one_line(str(error))}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
