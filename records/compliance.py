"""What only a train_gpt.py itself can say: whether its artifact keeps the rules, and its defaults.

The four conditions of a legal score are tried on an artifact with the script that made it: strict
causality, a full distribution fixed before the target is seen, score before update, one pass from
left to right. A condition whose parts a script does not have, because it was written differently,
is None: not tried.

This file runs the script that it is given. record.py calls it as a process of its own, for runs
of your own and, with --rescore, for folders whose script you have read.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import tracks
from reading import shown

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
def is_a_distribution(model: Any, score: Callable, vocab_size: int, length: int) -> bool:
    """Probabilities of all tokens sum to one, are what is scored, and do not know the target.

    score: the nats (B, T) that the model gives for inputs and targets (B, T).
    """
    ids = random_ids(vocab_size, 2, length + 1)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    logits = model.logits(model.hidden(inputs)).double()
    probabilities = torch.softmax(logits, dim=-1)
    nats = score(inputs, targets).double()
    scored = -torch.log(probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
    other = targets.clone()
    other[:, 3] = 2 + (other[:, 3] + 5) % (vocab_size - 2)
    moved = score(inputs, other).double() != nats
    moved[:, 3] = False
    return (
        logits.size(-1) == vocab_size
        and bool(probabilities.isfinite().all())
        and not bool(moved.any())
        and float((probabilities.sum(-1) - 1).abs().max()) < 1e-9
        and float((scored - nats).abs().max()) < 1e-3
    )


def scores_once(windows: Callable, length: int, stride: int, num_targets: int) -> bool:
    """Every target is scored by exactly one window, from left to right."""
    spans = windows(num_targets, length, stride)
    scored = np.concatenate([np.arange(first, end) for _, first, end in spans])
    return np.array_equal(scored, np.arange(num_targets))


Scores = dict[int, tuple[int, float]]  # by target: in which call it was scored, and its nats


def document_scores(script: Any, cfg: Any, model: Any, tokens: np.ndarray) -> Scores:
    """What each target costs where documents adapt to themselves; raises ValueError if twice."""
    found: Scores = {}
    calls = 0
    score_chunk = script.DocumentScorer.score_chunk

    def recorded(self: Any, documents: np.ndarray, at: int, width: int, *rest: Any) -> Any:
        nonlocal calls
        result = score_chunk(self, documents, at, width, *rest)
        calls += 1
        for nats, (first, end) in zip(result[1].tolist(), documents.tolist(), strict=True):
            for target in range(first + at, min(first + at + width, end)):
                if target in found:
                    raise ValueError(f"target {target} is scored twice")
                found[target] = calls, nats[target - first - at]
        return result

    val = script.Validation(tokens, np.ones(len(tokens) - 1, np.int16), "", "", 1, len(tokens))
    run = script.Run(cfg, 0, 1, torch.device("cpu"))
    script.DocumentScorer.score_chunk = recorded
    try:
        script.evaluate_documents("compliance", script.training_nats, model, val, run)
    finally:
        script.DocumentScorer.score_chunk = score_chunk
    if not run.ledger.activity["ttt"]:
        raise ValueError("adaptation never acted")
    return found


def count_scores(mixture: Any, vocab_size: int, tokens: np.ndarray, at_once: int) -> Scores:
    """What each target costs by a mixture of counts and of a network that is made up."""
    generator = torch.Generator().manual_seed(0)
    found: Scores = {}
    for first in range(0, len(tokens) - 1, at_once):
        targets = range(first, min(first + at_once, len(tokens) - 1))
        logits = torch.randn(len(targets), vocab_size, generator=generator)
        nats = mixture.score(torch.log_softmax(logits, dim=-1)).tolist()
        # In the order of the text: each target may know all before it.
        found |= {target: (target, x) for target, x in zip(targets, nats, strict=True)}
    return found


def earlier_scores_stay(score: Callable[[np.ndarray], Scores], tokens: np.ndarray) -> bool:
    """Whether no token changes what a target costs that is scored before it, and some do later.

    score: of a text's targets. Targets that one call scores are those of different documents, or
    of one in its order.
    """
    before = score(tokens)
    if sorted(before) != list(range(len(tokens) - 1)):
        return False
    documents = np.cumsum(tokens == BOS)
    acts = False
    inside = np.flatnonzero((tokens != BOS) & (np.arange(len(tokens)) > 0))
    for changed in inside[[len(inside) // 8, len(inside) // 2, 3 * len(inside) // 4]].tolist():
        other = tokens.copy()
        other[changed] = tokens[changed] - 1 if tokens[changed] > 2 else tokens[changed] + 1
        after = score(other)
        call = before[changed - 1][0]
        for target, (scored_at, nats) in before.items():
            is_beside = documents[target] != documents[changed] or target < changed - 1
            is_earlier = scored_at < call or (scored_at == call and is_beside)
            if is_earlier and target != changed - 1 and after[target] != (scored_at, nats):
                return False
            acts |= scored_at > call and after[target][1] != nats
    return acts


def additions_score_first(
    script: Any, settings: dict[str, str], fresh: Callable[[], Any], stored: Any
) -> bool:
    """Adaptation by document and counts learn from no target before its score is final."""
    values = flat(settings_of(script, settings))
    vocab_size, length = values["vocab_size"], values["eval_seq_len"]
    tokens = random_ids(vocab_size, 1, 4 * length + 1)[0].numpy().astype(np.uint16)
    if values["ttt_mode"] == "lora":
        few = {"LORA_LANES": "1", "LORA_BATCH_DOCS": "4", "LORA_PHASE_DOCS": "8"}
        few |= {"EVAL_WALLCLOCK_SECONDS": "1000000", "EVAL_TRUNCATE": "0"}
        cfg = settings_of(script, settings | few)
        if not earlier_scores_stay(
            lambda text: document_scores(script, cfg, fresh(), text), tokens
        ):
            return False
    if values.get("counts", "off") != "off":
        cfg = settings_of(script, settings)
        training = np.empty(0, np.uint16)
        if cfg.counts_training_text:
            training = script.text_of_artifact(stored, cfg)

        def score(text: np.ndarray) -> Scores:
            mixture = script.Mixture(cfg, training, text, vocab_size)
            return count_scores(mixture, vocab_size, text, at_once=length)

        return earlier_scores_stay(score, tokens)
    return True


def scores_before_update(script: Any, settings: dict[str, str], model: Any) -> bool:
    """Weights learn from no target before its score is final; without adaptation, never."""
    length = int(settings["EVAL_SEQ_LEN"])
    stride = max(1, length // 4)
    cfg = settings_of(
        script,
        settings
        | {
            "TTT_CHUNK_TOKENS": str(2 * length),
            "EVAL_TRUNCATE": "0",
            "EVAL_STRIDE": str(stride),
        },
    )
    values = flat(cfg)
    tokens = random_ids(values["vocab_size"], 1, 5 * length)[0].numpy().astype(np.uint16)
    val = script.Validation(tokens, np.ones(len(tokens) - 1, np.int16), "", "", 1, len(tokens))
    run = script.Run(cfg, 0, 1, torch.device("cpu"))
    scored, legal = [0], []
    score_windows = script.score_windows
    before = [parameter.clone() for parameter in model.parameters()]

    def recorded(forward, net, val, spans, *rest):
        result = score_windows(forward, net, val, spans, *rest)
        scored.append(max(scored[-1], int(spans[:, 2].max())))
        return result

    adapter = None
    if values["ttt_mode"] == "score_first":
        adapter = script.Adapter(script.training_nats, model, val, run)
        learn = adapter.learn

        def watched(first: int, end: int, *rest) -> int:
            legal.append(end <= scored[-1])
            return learn(first, end, *rest)

        adapter.learn = watched
    script.score_windows = recorded
    try:
        given = ("compliance", script.training_nats, model, val, run, stride)
        if hasattr(script, "Learner"):
            script.evaluate(*given, learner=adapter)
        else:  # scripts of entries from before there were learners
            script.evaluate(*given, "cover", adapter)
    finally:
        script.score_windows = score_windows
    if adapter is not None:
        return bool(legal) and all(legal)
    return all(map(torch.equal, before, model.parameters()))


# =================================================================================================
# What is asked of a script
# All names of a train_gpt.py that are used here: read_artifact, Config.from_env, Run and
# rebuild_model; for single conditions Batch, windows, and evaluate with score_windows, Validation,
# training_nats and Adapter, evaluate_documents with DocumentScorer, Mixture with text_of_artifact.
# =================================================================================================


def settings_of(script: Any, settings: dict[str, str]) -> Any:
    """Settings by their environment names as the script's own object; nothing is compiled."""
    return script.Config.from_env(settings | {"COMPILE": "0"})[0]


def flat(config: Any) -> dict[str, Any]:
    """Settings by lower-case name; those of parts stand beside the others."""
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            found |= flat(value)
        else:
            found[field.name] = value
    return found


def chosen_by(script: Any, given: dict[str, str]) -> dict[str, Any]:
    """All settings of the script where these are given."""
    return flat(script.Config.from_env(given)[0])


def scorer_of(script: Any, model: Any) -> Callable:
    """Inputs and targets (B, T) to the nats of each target (B, T), by the model's own forward."""
    if hasattr(script, "Batch"):
        return lambda inputs, targets: model(script.Batch(inputs, targets))[0]
    return lambda inputs, targets: model(inputs, targets)[0]


def attempt(condition: Callable[[], bool]) -> bool | None:
    """Whether a condition holds; None where the script lacks what it is tried with."""
    try:
        return condition()
    except (AttributeError, TypeError) as error:
        print(f"not tried: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def settings_are_legal(header: dict, settings: dict) -> bool:
    """No setting is illegal on every track, and the artifact was made with these settings."""
    illegal = any(settings.get(name) == value for name, value in tracks.ILLEGAL)
    stated = {name.upper(): shown(value) for name, value in settings.items()}
    return not illegal and all(
        stated.get(name) == value for name, value in header["settings"].items()
    )


def suite(script: Any, artifact: Path, settings: dict) -> dict[str, bool | None]:
    """Condition to whether it holds, on the model in `artifact`. settings: of settings.json."""
    header, stored = script.read_artifact(artifact)
    cfg = settings_of(script, header["settings"])
    values = flat(cfg)
    vocab_size, window = values["vocab_size"], values["eval_seq_len"]
    length = min(window, 512)
    run = script.Run(cfg, 0, 1, torch.device("cpu"))

    def fresh() -> Any:
        return script.rebuild_model(cfg, stored, run)

    @torch.no_grad()
    def is_deterministic() -> bool:
        ids = random_ids(vocab_size, 2, length)
        return torch.equal(fresh().hidden(ids), fresh().hidden(ids))

    def scores_all_once() -> bool:
        counts = (1, window, 10 * window + 3)
        stride = values["eval_stride"]
        return all(scores_once(script.windows, window, stride, count) for count in counts)

    def gives_distributions() -> bool:
        model = fresh()
        return is_a_distribution(model, scorer_of(script, model), vocab_size, length)

    def learns_from_what_is_scored() -> bool:
        return scores_before_update(script, header["settings"], fresh()) and (
            additions_score_first(script, header["settings"], fresh, stored)
        )

    return {
        "causality": attempt(lambda: is_causal(fresh(), vocab_size, length)),
        "full_distribution": attempt(gives_distributions),
        "single_pass": attempt(scores_all_once),
        "score_before_update": attempt(learns_from_what_is_scored),
        "determinism": attempt(is_deterministic),
        "legal_settings": settings_are_legal(header, settings),
    }


def main(script_path: str, artifact: str, settings_path: str) -> int:
    """Print what the script says of itself and its artifact, as one line of JSON."""
    script = load_script(Path(script_path))
    settings = json.loads(Path(settings_path).read_text(encoding="utf-8"))
    preset = {"PRESET": settings["preset"]} if settings.get("preset") else {}
    said = {
        "compliance": suite(script, Path(artifact), settings),
        "defaults": chosen_by(script, {}),
        "preset": chosen_by(script, preset),
    }
    print(json.dumps(said, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
