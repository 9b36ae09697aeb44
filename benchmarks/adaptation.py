"""What adaptation by document (TTT_MODE=lora) gains a kept artifact, and what it costs.

    python benchmarks/adaptation.py ARTIFACT [ARTIFACT ...] [--data FOLDER] [--share N]
        [--try "LORA_RANK=8 LORA_LR=0.001"] ...

Scores every N-th document of the split in chunks, document by document without learning (its
windows alone help), and so with learning: by the settings of the system #1855 and by each --try.
Seconds are shares of those of the chunks. Choose settings on a hold-out (benchmarks/holdout.py),
not on the validation split.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_gpt as t  # noqa: E402

BUDGET = "1000000"  # seconds, so that nothing is trimmed


def some_documents(val: t.Validation, cfg: t.Config, share: int) -> t.Validation:
    """The split with every `share`-th document only."""
    kept = [np.arange(first, end) for first, end in t.documents_of(val, cfg)[::share]]
    targets = np.concatenate(kept)
    tokens = np.append(val.tokens[targets], val.tokens[targets[-1] + 1])
    return replace(val, tokens=tokens, target_bytes=val.target_bytes[targets], documents=len(kept))


def score(artifact: Path, data: str, share: int, changed: dict[str, str]) -> t.EvalResult:
    """The headline of an artifact under these settings, on some documents."""
    env = {"EVAL_WALLCLOCK_SECONDS": BUDGET, "EVAL_STRIDE": "0", **changed}
    header, stored = t.read_artifact(artifact)
    cfg, _ = t.settings_within(header, env)
    cfg = t.locate_tokenizer(replace(cfg, data_path=data or cfg.data_path), header)
    run = t.Run(cfg, 0, 1, torch.device("cpu"))
    val = some_documents(t.load_validation(cfg), cfg, share)
    scores = t.ArtifactScores(stored, val, t.training_nats, run)
    with run.ledger.scoring_clock.running():
        return scores.headline()


def main() -> None:
    """Score each artifact in each way and print a table of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--data", default="", help="the data set's folder")
    parser.add_argument("--share", type=int, default=1, help="score every N-th document")
    parser.add_argument("--try", dest="tried", action="append", default=[], help="settings")
    given = parser.parse_args()
    ways = {
        "chunks": {"TTT_MODE": "off"},
        "documents, no learning": {"TTT_MODE": "lora", "LORA_LR": "0"},
        "as in #1855": {"TTT_MODE": "lora"},
    }
    for text in given.tried:
        ways[text] = {"TTT_MODE": "lora", **dict(pair.split("=") for pair in text.split())}
    print(f"{'':<60}{'bits a byte':>12}{'gain':>9}{'time':>7}")
    for artifact in given.artifacts:
        print(artifact)
        plain = score(artifact, given.data, given.share, ways["chunks"])
        for name, changed in ways.items():
            found = score(artifact, given.data, given.share, changed)
            gain = plain.bpb - found.bpb
            print(
                f"{name:<60}{found.bpb:>12.5f}{gain:>9.5f}{found.seconds / plain.seconds:>7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
