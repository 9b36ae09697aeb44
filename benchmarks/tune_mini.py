"""Compare settings of the mini preset on a hold-out of the training split.

    python benchmarks/tune_mini.py STEPS "LR_MULT=2 WARMDOWN_FRAC=0.6" "LR_MULT=4" ...

Each argument is one trial: settings on top of PRESET=mini, trained step-driven for STEPS steps
(or for SECONDS with STEPS=300s) and scored on the last 192 rows of the first epoch's order, which
such runs do not reach. Trials of different TRAIN_SEQ_LEN score different text: do not compare
them. One JSON line a trial goes to standard output. The validation split is not read.
"""

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t

HOLDOUT_ROWS = 192


@torch.inference_mode()
def holdout_loss(model: t.GPT, rows: t.TrainingRows) -> float:
    """Mean nats a token on the hold-out rows."""
    first = rows.num_blocks - HOLDOUT_ROWS
    batches = [rows.batch(first + start, 32) for start in range(0, HOLDOUT_ROWS, 32)]
    return sum(model(*batch).mean().item() for batch in batches) / len(batches)


def trial(budget: str, overrides: str) -> dict:
    """Train once and return what came out."""
    env = dict(pair.split("=", 1) for pair in overrides.split())
    limit = {"MAX_WALLCLOCK_SECONDS": budget[:-1]} if budget.endswith("s") else \
        {"MAX_WALLCLOCK_SECONDS": "0", "ITERATIONS": budget}
    cfg, _ = t.Config.from_env({"PRESET": "mini", "VAL_LOSS_EVERY": "0", **limit, **env})
    rows = t.TrainingRows(cfg)
    with t.Run.start(cfg) as run:
        model = t.GPT(cfg)
        t.initialize(model, cfg)
        reserve = t.calibration_reserve(t.prime(t.training_nats, model, rows, run)[0], run)
        start = time.perf_counter()
        averaged, steps = t.train(t.training_nats, model, rows, None, reserve, run)
        seconds = time.perf_counter() - start
        if steps * cfg.rows_per_step > rows.num_blocks - HOLDOUT_ROWS:
            raise SystemExit("this trial trained on its hold-out: take fewer steps")
    return {"settings": overrides, "budget": budget, "steps": steps, "seconds": round(seconds, 1),
            "tokens": steps * cfg.train_batch_tokens, "parameters": sum(
                p.numel() for p in model.parameters()),
            "holdout_nats": round(holdout_loss(averaged, rows), 5),
            "raw_nats": round(holdout_loss(model, rows), 5)}


def main() -> None:
    """Run the trials of the command line one after another."""
    for overrides in sys.argv[2:]:
        print(json.dumps(trial(sys.argv[1], overrides)), flush=True)


if __name__ == "__main__":
    main()
