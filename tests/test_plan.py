"""--plan: what it counts against counts by hand, what it predicts against what was written."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from jobs import BARE_ENVIRONMENT, TRAINER, environment, launch

import plan
from train_gpt import GPT, Config

SYSTEMS = ("pr1361", "pr569", "pr703", "pr334", "pr295")

spec = importlib.util.spec_from_file_location("fit_plan", ROOT / "benchmarks" / "fit_plan.py")
fit_plan = importlib.util.module_from_spec(spec)
sys.modules["fit_plan"] = fit_plan
spec.loader.exec_module(fit_plan)


def settings(**env: str) -> Config:
    """The settings that an environment gives."""
    return Config.from_env(env)[0]


TRACED_ONCE = functools.cache(plan.traced_step)


@pytest.fixture(autouse=True)
def _trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace equal settings once for all tests."""
    monkeypatch.setattr(plan, "traced_step", TRACED_ONCE)


def traced(**env: str) -> dict[str, float]:
    """What a token of a step costs."""
    return plan.traced_step(settings(**env))[1]


def said(world_size: int = 8, **env: str) -> str:
    """What --plan says to so many processes."""
    with environment(WORLD_SIZE=str(world_size)):
        return "\n".join(plan.lines(settings(**env), 150_000))


SMALL = {
    "NUM_LAYERS": "3",
    "MODEL_DIM": "64",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "VOCAB_SIZE": "320",
    "TRAIN_SEQ_LEN": "128",
    "TRAIN_BATCH_TOKENS": "4096",
    "XSA_LAST_N": "2",
    "VE_LAYERS": "1",
    "VE_DIM": "24",
    "BIGRAM_DIM": "20",
    "ROPE_DIMS": "8",
    "INT8_KEEP_FLOAT_MAX_NUMEL": "512",
}


# FLOPs and speed


def test_flops_are_those_counted_by_hand() -> None:
    step = traced(**SMALL)
    layers, D, T, V, kv, hidden = 3, 64, 128, 320, 32, 192
    weights = layers * (2 * D * D + 2 * D * kv + 2 * D * hidden) + V * D + 20 * D + 24 * kv
    assert step["products"] == 6 * weights  # a multiplication and an addition, three times
    # Scores and their product with the values: 2 T D each, forward once and backward twice, half
    # of it masked; the counter takes whole squares and has the scores computed once more.
    assert step["attention"] == layers * 3 * 2 * (2 * T * D) / 2
    assert step["counted"] == step["products"] + layers * 7 * (2 * T * D)


def test_flops_and_speed_are_the_published_ones() -> None:
    step = traced(PRESET="pr1361")
    assert step["products"] + step["attention"] == pytest.approx(228e6, rel=0.01)
    text = said(PRESET="pr1361")
    ((milliseconds, steps),) = re.findall(r"([\d.]+) ms a step, ([\d,]+) steps", text)
    assert 84 <= float(milliseconds) <= 87
    assert int(steps.replace(",", "")) == pytest.approx(600e3 / float(milliseconds), rel=1e-3)


def test_a_step_driven_run_takes_its_iterations_and_fewer_gpus_longer() -> None:
    eight = said(MAX_WALLCLOCK_SECONDS="0", ITERATIONS="70", **SMALL)
    two = said(2, MAX_WALLCLOCK_SECONDS="0", ITERATIONS="70", **SMALL)
    assert ", 70 steps," in eight
    assert "speed, stated: 2 H100 at" in two
    assert "16 at once a GPU" in two
    assert "4 at once a GPU" in eight


# Memory


def saved_by_hand(cfg: Config, layers: int, skips: int) -> float:
    """Bytes that the equations need again in backward, of a token, in bf16.

    For each gain the tensor it multiplies, for each matrix its input, for each norm its input,
    for attention queries, keys, values and output, for the activation what goes in; all that as
    often as a layer is executed.
    """
    D, hidden, kv = cfg.model_dim, cfg.mlp_dim, cfg.num_kv_heads * cfg.head_dim
    attention = D + D + D  # the mixed stream, normed; what the matrices read; the block's own input
    attention += D + D + D + kv + kv + kv  # q before its norm, rotated, times its gain; k; v
    attention += D + D  # output of the heads, and of the projection, which has a gain
    attention += D + cfg.num_heads if cfg.attn_gate != "none" else 0  # what a gate scales; the gate
    mlp = D + D + 2 * hidden + D  # stream; normed; before and after the activation; output
    exclusive_layers = layers if cfg.xsa_last_n == cfg.num_layers else cfg.xsa_last_n
    exclusive = exclusive_layers * (kv + D)  # direction; what remains
    stem = 7 * D  # stream, smear, its shift, normed and last streams
    stem += 2 * D if cfg.bigram_vocab_size else 0  # pairs
    gated = skips * 2 * D if cfg.skip_gates else 0  # the stream and the skip, between them a gate
    return 2 * (layers * (attention + mlp) + exclusive + stem + gated)


# Of #1855, by its execution list: layers 3 to 5 run three times, 17 executions of 11 layers in all;
# the second half takes a skip from each of the first, but for the last.
EXECUTIONS = {True: (17, 8), False: (11, 5)}  # looping: layers that are executed, skips


@pytest.mark.parametrize("preset", SYSTEMS)
def test_saved_activations_are_those_of_the_equations(preset: str) -> None:
    cfg = settings(PRESET=preset)
    by_hand = saved_by_hand(cfg, cfg.num_layers, cfg.num_layers // 2)
    assert traced(PRESET=preset)["saved activations"] == pytest.approx(by_hand, rel=0.15)


@pytest.mark.parametrize("looping", EXECUTIONS)
@pytest.mark.parametrize("preset", ["pr1855", "pr2135"])
def test_saved_activations_of_loops_gates_and_lanes(preset: str, looping: bool) -> None:
    cfg = settings(PRESET=preset)
    model, step = plan.traced_step(cfg, looping)
    executed = model.plan if looping else model.plan_before_looping
    by_hand = saved_by_hand(cfg, *EXECUTIONS[looping])
    assert len(executed) == EXECUTIONS[looping][0]
    assert step["saved activations"] == pytest.approx(by_hand, rel=0.05)


@pytest.mark.parametrize("preset", [*SYSTEMS, "pr1855", "pr2135"])
def test_logits_are_kept_twice(preset: str) -> None:
    # c tanh(z / c) needs its tanh again, cross entropy the log-probabilities.
    vocab_size = {"pr1855": 8192, "pr2135": 8192}.get(preset, 1024)
    assert traced(PRESET=preset)["logits"] == 2 * 4 * vocab_size


def memory(plan_said: str) -> dict[str, int]:
    """MiB by what takes them."""
    (line,) = re.findall(r"^memory a GPU, MiB: (.*?), in all", plan_said, re.M)
    return {
        part.rsplit(" ", 1)[0]: int(part.rsplit(" ", 1)[1].replace(",", ""))
        for part in re.split(r", (?=[a-z])", line)
    }


def test_memory_of_weights_and_optimizers() -> None:
    system, packed = memory(said(PRESET="pr1361")), memory(said(PRESET="pr703"))
    parameters = 27_067_484
    gains = 11 * (4 * 512 + 8) + 5 * 512 + 512 + 1 + 1 + 2
    adam = 1024 * 512 + 3072 * 112 + 1024 * 128 + gains
    muon = 35_323_904 / 8  # a rank's part of the stacks, see below
    assert system["parameters"] == system["gradients"] == round(4 * parameters / 2**20)
    assert system["averages"] == system["parameters"]
    assert system["optimizer"] == round((8 * adam + 4 * muon) / 2**20)
    assert packed["optimizer"] < system["optimizer"]  # momentum as bytes
    assert memory(said(PRESET="pr295"))["averages"] == round(4 * 25_517_138 / 2**20)
    assert memory(said(AVG_MODE="none", **SMALL))["averages"] == 0


def test_micro_batches_bound_activations() -> None:
    env = {**SMALL, "TRAIN_BATCH_TOKENS": "8388608"}
    assert "768 at once a GPU" in said(**env)  # 98,304 tokens
    assert "10 at once a GPU" in said(**env, MICRO_BATCH_SEQS="10")


# Traffic


def test_traffic_is_that_of_padded_stacks() -> None:
    # 22 matrices of each shape of queries and outputs, keys and values become 24, 11 of the MLP's
    # become 16, and the two auxiliary projections 8 each, of which all but one rank's part moves.
    padded = 24 * (512 * 512 + 256 * 512) + 16 * 2 * (1536 * 512) + 8 * (512 * 112 + 256 * 128)
    others = 27_067_484 - 22 * (512 * 512 + 256 * 512) - 11 * 2 * 1536 * 512 - 512 * 112 - 256 * 128
    eight, one = said(PRESET="pr1361"), said(1, PRESET="pr1361")
    assert (
        f"{4 * padded * 7 // 8:,} bytes reduce-scattered, {2 * padded * 7 // 8:,} gathered, "
        f"{2 * 4 * others * 7 // 8:,} all-reduced"
    ) in eight
    assert "0 bytes reduce-scattered, 0 gathered, 0 all-reduced" in one
    alone = said(PRESET="pr1361", MUON_PARALLEL="0")  # every rank has all of Muon's matrices
    assert (
        f"0 bytes reduce-scattered, 0 gathered, {2 * 4 * 27_067_484 * 7 // 8:,} all-reduced"
    ) in alone
    assert memory(alone)["optimizer"] == round((8 * others + 4 * (27_067_484 - others)) / 2**20)


# Bytes


@pytest.mark.parametrize("system", ["#1361", "#569", "#295", "#334"])
def test_a_system_that_was_left_out_is_predicted(system: str) -> None:
    constants = fit_plan.without(system)
    for artifact in fit_plan.PUBLISHED:
        if artifact.system == system:
            total = artifact.model_bytes + artifact.code_bytes
            size = fit_plan.predicted(artifact, constants) + artifact.code_bytes
            assert abs(size / total - 1) < 0.05, artifact


def test_artifacts_of_mini_are_predicted() -> None:
    assert {a.settings for a in fit_plan.MINI} >= {f"PRESET={name},mini" for name in SYSTEMS}
    for artifact in fit_plan.MINI:
        total = artifact.model_bytes + artifact.code_bytes
        size = fit_plan.predicted(artifact, plan.FITTED) + artifact.code_bytes
        # Of another script: the record, three times as many steps as the others.
        bound = 0.03 if artifact.code_bytes == fit_plan.CODE_BYTES else plan.FITTED["error"]
        assert abs(size / total - 1) < bound, artifact


def test_constants_are_the_fitted_ones() -> None:
    constants = fit_plan.fitted([*fit_plan.PUBLISHED, *fit_plan.MINI])
    assert all(plan.FITTED[name] == pytest.approx(constants[name], rel=0.02) for name in constants)
    errors = [
        abs(fit_plan.predicted(a, plan.FITTED) / a.model_bytes - 1)
        for a in (*fit_plan.PUBLISHED, *fit_plan.MINI)
    ]
    assert max(errors) < plan.FITTED["error"]


def artifact(plan_said: str) -> list[int]:
    """Predicted bytes, their error, code, limit and what is left."""
    (line,) = re.findall(r"^artifact, predicted: (.*)$", plan_said, re.M)
    return [int(number.replace(",", "")) for number in re.findall(r"-?\d[\d,]*\d", line)]


def test_bytes_left_add_up_and_fewer_bits_are_fewer_bytes() -> None:
    size, error, code, limit, left = artifact(said(**SMALL))
    assert (code, limit) == (150_000, 16_000_000)
    assert abs(limit - code - size - left) <= 1
    assert error == pytest.approx(plan.FITTED["error"] * size, abs=1)
    sizes = []
    for bits in (8, 6, 5, 4, 3, 2):
        cfg = settings(BITS=f"mlp:{bits},attn:{bits},emb:8,aux:8", **SMALL)
        with torch.device("meta"):
            model = GPT(cfg)
        sizes.append(plan.artifact_bytes(model, dict(model.named_parameters())))
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[1] == pytest.approx(size, abs=1)


STD = {"PRESET": "pr1361,mini", "QUANT_CLIP": "std"}


def test_artifacts_with_clips_in_deviations_are_predicted() -> None:
    assert {a.system for a in fit_plan.STD} > {a.system for a in fit_plan.PUBLISHED} - {
        "#414",
        "#1019",
    }
    for artifact in fit_plan.STD:
        size = fit_plan.predicted(artifact, plan.FITTED)
        assert abs(size / artifact.model_bytes - 1) < plan.FITTED["error"], artifact


def test_artifacts_of_the_frontier_are_predicted() -> None:
    for artifact in fit_plan.FRONTIER:
        total = artifact.model_bytes + artifact.code_bytes
        size = fit_plan.predicted(artifact, plan.FITTED) + artifact.code_bytes
        assert abs(size / total - 1) < 0.03, artifact


@pytest.mark.parametrize(
    ("target", "over"),
    [
        ("ARTIFACT_TARGET_BYTES", True),
        ("ARTIFACT_LIMIT_BYTES", True),
        ("ARTIFACT_TARGET_BYTES", False),
        ("ARTIFACT_LIMIT_BYTES", False),
    ],
)
def test_a_target_below_the_coarsest_clips_is_warned_of(target: str, over: bool) -> None:
    """And only such a one: what the finest or the middle clips take is no matter."""
    (least,) = re.findall(r"^no clips leave less than ([\d,]+), of 16,000,000$", said(**STD), re.M)
    bound = int(least.replace(",", ""))
    size = artifact(said(**STD))[0] + 150_000
    assert 150_000 < bound < 0.7 * size
    text = said(**STD, **{target: str(bound - 1 if over else bound + 1)})
    assert ("\nwarning: no clips leave less" in text) == over
    assert "\nwarning" not in said(**{**STD, "QUANT_CLIP": "percentile"})
    assert "\nwarning" in said(**{**STD, "QUANT_CLIP": "percentile"}, **{target: str(bound)})


# The verb


def test_the_plan_of_a_full_size_system_takes_seconds(tmp_path: Path) -> None:
    start = time.perf_counter()
    job = launch("--plan", cwd=tmp_path, PRESET="pr1361")
    assert time.perf_counter() - start < 30
    assert (job.returncode, job.stderr) == (0, "")
    assert "parameters: 27,067,484\n" in job.stdout
    assert f"code {TRAINER.stat().st_size:,}, of 16,000,000" in job.stdout
    assert list(tmp_path.iterdir()) == []


def test_without_its_file_the_plan_is_refused(tmp_path: Path) -> None:
    alone = tmp_path / "train_gpt.py"
    shutil.copy(TRAINER, alone)
    job = subprocess.run(
        [sys.executable, str(alone), "--plan"],
        env=BARE_ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert job.returncode == 2
    assert job.stderr == (
        "error: --plan needs plan.py, which stands beside train_gpt.py in its repository\n"
    )
