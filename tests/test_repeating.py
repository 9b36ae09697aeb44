"""An entry's score comes out again from its script and settings, or the command says it did not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT, TinyData
from jobs import environment, tiny_job

import train_gpt

sys.path.insert(0, str(ROOT / "records"))
import record
import repeating
from reading import Run, Wrong


def run_of(seed: int, score: float, name: str = "1 threads of X", processes: int = 1) -> Run:
    """A finished run of which only machine and score matter."""
    events = [
        {"event": "machine", "name": name, "world_size": processes},
        {"event": "final", "val_bpb": score},
    ]
    return Run(Path("runs/x/metrics.jsonl"), seed, events, {})


def test_a_seed_is_trained_again_to_the_last_digit(
    tiny_data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    folders = []
    for seed in (1, 2):
        job = tiny_job(tiny_data, tmp_path, f"seed-{seed}", SEED=str(seed), ITERATIONS="12")
        with environment(**job):
            assert train_gpt.main([]) == 0
        folders.append(str(tmp_path / f"seed-{seed}"))
    about = ["--name", "Tiny", "--author", "Ann", "--github-id", "ann", "--blurb", "A trial."]
    about += ["--track", "non_record_16mb", "--root", str(tmp_path / "records")]
    assert record.main(["new", *folders, *about, "--date", "2026-01-02"]) == 0
    entry = tmp_path / "records" / "track_non_record_16mb" / "2026-01-02_Tiny"
    monkeypatch.setenv("SEED", "7")  # the entry's own settings count, not the environment's
    monkeypatch.setenv("PRESET", "pr1361")
    again = ["repeat", str(entry), "--seed", "2", "--runs", str(tmp_path / "again")]
    capsys.readouterr()
    assert record.main(again) == 0
    assert "equal to the last digit" in capsys.readouterr().out
    assert record.main(again) == 1  # what was trained is not overwritten
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("score", "name", "same", "words"),
    [
        (1.5, "1 threads of X", True, "equal to the last digit"),
        (1.50001, "1 threads of X", True, "on this kind of machine"),
        (1.50001, "8 threads of Y", True, "on another kind of machine"),
        (1.53, "8 threads of Y", False, "farther than two standard deviations"),
    ],
)
def test_another_score_is_judged_by_the_scatter_of_the_seeds(
    score: float, name: str, same: bool, words: str
) -> None:
    entry = [run_of(1, 1.5), run_of(2, 1.51), run_of(3, 1.49)]
    holds, said = repeating.verdict(entry, entry[0], run_of(1, score, name))
    assert holds is same
    assert words in said


def test_a_seed_that_the_entry_lacks_is_refused() -> None:
    assert repeating.chosen([run_of(4, 1.0), run_of(5, 1.0)], None).seed == 4
    with pytest.raises(Wrong, match="--seed 6: the entry has 4, 5"):
        repeating.chosen([run_of(4, 1.0), run_of(5, 1.0)], 6)
