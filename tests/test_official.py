"""Folders in the form of the challenge: what is wrong is named, what nobody can tell is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))
import checking
import record

# A stranger's folder in the official format


def described(folder: Path, seeds: dict[int, dict], **claims: object) -> Path:
    """A folder as the official repository's README describes it."""
    folder.mkdir()
    (folder / "train_gpt.py").write_text("x = 1\n")
    (folder / "README.md").write_text("# Ours\n")
    for seed, facts in seeds.items():
        lines = [
            "step:20000/20000 train_loss:2.1 train_time:599000ms step_avg:85ms",
            f"stopping_early: wallclock_cap train_time:{facts.get('ms', 599_900)}ms "
            "step:7000/20000",
            "Code size: 6 bytes",
            f"Total submission size int6+zstd: {facts.get('total', 15_900_000)} bytes",
        ]
        if "bpb" in facts:
            lines.append(
                f"final_int6_sliding_window_exact val_loss:1.9 val_bpb:{facts['bpb']} "
                "eval_time:75000ms"
            )
        (folder / f"train_seed{seed}.log").write_text("\n".join(lines) + "\n")
    (folder / "submission.json").write_text(
        json.dumps(
            {"author": "B", "name": "Theirs", "val_bpb": 1.12, "bytes_total": 15_900_000, **claims}
        )
    )
    return folder


def test_a_sound_folder_in_the_official_format(tmp_path: Path) -> None:
    folder = described(tmp_path / "theirs", {1: {"bpb": 1.11}, 2: {"bpb": 1.12}, 3: {"bpb": 1.13}})
    assert record.main(["check", str(folder)]) == 0
    assert checking.check_folder(folder).not_verified


def test_three_planted_faults_are_named(tmp_path: Path, capsys) -> None:
    folder = described(
        tmp_path / "theirs",
        {1: {"bpb": 1.11}, 2: {"bpb": 1.12, "total": 16_024_793}, 3: {}},
        val_bpb=1.10,
    )
    assert record.main(["check", str(folder)]) == 1
    capsys.readouterr()
    out = "\n".join(checking.check_folder(folder).findings)
    assert "train_seed2.log: 16,024,793 bytes are over the cap" in out
    assert "train_seed3.log: no line of the final score" in out
    assert "val_bpb is 1.1, the logs' mean is 1.115" in out


@pytest.mark.parametrize(
    ("seeds", "claims", "words"),
    [
        ({1: {"bpb": 1.12}, 2: {"bpb": 1.12}}, {}, "2 logs"),
        (
            {1: {"bpb": 1.12, "ms": 602_000}, 2: {"bpb": 1.12}, 3: {"bpb": 1.12}},
            {},
            "train_seed1.log: training took 602,000 ms",
        ),
        (
            {n: {"bpb": 1.12} for n in (1, 2, 3)},
            {"bytes_total": 15_000_000},
            "bytes_total is 15000000",
        ),
        (
            {n: {"bpb": 1.12} for n in (1, 2, 3)},
            {"seed_results": {"1": {"val_bpb": 1.05}}},
            "1.05 of a seed is in no log",
        ),
    ],
)
def test_other_faults_in_the_official_format(seeds, claims, words, tmp_path: Path, capsys) -> None:
    assert record.main(["check", str(described(tmp_path / "theirs", seeds, **claims))]) == 1
    assert words in capsys.readouterr().out


# Logs as two generations of the official script wrote them, from published folders.
EARLY = """val_loader:shards pattern=/data/fineweb_val_*.bin tokens:62021632
model_params:17059912
tie_embeddings:True embed_lr:0.1 matrix_lr:{lr} scalar_lr:0.04
seed:{seed}
warmup_step:1/20
step:200/20000 train_loss:2.9737 train_time:9015ms step_avg:45.08ms
stopping_early: wallclock_cap train_time:{ms}ms step:13224/20000
Code size: 6 bytes
Total submission size: 67270835 bytes
Total submission size int8+zlib: {total} bytes
final_int8_zlib_roundtrip val_loss:2.0425 val_bpb:1.2097 eval_time:{eval_ms}ms
final_int8_zlib_roundtrip_exact val_loss:2.04248064 val_bpb:{bpb}
"""
LATE = """Hyperparameters:
  matrix_lr: {lr}
  seed: {seed}
val_tokens: 40540160
warmup_step: 1/20
0/20000 val_loss: 9.0090 val_bpb: 3.4877
stopping_early: wallclock_cap train_time: {ms}ms step: 4550/20000
pre-quantization post-ema val_loss:2.80873254 val_bpb:1.08734790 eval_time:7440ms
Code size: 6 bytes
Total submission size quantized+brotli: {total} bytes
quantized_sliding_window val_loss:2.79714850 val_bpb:1.08286335 eval_time:120961ms
quantized_ttt val_loss:2.79180191 val_bpb:{bpb} eval_time:{eval_ms}ms
"""


def published(folder: Path, log: str, second: dict | None = None, **claims: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_text("x = 1\n")
    (folder / "README.md").write_text("# Theirs\n")
    bpb, results = "1.20967208" if log is EARLY else "1.08079352", {}
    for seed in (42, 314, 999):
        facts = {
            "seed": seed,
            "lr": 0.022,
            "ms": 588_047,
            "total": 15_991_930 + seed,
            "bpb": bpb,
            "eval_ms": 366_525,
            **((second or {}) if seed == 314 else {}),
        }
        (folder / f"train_seed{seed}.log").write_text(log.format(**facts))
        results[seed] = {"val_bpb": float(facts["bpb"]), "artifact_bytes": facts["total"]}
    (folder / "submission.json").write_text(
        json.dumps({"val_bpb": float(bpb), "seed_results": results, **claims})
    )
    return folder


@pytest.mark.parametrize("log", [EARLY, LATE])
@pytest.mark.parametrize(
    ("second", "claims", "words"),
    [
        ({}, {}, ""),
        ({"total": 16_071_321}, {}, "train_seed314.log: 16,071,321 bytes are over the cap"),
        ({"ms": 602_000}, {}, "train_seed314.log: training took 602,000 ms"),
        ({"eval_ms": 688_000}, {}, "train_seed314.log: evaluation took 688,000 ms"),
        ({"lr": 0.026}, {}, "train_seed314.log: matrix_lr is 0.026"),
        ({"seed": 42}, {}, "seeds [42, 42, 999]: one stands twice"),
        ({"bpb": "0.92379000"}, {}, "validation bytes, the text has 151,080,891"),
        ({}, {"val_bpb_std": 0.02}, "val_bpb_std is 0.02"),
        ({}, {"artifact_size_bytes": 15_000_000}, "artifact_size_bytes is 15000000"),
        ({}, {"bytes_model_int6_zstd": 16_000_001}, "over the cap"),
        ({}, {"seed_results": {"42": {"artifact_bytes": 15_000_000}}}, "15000000 of a seed"),
        ({}, {"val_bpb": "1.08"}, "val_bpb is '1.08', not a number"),
        ({}, {"val_bpb": None}, "val_bpb is None, not a number"),
        ({}, {"seed_results": [1, 2], "bytes_total": 15_991_972}, ""),
    ],
)
def test_folders_as_published(
    log: str, second: dict, claims: dict, words: str, tmp_path: Path, capsys
) -> None:
    folder = published(tmp_path / "theirs", log, second, **claims)
    assert record.main(["check", str(folder)]) == int(bool(words))
    assert words in capsys.readouterr().out
