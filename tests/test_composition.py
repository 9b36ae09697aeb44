"""Every choice together with every other, as whole tiny runs: a pairwise cover of the settings.

What is tried is read from the parts: all choices of a text, both values of a switch, what a
setting says itself (`tries`), and of a number that may be 0 that and its value at tiny size. So a
new setting is composed with all others without being listed here.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, TinyData
from jobs import environment, events
from test_model import random_ids

import train_gpt
from train_gpt import (
    SETTINGS,
    Batch,
    Config,
    Refusal,
    Run,
    knob_of,
    read_artifact,
    rebuild_model,
    settings_within,
    show_setting,
)

# A model, a batch and clocks at which a run takes a fraction of a second.
TINY = {
    "num_layers": 3,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_dims": 4,
    "rope_ntk_ref": 8,
    "xsa_last_n": 2,
    "bigram_vocab_size": 48,
    "bigram_dim": 12,
    "ve_dim": 8,
    "ve_layers": "1,0",
    "cache_layer": 1,
    "loop_start": 1,
    "loop_end": 2,
    "vocab_size": VOCAB_SIZE,
    "train_seq_len": 16,
    "train_batch_tokens": 64,
    "iterations": 4,
    "warmup_steps": 1,
    "max_wallclock_seconds": 0.0,
    "warmdown_iters": 2,
    "muon_momentum_warmup_steps": 2,
    "swa_every": 1,
    "eval_seq_len": 16,
    "eval_stride": 8,
    "eval_batch_seqs": 8,
    "gptq_block_size": 8,
    "gptq_calib_batches": 1,
    "int8_keep_float_max_numel": 300,
    "ttt_epochs": 1,
    "ttt_chunk_tokens": 64,
    "ttt_batch_seqs": 2,
    "ttt_freeze_blocks": 1,
    "lora_chunk_tokens": 4,
    "lora_short_chunks": "8:2",
}
# Values of sizes and texts that mean something at this size only.
TRIES: dict[str, tuple] = {
    "num_layers": (3, 4, 5),
    "xsa_last_n": (2, 1, 0),
    "ve_layers": ("1,0", "2"),
    "micro_batch_seqs": (0, 3),
    "bits": (
        "mlp:6,attn:6,emb:8,aux:8",
        "mlp:5,attn:6,emb:fp16,aux:6,blocks.1.attn.c_k:fp16",
        "mlp:fp16,attn:4,emb:7,aux:fp16",
    ),
    "artifact_target_bytes": (0, 240_000),
    "mile_gamma": (0.0, 1.1),
    "prune_frac": (0.0, 0.3),
    "prune_pct": (0.0, 0.2),
    "warmdown_frac": (0.0, 0.5),
}


def tried_values(name: str) -> tuple:
    """What is composed of a setting; one value if nothing is."""
    setting, knob = SETTINGS[name], knob_of(SETTINGS[name])
    usual = TINY.get(name, setting.default)
    if knob.reach == "run":
        return (usual,)
    if isinstance(setting.default, bool):
        return (False, True)
    values = [usual, *knob.tries, *TRIES.get(name, ())]
    if isinstance(setting.default, str):
        values += knob.accepts
    elif knob.accepts[0] == 0 and name not in ("max_wallclock_seconds", "seed"):
        values.append(type(setting.default)(0))  # often, that it is off
    return tuple(dict.fromkeys(values))


VALUES = {name: values for name in SETTINGS if len(values := tried_values(name)) > 1}
# Number every value of every setting, so that sets of pairs are arrays.
NUMBERED = [(name, value) for name, values in VALUES.items() for value in values]
NUMBERS = {
    name: [number for number, (owner, _) in enumerate(NUMBERED) if owner == name] for name in VALUES
}


def as_settings(numbers: Iterable[int]) -> dict:
    """The settings of a combination, those of the tiny size among them."""
    return {**TINY, **dict(NUMBERED[number] for number in numbers)}


def is_accepted(numbers: Iterable[int]) -> bool:
    """Whether the settings do not contradict each other; those not in the combination are usual."""
    try:
        Config(**as_settings(numbers))
    except Refusal:
        return False
    return True


def missing_pairs() -> np.ndarray:
    """Whether two values still wait to be in one combination: (values, values)."""
    owner = np.array([list(VALUES).index(name) for name, _ in NUMBERED])
    return owner[:, None] != owner[None, :]


def grown(pair: tuple[int, ...], missing: np.ndarray, rng: random.Random) -> list[int]:
    """A combination with a pair and as many missing ones beside it as a greedy choice finds."""
    combination = list(pair)
    names = [name for name in VALUES if name not in {NUMBERED[number][0] for number in pair}]
    rng.shuffle(names)
    for name in names:
        gains = missing[:, combination].sum(1) + np.array([rng.random() for _ in NUMBERED])
        best_first = sorted(NUMBERS[name], key=lambda number: -gains[number])
        accepted = (number for number in best_first if is_accepted([*combination, number]))
        combination.append(next(accepted, best_first[0]))
    return combination


@functools.cache
def pairwise_cover(seed: int = 0) -> tuple[list[list[int]], set[tuple[int, int]]]:
    """Combinations that hold every two values that go together, and the pairs that do not."""
    rng, missing = random.Random(seed), missing_pairs()
    cover, contradictions = [], set()
    while missing.any():
        first, second = map(int, np.argwhere(missing)[0])
        combination = grown((first, second), missing, rng)
        if is_accepted(combination):
            missing[np.ix_(combination, combination)] = False
            cover.append(combination)
        else:
            missing[first, second] = missing[second, first] = False
            contradictions.add((first, second))
    return cover, contradictions


def at_random(seed: int) -> list[int]:
    """A combination drawn at random among those that are accepted."""
    rng = random.Random(seed)
    while not is_accepted(drawn := [rng.choice(NUMBERS[name]) for name in VALUES]):
        pass
    return drawn


COVER, CONTRADICTIONS = pairwise_cover()


def test_the_cover_holds_every_pair() -> None:
    missing = missing_pairs()
    for combination in COVER:
        assert {NUMBERED[number][0] for number in combination} == VALUES.keys()
        missing[np.ix_(combination, combination)] = False
    left = {(int(a), int(b)) for a, b in np.argwhere(missing) if a < b}
    assert left == CONTRADICTIONS
    assert not any(is_accepted(pair) for pair in CONTRADICTIONS)
    assert len(COVER) < 100


def test_every_choice_and_every_switch_is_composed() -> None:
    """Nothing that decides what comes out is left out, and no value contradicts all others."""
    composed = {NUMBERED[number] for combination in COVER for number in combination}
    for name, setting in SETTINGS.items():
        if knob_of(setting).reach == "run":
            continue
        if isinstance(setting.default, bool):
            assert {(name, False), (name, True)} <= composed
        if isinstance(setting.default, str) and knob_of(setting).accepts:
            assert {(name, choice) for choice in knob_of(setting).accepts} <= composed
        assert {(name, value) for value in knob_of(setting).tries} <= composed


def adapts_in_bounds(given: dict[str, str]) -> bool:
    """Whether no step of SGD is longer than its rate times TTT_GRAD_CLIP, or there are none.

    A row of the table that is rounded to zero has a gradient of 1 / sqrt(eps) to the power of the
    norms that it passes, some 1e11 here. Without a bound the weights are lost by the first step.
    """
    return given["TTT_MODE"] != "score_first" or float(given["TTT_GRAD_CLIP"]) > 0


def check(numbers: list[int], data: TinyData, folder: Path) -> None:
    """Train, export and score; score the artifact again; look at what the model reads."""
    given = {
        name.upper(): value if isinstance(value, str) else show_setting(value)
        for name, value in as_settings(numbers).items()
    }
    given |= {**data.env, "RUNS_DIR": str(folder), "RUN_ID": "run", "COMPILE": "0"}
    torch.manual_seed(0)
    with environment(**given):
        assert train_gpt.main([]) == 0, given
    scores = [event for event in events(folder / "run", "eval") if event["legal"]]
    final = scores.pop()
    assert scores and all(0 < score["val_bpb"] < 8 for score in scores)
    assert 0 < final["val_bpb"] < (8 if adapts_in_bounds(given) else math.inf)
    header, stored = read_artifact(folder / "run" / "artifact.bin")
    cfg, _ = settings_within(header, {})
    run = Run(cfg, 0, 1, torch.device("cpu"))
    model = rebuild_model(cfg, stored, run)
    with torch.no_grad():  # nothing hides behind its initial value
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ids = random_ids(cfg, 3, 17)
    gamma = float(given["MILE_GAMMA"])
    batch = Batch(ids[:, :-1], ids[:, 1:])
    nats, weights = model(batch, torch.tensor(gamma) if gamma else None)
    (nats * weights).mean().backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.numel() and (parameter.grad is None or not parameter.grad.any())
    ]
    assert not silent
    with torch.no_grad():
        changed = ids.clone()
        changed[:, 12:] = (changed[:, 12:] + 5) % VOCAB_SIZE
        before, after = (model.logits(model.hidden(x)) for x in (ids, changed))
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])
    assert math.isfinite(nats.sum().item())


@pytest.mark.parametrize("number", range(len(COVER)))
def test_choices_compose_in_pairs(number: int, few_data: TinyData, tmp_path: Path) -> None:
    check(COVER[number], few_data, tmp_path)


@pytest.mark.parametrize(
    "number",
    [
        *range(10),
        *(pytest.param(n, marks=pytest.mark.slow) for n in range(10, 300)),
    ],
)
def test_choices_compose_at_random(number: int, few_data: TinyData, tmp_path: Path) -> None:
    check(at_random(seed=number), few_data, tmp_path)
