"""The size of an artifact: clips in standard deviations, and the solver that meets a target."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, TinyData
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import environment, events, tiny_job

import train_gpt
from train_gpt import (
    GPT,
    PRESETS,
    Config,
    Run,
    bits_of,
    clip_candidates,
    collect_hessians,
    decode_artifact,
    estimated_bytes,
    fit_artifact,
    initialize,
    largest_integer,
    setting_of,
)

SHAPE = {
    "num_layers": 3,
    "xsa_last_n": 1,
    "ve_layers": "1,2",
    "model_dim": 64,
    "num_heads": 2,
    "num_kv_heads": 1,
    "rope_dims": 8,
    "bigram_vocab_size": 256,
    "bigram_dim": 16,
    "ve_dim": 16,
    "vocab_size": VOCAB_SIZE,
    "train_seq_len": 32,
    "eval_seq_len": 32,
    "train_batch_tokens": 256,
    "eval_stride": 16,
    "int8_keep_float_max_numel": 512,
    "quant_clip": "std",
}
SYSTEMS = ("pr1361", "pr569", "pr703", "pr334", "pr295")
HEADER = {"settings": {}, "tokenizer": "", "validation": ""}


def noisy(model: GPT) -> GPT:
    """The model with weights none of which is zero, rows of different sizes."""
    torch.manual_seed(0)
    initialize(model, model.cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(
                torch.randn(p.shape) * torch.rand(p.shape[:1] + (1,) * (p.ndim - 1)) * 0.2
                if p.ndim
                else 0.1
            )
    return model


def random_model(**changed: object) -> GPT:
    """A noisy model of SHAPE."""
    return noisy(GPT(Config(**{**SHAPE, **changed})))


def run_of(model: GPT, **changed: object) -> Run:
    """A run whose code has no bytes, so that a target is the artifact's own."""
    run = Run(Config(**{**SHAPE, **changed}), 0, 1, torch.device("cpu"))
    run.folder.source = b""
    model.cfg = run.cfg
    return run


def system(preset: str, **settings: str) -> tuple[GPT, Run]:
    """A published system, small, GPTQ on, with noisy weights, and a run whose code has no bytes."""
    kind = PRESETS[preset].get("gptq_variant", "full").replace("off", "full")
    cfg = Config.from_env(
        {
            "PRESET": f"{preset},mini",
            "GPTQ_VARIANT": kind,
            "NUM_LAYERS": "3",
            "XSA_LAST_N": "0",
            "CLIP_SIGMAS": "mlp:12.85,attn:12.85,emb:20,aux:20",
            "VE_LAYERS": "1,2",
            "CACHE_LAYER": "1",
            "BIGRAM_VOCAB_SIZE": "256",
            "VOCAB_SIZE": "128",
            "BITS": re.sub(r",blocks.*", "", Config(**PRESETS[preset]).bits),
            **settings,
        }
    )[0]
    run = Run(cfg, 0, 1, torch.device("cpu"))
    run.folder.source = b""
    return noisy(GPT(cfg)), run


@given(seed=st.integers(0, 2**20), bits=st.integers(2, 8), sigmas=st.floats(1, 60))
@settings(deadline=None, max_examples=40)
def test_a_clip_is_so_many_deviations_of_its_row(seed: int, bits: int, sigmas: float) -> None:
    """Or its maximum, if farther; steps lie on a grid, eight an octave; zeros have the least."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(6, 40)) * 10.0 ** rng.uniform(-2, 1, (6, 1))
    W[0] = 0
    (steps,) = clip_candidates(
        torch.tensor(W, dtype=torch.float32), bits, Config(quant_clip="std"), sigmas
    ).tolist()
    assert steps[0] == 2.0**-14
    for step, row in zip(steps[1:], W[1:], strict=True):
        deviation = math.sqrt(sum(x * x for x in row - sum(row) / 40) / 40)
        wanted = max(sigmas * deviation, *abs(row)) / (2 ** (bits - 1) - 1)
        if min(step, wanted) > 2.0**-14:
            assert abs(math.log2(step / wanted)) <= 1 / 16 + 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_the_matrix_of_the_logits_has_a_hessian_too(tied: bool) -> None:
    model = random_model(tie_embeddings=tied)
    run, name = run_of(model, tie_embeddings=tied), "tok_emb" if tied else "lm_head"
    ids = torch.randint(2, VOCAB_SIZE, (8, 32))
    hessians = collect_hessians(model, lambda n: ids, 1, math.inf, run)
    with torch.no_grad():
        h = model.hidden(ids).flatten(0, 1).double()
    np.testing.assert_allclose(hessians[name], h.T @ h / len(h), rtol=1e-4, atol=1e-5)
    assert ("lm_head" in hessians) == (not tied)
    model.cfg = Config(**{**SHAPE, "quant_clip": "percentile", "tie_embeddings": tied})
    assert hessians.keys() - collect_hessians(model, lambda n: ids, 1, math.inf, run).keys() == {
        name
    }


def test_the_estimate_is_the_entropy_of_nearest_integers() -> None:
    model, total = random_model(), 0.0
    for name, p in model.named_parameters():
        if bits := bits_of(model, name):
            top, W = largest_integer(bits), p.detach()
            sigmas = 1.5 * setting_of(model, name, model.cfg.sigmas_by_role)
            steps = clip_candidates(W, bits, model.cfg, sigmas)[0]
            counts = Counter(
                max(-top, min(top, round(float(x / step))))
                for row, step in zip(W, steps, strict=True)
                for x in row
            )
            total -= sum(n * math.log2(n / W.numel()) for n in counts.values()) / 8
    assert estimated_bytes(model, 1.5) == pytest.approx(total, rel=1e-6)
    sizes = [estimated_bytes(model, factor) for factor in (0.5, 1.0, 2.0, 4.0)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("codec", "share"), [("zstd", 1.1), ("zstd", 0.85), ("zstd", 0.7), ("lzma", 1.0), ("lzma", 0.8)]
)
def test_the_solver_ends_just_below_its_target(codec: str, share: float) -> None:
    model = random_model()
    hessians = collect_hessians(
        model, lambda n: torch.randint(2, VOCAB_SIZE, (8, 32)), 2, math.inf, run_of(model)
    )
    start = len(fit_artifact(model, hessians, b"", HEADER, run_of(model, codec=codec))[1])
    target = int(share * start)
    stored, blob = fit_artifact(
        model, hessians, b"", HEADER, run_of(model, codec=codec, artifact_target_bytes=target)
    )
    assert 0.99 * target <= len(blob) <= target
    read = decode_artifact(blob)[1]
    assert all(torch.equal(read[name].values, s.values) for name, s in stored.items())


@pytest.mark.parametrize("preset", SYSTEMS)
def test_every_system_meets_every_share_of_its_size(preset: str) -> None:
    """With code that takes a third of the whole, as at mini scale, so that models shrink more."""
    model, run = system(preset, QUANT_CLIP="std")
    hessians = collect_hessians(model, lambda n: torch.randint(2, 128, (8, 32)), 1, math.inf, run)
    run.folder.source = bytes(len(fit_artifact(model, hessians, b"", HEADER, run)[1]) // 2)
    whole = 3 * len(run.folder.source)
    for share in (1.0, 0.85, 0.7):
        run.cfg = replace(model.cfg, artifact_target_bytes=int(share * whole))
        total = len(run.folder.source) + len(fit_artifact(model, hessians, b"", HEADER, run)[1])
        assert 0.99 * int(share * whole) <= total <= int(share * whole)


def test_without_a_target_only_the_limit_counts() -> None:
    """What fits is left as CLIP_SIGMAS says; what does not is made coarser, never larger."""
    model = random_model()
    plain = fit_artifact(model, {}, b"", HEADER, run_of(model))[1]
    assert (
        plain
        == fit_artifact(model, {}, b"", HEADER, run_of(model, artifact_limit_bytes=len(plain)))[1]
    )
    limit = int(0.8 * len(plain))
    squeezed = fit_artifact(model, {}, b"", HEADER, run_of(model, artifact_limit_bytes=limit))[1]
    assert 0.9 * limit < len(squeezed) <= limit


ROLES = ("mlp", "attn", "emb", "aux")
KNOBS = st.fixed_dictionaries(
    {
        "quant_clip": st.sampled_from(["std", "std_published"]),
        "bits": st.tuples(*[st.integers(2, 8)] * 4),
        "clip_sigmas": st.tuples(*[st.floats(1, 40)] * 4),
        "lqer_top_k": st.integers(0, 5),
        "lqer_rank": st.integers(1, 5),
        "lqer_group": st.integers(1, 70),
        "awq_columns": st.integers(0, 8),
        "codec": st.sampled_from(["zstd", "lzma", "range"]),
    }
)


@given(knobs=KNOBS, share=st.floats(0.02, 1.2), as_target=st.booleans())
@settings(deadline=None, max_examples=25)
def test_no_knob_lets_the_solver_end_over_what_it_could_meet(
    knobs: dict, share: float, as_target: bool
) -> None:
    """What the coarsest clips can meet is met, the limit or a target; else there is no smaller."""
    by_role = {
        name: ",".join(f"{role}:{x}" for role, x in zip(ROLES, knobs[name], strict=True))
        for name in ("bits", "clip_sigmas")
    }
    shape = {"num_layers": 2, "ve_layers": "1", "model_dim": 32, "int8_keep_float_max_numel": 64}
    changed = {**shape, **knobs, **by_role}
    model = random_model(**changed)
    run = run_of(model, **changed)
    ids = torch.randint(2, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(0))
    hessians = collect_hessians(model, lambda n: ids, 1, math.inf, run)

    def bytes_at(factor: float) -> int:
        stored = train_gpt.quantize(model, hessians, run, factor)
        return len(train_gpt.encode_artifact(HEADER, stored, run.cfg.codec))

    plain, coarsest = bytes_at(1.0), bytes_at(2.0 ** train_gpt.SOLVER_OCTAVES[1])
    limit = int(coarsest + share * (plain - coarsest))
    bound = {"artifact_limit_bytes": limit}
    if as_target:
        bound["artifact_target_bytes"] = limit
    run = run_of(model, **changed, **bound)
    assert len(fit_artifact(model, hessians, b"", HEADER, run)[1]) <= max(limit, coarsest)


def test_what_cannot_be_met_gives_the_smallest_that_was_tried() -> None:
    model = random_model()
    sizes, encode = [], train_gpt.encode_artifact

    def noted(*arguments):
        sizes.append(len(blob := encode(*arguments)))
        return blob

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "encode_artifact", noted)
        blob = fit_artifact(model, {}, b"", HEADER, run_of(model, artifact_limit_bytes=100))[1]
    assert 1 < len(sizes) <= train_gpt.SOLVER_PASSES
    assert len(blob) == min(sizes)


def test_a_run_meets_its_target(tiny_data: TinyData, tmp_path: Path) -> None:
    """Code included, and --eval has nothing to be told."""
    job = tiny_job(tiny_data, tmp_path, "first", QUANT_CLIP="std")
    with environment(**job):
        assert train_gpt.main([]) == 0
    total = events(tmp_path / "first", "artifact")[-1]["total"]
    target = total - 2000
    with environment(**{**job, "RUN_ID": "second", "ARTIFACT_TARGET_BYTES": str(target)}):
        assert train_gpt.main([]) == 0
    (size,) = events(tmp_path / "second", "artifact")
    assert 0.99 * target <= size["total"] <= target
    passes = events(tmp_path / "second", "size_pass")
    assert passes[0]["factor"] == 1.0 and passes[0]["total"] > target
    assert passes[-1]["total"] == size["total"]
    with environment():
        assert train_gpt.main(["--eval", str(tmp_path / "second" / "artifact.bin")]) == 2
    with environment(DATA_PATH=job["DATA_PATH"], TOKENIZER_PATH=job["TOKENIZER_PATH"]):
        assert train_gpt.main(["--eval", str(tmp_path / "second" / "artifact.bin")]) == 0


def foreseen(folder: Path) -> tuple[dict, list[str], int]:
    """A run's one early statement of its size, its warnings of it, and steps done by then."""
    kinds = [
        json.loads(line)["event"]
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    (said,) = events(folder, "size_foreseen")
    warnings = re.findall(
        r"^warning: code and artifact will be over.*$",
        (folder / "log.txt").read_text(encoding="utf-8"),
        re.M,
    )
    return said, warnings, kinds[: kinds.index("size_foreseen")].count("step")


def test_a_run_says_early_that_it_will_be_over(tiny_data: TinyData, tmp_path: Path) -> None:
    """A tenth into it, and only if it is: a target that the coarsest clips meet is no matter."""
    job = tiny_job(tiny_data, tmp_path, "over", QUANT_CLIP="std", ARTIFACT_LIMIT_BYTES="2000")
    with environment(**job):
        assert train_gpt.main([]) == 3
    said, warnings, steps = foreseen(tmp_path / "over")
    assert said["step"] == int(job["ITERATIONS"]) // 10 and steps <= said["step"]
    assert len(warnings) == 1 and "over 2000 bytes" in warnings[0]
    smallest = events(tmp_path / "over", "artifact")[-1]["total"]
    assert 0.8 * smallest < said["coarsest"] <= smallest
    with environment(
        **{
            **job,
            "RUN_ID": "met",
            "ARTIFACT_LIMIT_BYTES": "16000000",
            "ARTIFACT_TARGET_BYTES": str(smallest),
        }
    ):
        assert train_gpt.main([]) == 0
    said, warnings, _ = foreseen(tmp_path / "met")
    assert warnings == [] and said["target"] == smallest


@pytest.mark.parametrize("clip", ["std", "percentile"])
@pytest.mark.parametrize("preset", SYSTEMS)
def test_what_is_foreseen_is_a_little_less_than_what_comes(preset: str, clip: str) -> None:
    model, run = system(preset, QUANT_CLIP=clip)
    facts: dict = {}
    run.folder.log = lambda template, event="", **known: facts.update(
        known if event == "size_foreseen" else {}
    )
    train_gpt.foresee_size(model, 1, run)
    total = len(run.folder.source) + len(fit_artifact(model, {}, b"", HEADER, run)[1])
    assert 0.7 * total < facts["total"] < total
    assert (facts["coarsest"] < facts["total"]) == (clip == "std")
