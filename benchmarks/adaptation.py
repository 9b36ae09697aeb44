"""What adaptation by document (TTT_MODE=lora) gains a kept artifact, and what it costs.

    python benchmarks/adaptation.py ARTIFACT [ARTIFACT ...] [--data FOLDER] [--share N]
        [--from K] [--try "LORA_RANK=8 LORA_LR=0.001"] ...

Scores every N-th document of the split, the K-th first, in chunks and document by document: by each
--try, of which "LORA_LR=0" learns nothing, so that its longer windows alone help, and "" has the
settings of #1855. Time is a multiple of that of the chunks. Choose settings on a hold-out
(benchmarks/holdout.py), not on the validation split.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_gpt as t  # noqa: E402

BUDGET = "1000000"  # seconds, so that nothing is trimmed


def some_documents(val: t.Validation, cfg: t.Config, begin: int, share: int) -> t.Validation:
    """The split with every `share`-th document only, from number `begin` on."""
    kept = [np.arange(first, end) for first, end in t.documents_of(val, cfg)[begin::share]]
    targets = np.concatenate(kept)
    tokens = np.append(val.tokens[targets], val.tokens[targets[-1] + 1])
    return replace(val, tokens=tokens, target_bytes=val.target_bytes[targets], documents=len(kept))


def score(artifact: Path, given: argparse.Namespace, changed: dict[str, str]) -> t.EvalResult:
    """The headline of an artifact under these settings, on some documents."""
    env = {"EVAL_WALLCLOCK_SECONDS": BUDGET, "EVAL_STRIDE": "0", **changed}
    header, stored = t.read_artifact(artifact)
    cfg, _ = t.settings_within(header, env)
    if given.data:
        cfg = t.locate_tokenizer(replace(cfg, data_path=given.data), header)
    else:
        cfg = t.locate_validation(cfg, header)
    run = t.Run(cfg, 0, 1, torch.device("cpu"))
    val = some_documents(t.load_validation(cfg), cfg, given.begin, given.share)
    scores = t.ArtifactScores(stored, val, t.training_nats, run)
    with run.ledger.scoring_clock.running(), contextlib.redirect_stdout(io.StringIO()):
        return scores.headline()


def main() -> None:
    """Score each artifact in each way and print a table of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--data", default="", help="the data set's folder")
    parser.add_argument("--share", type=int, default=1, help="score every N-th document")
    parser.add_argument("--from", dest="begin", type=int, default=0, help="first document")
    parser.add_argument("--try", dest="tried", action="append", help="settings")
    given = parser.parse_args()
    print(f"{'':<60}{'bits a byte':>12}{'gain':>9}{'time':>7}")
    for artifact in given.artifacts:
        plain = score(artifact, given, {"TTT_MODE": "off"})
        print(f"{artifact}: {plain.targets:,} targets\n{'chunks':<60}{plain.bpb:>12.5f}")
        for text in given.tried or ["LORA_LR=0", ""]:
            changed = dict(pair.split("=") for pair in text.split())
            found = score(artifact, given, {"TTT_MODE": "lora", **changed})
            gain, times = plain.bpb - found.bpb, found.seconds / plain.seconds
            print(
                f"{text or 'as #1855':<60}{found.bpb:>12.5f}{gain:>9.5f}{times:>7.1f}", flush=True
            )


if __name__ == "__main__":
    main()
