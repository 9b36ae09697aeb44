"""Read what runs and entries left, as files of strangers: bounded, checked, and never run.

A run folder holds metrics.jsonl and settings.json; an entry holds metrics_seed<N>.jsonl and one
settings.json for all its seeds.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tracks

MAX_FILE_BYTES = 1 << 26  # larger files are not read
OWN_SETTINGS = ("run_id", "runs_dir", "seed")  # they differ between the runs of one entry


class Wrong(ValueError):
    """What was given cannot be used; the message is one line."""


def content(path: Path) -> bytes:
    """What a plain file of bearable size holds; raises Wrong for anything else."""
    if not path.exists():
        raise Wrong(f"{path}: no such file")
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
        raise Wrong(f"{path}: not a plain file of at most {MAX_FILE_BYTES:,} bytes")
    return path.read_bytes()


def text(path: Path) -> str:
    """The text of a plain file; raises Wrong if it is not UTF-8."""
    try:
        return content(path).decode()
    except UnicodeDecodeError as error:
        raise Wrong(f"{path}: not UTF-8 text ({error})") from None


def sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    return hashlib.sha256(content(path)).hexdigest()


def parse_json(source: str) -> dict:
    """A JSON object of plain numbers that says nothing twice; raises ValueError otherwise."""

    def once(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands twice in one object")
        return found

    def no_number(word: str) -> None:
        raise ValueError(f"{word} is not a number")

    try:
        parsed = json.loads(source, object_pairs_hook=once, parse_constant=no_number)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    return parsed


def read_json(path: Path) -> dict:
    """The JSON object in a file; raises Wrong if it holds none."""
    source = text(path)
    try:
        return parse_json(source)
    except ValueError as error:
        raise Wrong(f"{path}: {error}") from None


def read_events(path: Path) -> list[dict]:
    """The events of a metrics.jsonl; raises Wrong for a line that is not a JSON object.

    A run that is still writing may have left half a line at the end, which is passed over.
    """
    lines = text(path).split("\n")
    lines.pop()  # what follows the last line feed is nothing, or half a line
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(parse_json(line))
        except ValueError as error:
            raise Wrong(f"{path}:{number}: {error}") from None
    return events


@dataclass(frozen=True)
class Run:
    """One run by its events and settings."""

    path: Path  # of its metrics
    seed: int
    events: list[dict]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """How a finding names it: the folder of a run, the file of an entry."""
        return self.path.parent.name if self.path.name == "metrics.jsonl" else self.path.name

    def all(self, kind: str) -> list[dict]:
        """Events of a kind, in order."""
        return [event for event in self.events if event.get("event") == kind]

    def one(self, kind: str) -> dict:
        """The one event of a kind; raises Wrong if there is none, or another."""
        found = self.all(kind)
        if len(found) != 1:
            raise Wrong(
                f"{self.path}: {len(found)} events {kind!r}, expected 1: the run has not ended, "
                "or the file was changed"
            )
        return found[0]

    def score(self, name: str) -> dict | None:
        """The last evaluation called `name`."""
        return next((e for e in reversed(self.all("eval")) if e.get("name") == name), None)


def read_run(folder: Path) -> Run:
    """The run in a run folder, which may still be going on."""
    settings = read_json(folder / "settings.json")
    seed = settings.get("seed")
    if not isinstance(seed, int):
        raise Wrong(f"{folder / 'settings.json'}: seed is {seed!r}, expected a whole number")
    events = as_one_training(read_events(folder / "metrics.jsonl"))
    return Run(folder / "metrics.jsonl", seed, events, settings)


def as_one_training(events: list[dict]) -> list[dict]:
    """The events of a run's last process, after what it went on from of the processes before.

    A process begins with its versions. One that was resumed kept the steps and scores up to its
    checkpoint; whatever else was there, it did again.
    """
    kept: list[dict] = []
    steps: list[dict] = []  # and scores on the way, of all processes so far, as far as they count
    began_anew = True
    for event in events:
        kind: Any = event.get("event")
        step: Any = event.get("step")
        if kind == "versions":
            kept = []
            began_anew = True
        elif kind == "resumed" and tracks.is_number(step):
            steps = [earlier for earlier in steps if earlier["step"] <= step]
            kept = [*steps, *kept]
            began_anew = False
        elif kind in ("step", "eval") and tracks.is_number(step) and step > 0:
            if began_anew:
                steps = []
                began_anew = False
            steps.append(event)
        kept.append(event)
    return kept


def read_entry(folder: Path) -> list[Run]:
    """The runs of an entry by seed; raises Wrong if there is none."""
    settings, found = read_json(folder / "settings.json"), {}
    for path in folder.glob("metrics_seed*"):
        number = re.fullmatch(r"metrics_seed([0-9]{1,10})\.jsonl", path.name)
        if number is None:
            raise Wrong(f"{path}: expected metrics_seed<N>.jsonl")
        found[int(number[1])] = path
    if not found:
        raise Wrong(f"{folder}: no metrics_seed<N>.jsonl")
    return [Run(path, seed, read_events(path), settings) for seed, path in sorted(found.items())]


def is_entry(folder: Path) -> bool:
    """Whether a folder holds, or once held, what `record.py new` writes."""
    if any(folder.glob("metrics_seed*")):
        return True
    try:
        return isinstance(read_json(folder / "submission.json").get("files"), dict)
    except Wrong:
        return False


def read_any(folder: Path) -> list[Run]:
    """The runs in an entry, or the one in a run folder; raises Wrong if it is neither."""
    if (folder / "metrics.jsonl").is_file():
        return [read_run(folder)]
    if not folder.is_dir():
        raise Wrong(f"{folder}: no such folder")
    if not is_entry(folder):
        raise Wrong(f"{folder}: neither a run folder (metrics.jsonl) nor an entry of records/")
    return read_entry(folder)


def common_settings(settings: dict) -> dict:
    """What all runs of an entry share."""
    return {name: value for name, value in settings.items() if name not in OWN_SETTINGS}


def shown(value: object) -> str:
    """A setting as it is written in the environment."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def portable(settings: dict) -> dict:
    """Settings whose data, where data/prepare.py made them, lie where any clone has them."""
    prepared = (
        r"^(?:/.*/|\./)?(data/(?:datasets/(?:docs|fineweb10B)_sp\d+|"
        r"tokenizers/(?:docs|fineweb)_\d+_bpe\.model))$"
    )
    changed = dict(settings)
    for name in ("data_path", "tokenizer_path"):
        if isinstance(value := settings.get(name), str):
            changed[name] = re.sub(prepared, r"./\1", value)
    return changed


def seed_facts(run: Run) -> dict:
    """The numbers of one finished run; raises Wrong if it has not ended."""
    final, summary, artifact = run.one("final"), run.one("summary"), run.one("artifact")
    in_chunks = {}
    for key, name in (("pre_quant", "float_chunked"), ("post_quant", "artifact_chunked")):
        score = run.score(name)
        in_chunks[f"{key}_val_bpb"] = score["val_bpb"] if score else None
    facts = {
        "val_bpb": final["val_bpb"],
        "val_loss": final["val_loss"],
        "steps": summary["steps"],
        "train_s": summary["seconds"],
        "eval_s": summary["eval_seconds"],
        "tokens_per_second": summary["rate"],
        "artifact_bytes": artifact["model_bytes"],
        **in_chunks,
    }
    if "tflops" in (work := tracks.last(run.events, "work")):
        facts["tflops"] = work["tflops"]
    return facts


def one_line(words: str, longest: int = 400) -> str:
    """Words of a stranger for a terminal: no control characters, of bearable length."""
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words[: longest + 1])
    return plain if len(plain) <= longest else plain[: longest - 3] + "..."


def end_quietly() -> None:
    """Let a closed pipe end the process as it ends any other, without a traceback."""
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
