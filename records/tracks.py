"""The rules of every track as one table, and what in a run speaks against it.

A track limits seconds or counted operations, bytes, machine and data. Nothing here imports the
trainer, so that a plan, a live run and the records tool ask the same table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]
Metrics = Sequence[Mapping[str, Any]]

OPEN = "open"
CLOSED = "closed"  # its entries stay, and it takes no new ones


@dataclass(frozen=True, kw_only=True)
class Track:
    """The rules of one track; a limit that is infinite or an empty text limits nothing."""

    title: str
    state: str = OPEN
    device: str = ""
    machine: str = ""  # regular expression for "<processes> x <name of the machine>"
    machine_words: str = "any"  # the same for people
    dataset: str = ""  # how the name of the data's folder begins
    val_bytes: int = 0  # of the validation text, where tokenizers count it within VAL_TOLERANCE
    min_seeds: int = 3
    max_bytes: int = 16_000_000  # of code and artifact together
    max_train_seconds: float = math.inf  # training and calibration
    max_eval_seconds: float = math.inf
    max_train_tflops: float = math.inf  # 10^12 counted floating-point operations
    max_eval_tflops: float = math.inf
    max_table_seconds: float = math.inf  # of processor time for counting tables
    keeps_artifact: bool = True
    command: str = "./run.sh"  # what trains one seed
    reasons: str = ""  # why the rules are as they are, for the track's page


COUNTED_REASONS = """\
A limit in seconds says as much about the machine as about the recipe, so this one limits work that
is counted, and any machine can repeat an entry: a slow one merely takes longer. `train_gpt.py`
counts products of matrices, from their shapes alone: 2 m n k operations for (m, k) times (k, n);
forward, backward and the optimizer's orthogonalisation; of attention the causal half, whatever a
kernel computes; and within the budget also calibration. `MAX_TRAIN_TFLOPS` ends a run before the
step that would pass it, and `--plan` says beforehand how many steps it holds.

Norms, activations, softmax and rounding are not counted: they are a small part, and how many
operations an exponential has is no fact of mathematics. Priming, which is undone, is not counted
either, nor are diagnostics, rows that the finished model draws for its own calibration, and the
rounding of its weights.

Scoring counts each window once for every strip of targets that it is shown for, and every pass of
what adapts to scored text. Counts of n-grams multiply no matrices. Their processor time is limited
instead, from packing the text to the last mixed target, all threads together; it is the one number
here that differs between machines, so its limit is generous.

Two runs of one seed on one machine with as many threads are equal to the bit. On another machine
a run takes the same steps at the same rates, and its score agrees as far as sums of floats do.
`python records/record.py repeat ENTRY` trains a seed of an entry again and says which it was.
"""

TRACKS: dict[str, Track] = {
    "track_10min_16mb": Track(
        title="10 minutes on 8xH100, 16 MB",
        device="cuda",
        machine=r"8 x .*H100.*",
        machine_words="8 x H100",
        dataset="fineweb10B_",
        val_bytes=151_080_891,
        max_train_seconds=600,
        max_eval_seconds=600,
        keeps_artifact=False,  # 16 MB each are too much for a repository
        command="torchrun --standalone --nproc_per_node=8 train_gpt.py",
    ),
    "track_cpu_20tflop": Track(
        title="20 TFLOP of counted training on any machine, 16 MB, built-in corpus",
        dataset="docs_",
        max_train_tflops=20,
        max_eval_tflops=10,
        max_table_seconds=120,
        command="PRESET=cpu MAX_TRAIN_TFLOPS=20 ./run.sh",
        reasons=COUNTED_REASONS,
    ),
    "track_cpu_5min": Track(
        title="5 minutes on two CPU cores, 16 MB, built-in corpus",
        state=CLOSED,
        device="cpu",
        machine=r"(1 x [12]|2 x 1) threads( of .*)?",
        machine_words="two threads",
        dataset="docs_",
        max_train_seconds=300,
        max_eval_seconds=600,
        command="OMP_NUM_THREADS=2 PRESET=mini ./run.sh",
    ),
    "track_non_record_16mb": Track(
        title="Anything under 16 MB, not ranked as a record",
        min_seeds=1,
        keeps_artifact=False,
    ),
}

# What a finished run measured: limit of the track, event and key of metrics.jsonl, words.
MEASURES = (
    ("max_train_seconds", "summary", "seconds", "seconds of training and calibration"),
    ("max_eval_seconds", "summary", "eval_seconds", "seconds of scoring"),
    ("max_train_tflops", "work", "tflops", "TFLOP of training"),
    ("max_eval_tflops", "work", "eval_tflops", "TFLOP of scoring"),
    ("max_table_seconds", "work", "table_seconds", "seconds of counting tables"),
    ("max_bytes", "artifact", "total", "bytes of code and artifact"),
)
# Budgets that a run is given: limit of the track, setting.
BUDGETS = (
    ("max_train_seconds", "max_wallclock_seconds"),
    ("max_eval_seconds", "eval_wallclock_seconds"),
    ("max_train_tflops", "max_train_tflops"),
    ("max_bytes", "artifact_limit_bytes"),
)
# Settings whose score is legal on no track.
ILLEGAL = {
    ("gptq_calib", "train_after_cap"): "training data was used after the budget",
    ("ttt_mode", "train_then_score"): "the model trained on the text before it was scored",
}
# The challenge's published tokenizers fold characters, so that the bytes of one differ from
# another's by some thousandths.
VAL_TOLERANCE = 0.005
# Validation splits by fingerprint: their text, tokens and bytes as data/prepare.py counted them.
# Every vocabulary of `prepare.py docs` decodes to the same documents, so their scores compare.
DOCS = "docs"
KNOWN_SPLITS = {
    "77200814ad844a601a18461c27b0507005ef525d5da225459b973ee4efe257ff": (DOCS, 164_359, 365_438),
    "f1e1571a2a2c1ce474087f5ea479c4c1bbca9bbe0e9308a19009baf93b6cdc4f": (DOCS, 136_040, 365_438),
    "ff42b6162c397210e93ac47d05569644f3eabba4349b323983d66f4fc091c842": (DOCS, 120_309, 365_438),
    "ad8a659e33aa12bc5baabad65c508004aba470a0c501ee599e2e14a91a0753d6": (DOCS, 110_390, 365_438),
}


def named(name: str) -> str:
    """The full name of a track, whose `track_` may be left out; raises KeyError for none."""
    for full in (name, f"track_{name}"):
        if full in TRACKS:
            return full
    raise KeyError(f"track {name!r}: expected one of {', '.join(TRACKS)}")


def text_of(fingerprint: object) -> str:
    """The validation text behind a split's fingerprint, which stands for itself if unknown."""
    known = KNOWN_SPLITS.get(str(fingerprint))
    return known[0] if known else str(fingerprint)


def last(metrics: Metrics, kind: str) -> Mapping[str, Any]:
    """The last event of a kind; empty if there is none yet."""
    return next((event for event in reversed(metrics) if event.get("event") == kind), {})


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a number, which yes and no are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def reasons_against(track: str, settings: Settings, metrics: Metrics) -> list[str]:
    """Why a run cannot stand on a track, one line a reason; empty if nothing speaks against it.

    settings: as settings.json has them, such as {"max_wallclock_seconds": 600.0}.
    metrics: the events of metrics.jsonl so far. A rule about an event that is not there yet says
    nothing, so that a plan and a live run can ask too; a run that has its final score must have
    measured all that its track limits.
    Raises KeyError for an unknown track.
    """
    rules = TRACKS[track]
    return [
        *against_settings(rules, settings),
        *against_machine(rules, metrics),
        *against_data(rules, settings, metrics),
        *against_measures(rules, metrics),
    ]


def against_settings(rules: Track, settings: Settings) -> Iterator[str]:
    """Budgets that are larger than the track's or off, and settings that are never legal."""
    for limit_name, setting in BUDGETS:
        limit, given = getattr(rules, limit_name), settings.get(setting)
        if given is None or math.isinf(limit):
            continue
        if not is_number(given) or given > limit:
            yield f"{setting.upper()}={given}: the track allows {limit:,}"
        elif given == 0 and limit_name.startswith("max_train"):
            yield f"{setting.upper()}=0: the track's budget does not end the run"
    if begun_with := settings.get("init_from"):
        yield f"INIT_FROM={begun_with}: the run began with the weights of another"
    for (setting, value), reason in ILLEGAL.items():
        if settings.get(setting) == value:
            yield f"{setting.upper()}={value}: {reason}"


def against_machine(rules: Track, metrics: Metrics) -> Iterator[str]:
    """Another machine than the track is for, or a run that did not go through in one piece."""
    if machine := last(metrics, "machine"):
        name = f"{machine.get('world_size')} x {machine.get('name')}"
        right_device = not rules.device or machine.get("device") == rules.device
        if not right_device or (rules.machine and not re.fullmatch(rules.machine, name)):
            yield f"ran on {name} ({machine.get('device')}); the track is for {rules.machine_words}"
    if last(metrics, "resumed"):
        yield "the run was resumed from a checkpoint"


def against_data(rules: Track, settings: Settings, metrics: Metrics) -> Iterator[str]:
    """Another text than the track's, or one whose bytes were counted wrongly."""
    folder = re.split(r"[/\\]", str(settings.get("data_path", "")).rstrip("/\\"))[-1]
    dataset = str(last(metrics, "train_data").get("dataset", folder))
    if not dataset.startswith(rules.dataset):
        yield f"the data are {dataset!r}; the track is for {rules.dataset}*"
    data = last(metrics, "val_data")
    known = KNOWN_SPLITS.get(str(data.get("fingerprint")))
    if known and known[1:] != (data.get("tokens"), data.get("num_bytes")):
        yield f"this validation split has {known[1]:,} tokens and {known[2]:,} bytes"
    counted: Any = data.get("num_bytes")
    if data and rules.val_bytes:
        bytes_apart = abs(counted - rules.val_bytes) if is_number(counted) else math.inf
        if bytes_apart > VAL_TOLERANCE * rules.val_bytes:
            yield f"{counted} validation bytes; the track's text has {rules.val_bytes:,}"


def against_measures(rules: Track, metrics: Metrics) -> Iterator[str]:
    """Seconds, operations and bytes over the track's limits, and scores that are not legal."""
    final = last(metrics, "final")
    for limit_name, kind, key, words in MEASURES:
        limit, value = getattr(rules, limit_name), last(metrics, kind).get(key)
        if math.isinf(limit):
            continue
        if is_number(value):
            if value > limit:
                yield f"{value:,.10g} {words}; the track allows {limit:,}"
        elif value is not None or final:
            yield f"the run does not say its {words}, which the track limits to {limit:,}"
    if final:
        scored = [
            event
            for event in metrics
            if event.get("event") == "eval" and event.get("name") == final.get("name")
        ]
        if not scored or scored[-1].get("legal") is not True:
            yield f"the headline {final.get('name')} is not a legal score"
