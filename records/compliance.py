"""The four conditions of a legal score, tried on an artifact with the script that made it.

C1 strict causality, C2 a full distribution fixed before the target is seen, C3 score before
update, C4 one left-to-right pass. `suite` runs the given script: use it on your own runs, or on
folders whose script you have read.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

BOS = 1


def load_script(path: Path) -> ModuleType:
    """A train_gpt.py as a module of its own; leaves no __pycache__ beside it."""
    spec = importlib.util.spec_from_file_location("script_of_record", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def random_ids(vocab_size: int, rows: int, length: int) -> torch.Tensor:
    """Token ids of short documents: int64 (rows, length)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocab_size, (rows, length), generator=generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.02, BOS, ids)


@torch.no_grad()
def is_causal(model: Any, vocab_size: int, length: int) -> bool:
    """No logit changes, bit for bit, when any later token does; and later ones do change."""
    ids = random_ids(vocab_size, 2, length)
    before = model.logits(model.hidden(ids))
    for cut in (1, length // 3, length // 2, length - 1):
        changed = ids.clone()
        changed[:, cut:] = 2 + (changed[:, cut:] + 7) % (vocab_size - 2)
        after = model.logits(model.hidden(changed))
        if not torch.equal(before[:, :cut], after[:, :cut]) or torch.equal(
            before[:, cut:], after[:, cut:]
        ):
            return False
    return True


@torch.no_grad()
def is_a_distribution(model: Any, vocab_size: int, length: int) -> bool:
    """Probabilities of all tokens sum to one, are what is scored, and do not know the target."""
    ids = random_ids(vocab_size, 2, length + 1)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    logits = model.logits(model.hidden(inputs)).double()
    p = torch.softmax(logits, dim=-1)
    nats = model(inputs, targets)[0].double()
    scored = -torch.log(p.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
    other = targets.clone()
    other[:, 3] = 2 + (other[:, 3] + 5) % (vocab_size - 2)
    moved = model(inputs, other)[0].double() != nats
    moved[:, 3] = False
    return (
        logits.size(-1) == vocab_size
        and bool(p.isfinite().all())
        and not bool(moved.any())
        and float((p.sum(-1) - 1).abs().max()) < 1e-9
        and float((scored - nats).abs().max()) < 1e-3
    )


def scores_once(script: ModuleType, cfg, num_targets: int) -> bool:
    """Every target is scored by exactly one window, from left to right."""
    spans = script.windows(num_targets, cfg.eval_seq_len, cfg.eval_stride)
    scored = np.concatenate([np.arange(first, end) for _, first, end in spans])
    return np.array_equal(scored, np.arange(num_targets))


def scores_before_update(script: Any, cfg, model: Any) -> bool:
    """Weights learn from no target before its score is final; without adaptation, never."""
    cfg = replace(
        cfg,
        ttt_chunk_tokens=2 * cfg.eval_seq_len,
        compile="0",
        eval_truncate=False,
        eval_stride=max(1, cfg.eval_seq_len // 4),
    )
    tokens = random_ids(cfg.vocab_size, 1, 5 * cfg.eval_seq_len)[0].numpy().astype(np.uint16)
    val = script.Validation(tokens, np.ones(len(tokens) - 1, np.int16), "", "", 1, len(tokens))
    run, scored, legal = script.Run(cfg, 0, 1, torch.device("cpu")), [0], []
    score_windows = script.score_windows
    before = [p.clone() for p in model.parameters()]

    def recorded(forward, net, val, spans, *rest):
        result = score_windows(forward, net, val, spans, *rest)
        scored.append(max(scored[-1], int(spans[:, 2].max())))
        return result

    adapter = None
    if cfg.ttt_mode == "score_first":
        adapter = script.Adapter(script.training_nats, model, val, run)
        learn = adapter.learn

        def watched(first: int, end: int, *rest) -> int:
            legal.append(end <= scored[-1])
            return learn(first, end, *rest)

        adapter.learn = watched
    script.score_windows = recorded
    try:
        script.evaluate(
            "compliance", script.training_nats, model, val, run, cfg.eval_stride, "cover", adapter
        )
    finally:
        script.score_windows = score_windows
    if adapter is not None:
        return bool(legal) and all(legal)
    return all(map(torch.equal, before, model.parameters()))


def suite(script_path: Path, artifact: Path, settings: dict) -> dict[str, bool]:
    """Condition to whether it holds, on the model in `artifact`."""
    script = load_script(script_path)
    header, stored = script.read_artifact(artifact)
    cfg = replace(script.Config.from_env(header["settings"])[0], compile="0")
    length = min(cfg.eval_seq_len, 512)
    run = script.Run(cfg, 0, 1, torch.device("cpu"))

    def fresh():
        return script.rebuild_model(cfg, stored, run)

    model, ids = fresh(), random_ids(cfg.vocab_size, 2, length)
    with torch.no_grad():
        same = torch.equal(model.hidden(ids), fresh().hidden(ids))
    return {
        "causality": is_causal(model, cfg.vocab_size, length),
        "full_distribution": is_a_distribution(model, cfg.vocab_size, length),
        "single_pass": all(
            scores_once(script, cfg, n) for n in (1, cfg.eval_seq_len, 10 * cfg.eval_seq_len + 3)
        ),
        "score_before_update": scores_before_update(script, cfg, fresh()),
        "determinism": same,
        "legal_settings": settings["ttt_mode"] != "train_then_score"
        and settings["gptq_calib"] != "train_after_cap",
    }


if __name__ == "__main__":
    print(
        json.dumps(
            suite(
                Path(sys.argv[1]),
                Path(sys.argv[2]),
                json.loads(Path(sys.argv[3]).read_text(encoding="utf-8")),
            )
        )
    )
