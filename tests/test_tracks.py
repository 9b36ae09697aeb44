"""The rules of the tracks: each limit acts, and what is not known yet speaks against nobody."""

from __future__ import annotations

import math
import sys

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / "records"))
import tracks
from tracks import TRACKS, reasons_against

SETTINGS = {
    "max_wallclock_seconds": 600.0,
    "eval_wallclock_seconds": 600.0,
    "artifact_limit_bytes": 16_000_000,
    "gptq_calib": "train",
    "ttt_mode": "off",
    "data_path": "data/datasets/fineweb10B_sp1024",
}


def metrics_of(**changed: dict) -> list[dict]:
    """The events of a sound run on the challenge's track, with facts changed by event."""
    sound: dict[str, dict] = {
        "machine": {"device": "cuda", "world_size": 8, "name": "NVIDIA H100 80GB HBM3"},
        "train_data": {"dataset": "fineweb10B_sp1024"},
        "val_data": {"fingerprint": "f" * 64, "tokens": 62_021_846, "num_bytes": 151_080_891},
        "eval": {"name": "artifact_sliding", "legal": True, "val_bpb": 1.1},
        "artifact": {"total": 15_999_999},
        "work": {"tflops": 19.5, "eval_tflops": 8.0, "table_seconds": 60.0},
        "summary": {"seconds": 599.9, "eval_seconds": 400.0},
        "final": {"name": "artifact_sliding", "val_bpb": 1.1},
    }
    return [{"event": kind, **facts, **changed.get(kind, {})} for kind, facts in sound.items()]


CPU_MACHINE = {"device": "cpu", "world_size": 1, "name": "2 threads of AMD EPYC"}
DOCS = {"dataset": "docs_sp1024"}


def test_a_sound_run_has_nothing_against_it() -> None:
    assert reasons_against("track_10min_16mb", SETTINGS, metrics_of()) == []
    assert reasons_against("track_non_record_16mb", SETTINGS, metrics_of()) == []
    settings = SETTINGS | {"max_wallclock_seconds": 300.0}
    summary = {"seconds": 299.0, "eval_seconds": 30.0}
    docs = metrics_of(machine=CPU_MACHINE, train_data=DOCS, summary=summary)
    assert reasons_against("track_cpu_5min", settings, docs) == []
    counted = SETTINGS | {"max_wallclock_seconds": 0.0, "max_train_tflops": 20.0}
    assert reasons_against("track_cpu_20tflop", counted, docs) == []


BROKEN = [
    ("track_10min_16mb", {"max_wallclock_seconds": 0.0}, {}),
    ("track_10min_16mb", {"max_wallclock_seconds": 601.0}, {}),
    ("track_10min_16mb", {"eval_wallclock_seconds": 601.0}, {}),
    ("track_10min_16mb", {"artifact_limit_bytes": 16_000_001}, {}),
    ("track_10min_16mb", {"gptq_calib": "train_after_cap"}, {}),
    ("track_10min_16mb", {"ttt_mode": "train_then_score"}, {}),
    ("track_10min_16mb", {"init_from": "runs/a/artifact.bin"}, {}),
    ("track_10min_16mb", {}, {"machine": {"world_size": 4}}),
    ("track_10min_16mb", {}, {"machine": {"name": "NVIDIA A100"}}),
    ("track_10min_16mb", {}, {"machine": CPU_MACHINE}),
    ("track_10min_16mb", {}, {"train_data": DOCS}),
    ("track_10min_16mb", {}, {"val_data": {"num_bytes": 150_000_000}}),
    ("track_10min_16mb", {}, {"val_data": {"num_bytes": "many"}}),
    ("track_10min_16mb", {}, {"summary": {"seconds": 600.1}}),
    ("track_10min_16mb", {}, {"summary": {"eval_seconds": 600.1}}),
    ("track_10min_16mb", {}, {"summary": {"seconds": None}}),
    ("track_10min_16mb", {}, {"summary": {"seconds": True}}),
    ("track_10min_16mb", {}, {"artifact": {"total": 16_000_001}}),
    ("track_10min_16mb", {}, {"eval": {"legal": False}}),
    ("track_10min_16mb", {}, {"final": {"name": "float_chunked"}}),
    ("track_cpu_20tflop", {"max_train_tflops": 0.0}, {"train_data": DOCS}),
    ("track_cpu_20tflop", {"max_train_tflops": 21.0}, {"train_data": DOCS}),
    ("track_cpu_20tflop", {}, {"train_data": DOCS, "work": {"tflops": 20.1}}),
    ("track_cpu_20tflop", {}, {"train_data": DOCS, "work": {"eval_tflops": 10.1}}),
    ("track_cpu_20tflop", {}, {"train_data": DOCS, "work": {"table_seconds": 121}}),
    ("track_cpu_20tflop", {}, {"train_data": DOCS, "work": {"tflops": None}}),
    ("track_cpu_20tflop", {}, {"train_data": {"dataset": "fineweb10B_sp1024"}}),
]


@pytest.mark.parametrize(("track", "settings", "facts"), BROKEN)
def test_each_rule_alone_gives_one_reason(track: str, settings: dict, facts: dict) -> None:
    found = reasons_against(track, SETTINGS | settings, metrics_of(**facts))
    assert len(found) == 1
    assert "\n" not in found[0]


def test_a_known_split_has_its_tokens_and_bytes_and_a_resumed_run_is_told() -> None:
    fingerprint, (text, tokens, num_bytes) = next(iter(tracks.KNOWN_SPLITS.items()))
    right = {"fingerprint": fingerprint, "tokens": tokens, "num_bytes": num_bytes}
    track = "track_non_record_16mb"
    assert not reasons_against(track, SETTINGS, metrics_of(val_data=right))
    for wrong in (right | {"tokens": tokens - 1}, right | {"num_bytes": 2 * num_bytes}):
        assert len(reasons_against(track, SETTINGS, metrics_of(val_data=wrong))) == 1
    assert tracks.text_of(fingerprint) == text
    assert tracks.text_of(["x"]) != text
    resumed = [{"event": "resumed"}, *metrics_of()]
    assert len(reasons_against("track_10min_16mb", SETTINGS, resumed)) == 1


@given(length=st.integers(0, 8), track=st.sampled_from(sorted(TRACKS)))
def test_what_is_not_known_yet_speaks_against_nobody(length: int, track: str) -> None:
    """A plan and a live run of a sound recipe hear only what stays wrong to the end."""
    at_end = reasons_against(track, SETTINGS, metrics_of())
    assert set(reasons_against(track, SETTINGS, metrics_of()[:length])) <= set(at_end)


@given(
    limit_name=st.sampled_from([name for name, *_ in tracks.MEASURES]),
    track=st.sampled_from(sorted(TRACKS)),
    part=st.floats(0, 2, exclude_min=True),
)
def test_a_measure_passes_up_to_its_limit(limit_name: str, track: str, part: float) -> None:
    _, kind, key, words = next(row for row in tracks.MEASURES if row[0] == limit_name)
    limit = getattr(TRACKS[track], limit_name)
    value = part * limit if math.isfinite(limit) else 1e12 * part
    found = reasons_against(track, SETTINGS, metrics_of(**{kind: {key: value}}))
    assert any(words in reason for reason in found) == (value > limit)


def test_tracks_are_named_with_or_without_their_beginning() -> None:
    for track in TRACKS:
        assert tracks.named(track) == tracks.named(track.removeprefix("track_")) == track
    with pytest.raises(KeyError):
        tracks.named("moon")
    with pytest.raises(KeyError):
        reasons_against("moon", {}, [])
