"""torch.compile: one graph without a break, and no graph that priming has not made."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import VOCAB_SIZE, TinyData
from jobs import environment
from test_composition import TINY as SIZES
from test_composition import as_settings, at_random
from test_model import random_ids

import train_gpt
from train_gpt import (
    COMPILE_GAIN,
    COMPILE_SECONDS,
    GPT,
    PRESETS,
    Batch,
    Block,
    Config,
    Moment,
    Run,
    Training,
    TrainingRows,
    artifact_header,
    compile_blocks,
    document_attention_by_length,
    encode_artifact,
    evaluate,
    initialize,
    load_validation,
    make_forward,
    prime,
    qat_grids,
    quantize,
    score_artifact,
    train,
    training_nats,
)

COUNTERS = torch._dynamo.utils.counters
TINY = {
    **SIZES,
    "num_layers": 5,
    "xsa_last_n": 2,
    "ve_layers": "3,4",
    "cache_layer": 1,
    "bigram_vocab_size": 48,
    "int8_keep_float_max_numel": 300,
    "rope_dims": 4,
    "eval_stride": 4,
    "late_qat_threshold": 0.5,
}
SYSTEMS = {name: {**PRESETS[name], **TINY} for name in ("pr1361", "pr569", "pr703", "pr334")} | {
    "pr295": {
        **PRESETS["pr295"],
        **TINY,
        "bits": "mlp:5,attn:6,emb:fp16,aux:6,blocks.3.attn.c_k:fp16",
    },
    "pr1855": {
        **PRESETS["pr1855"],
        **TINY,
        "loop_start": 1,
        "loop_end": 2,
        "parallel_start_layer": 3,
        "lora_chunk_tokens": 4,
    },
}


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch):
    """Trace as for a GPU, but run the graphs as they are: no compiler for this processor."""
    torch._dynamo.reset()
    COUNTERS.clear()
    compile_for_device = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compile_for_device, backend="eager"))
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return COUNTERS["stats"]["unique_graphs"]


def compiled_run(cfg: Config) -> Run:
    return Run(replace(cfg, compile="1", cpu_bf16="auto"), 0, 1, torch.device("cpu"))


def check_traces(cfg: Config) -> None:
    """The compiled forward gives what the plain one gives, loss and gradients, QAT off and on."""
    torch.manual_seed(0)
    model = GPT(cfg)
    initialize(model, cfg)
    ids, forward = random_ids(cfg, 2, 17), make_forward(compiled_run(cfg))
    gamma = torch.tensor(cfg.mile_gamma) if cfg.mile_gamma else None
    for grids in (None, qat_grids(model) or None):
        found = []
        for function in (forward, training_nats):
            model.zero_grad()
            nats, weights = function(model, Batch(ids[:, :-1], ids[:, 1:]), grids, gamma)
            (nats * weights).mean().backward()
            found.append([nats.detach(), *(p.grad for p in model.parameters())])
        for ours, plain in zip(*found, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert graphs() == 1 + bool(qat_grids(model))


@pytest.mark.parametrize("preset", SYSTEMS)
def test_each_system_is_one_graph(preset: str) -> None:
    check_traces(Config(**SYSTEMS[preset]))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(40))
def test_any_composition_is_one_graph(number: int) -> None:
    check_traces(Config(**{**SIZES, **as_settings(at_random(seed=number))}))


@pytest.mark.parametrize(
    ("preset", "changed"),
    [
        pytest.param("pr703", {}, marks=pytest.mark.slow),
        pytest.param("pr295", {"swa_every": 1}, marks=pytest.mark.slow),
        ("pr1361", {"ttt_mode": "score_first"}),
        (None, {"attn_docs": True, "doc_growth": "0.3:4,0.6:8", "doc_growth_steps": 2}),
        pytest.param(
            "pr1855", {"doc_growth": "0.2:4,0.6:8", "doc_growth_steps": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_nothing_compiles_after_priming(
    preset: str | None, changed: dict, tiny_data: TinyData
) -> None:
    """Through warmdown, QAT start, MiLe, averages, uneven micro-batches, export, all scores.

    Loops begin and documents grow meanwhile.
    """
    cfg = Config(
        **{
            **(SYSTEMS[preset] if preset else TINY),
            "iterations": 12,
            "warmdown_iters": 8,
            "swa_start_frac": 0.8,
            "warmup_steps": 2,
            "train_batch_tokens": 80,
            "micro_batch_seqs": 2,
            "eval_seq_len": 24,
            "eval_stride": 8,
            "ttt_chunk_tokens": 100,
            "data_path": str(tiny_data.data_path),
            "vocab_size": VOCAB_SIZE,
            "tokenizer_path": str(tiny_data.tokenizer_path),
            **changed,
        }
    )
    run, model = compiled_run(cfg), GPT(cfg)
    initialize(model, cfg)
    rows, val, forward = TrainingRows(cfg), load_validation(cfg), make_forward(run)
    prime(forward, model, rows, run)
    primed = graphs()
    assert primed >= 2
    model = train(forward, Training(model, 0.0, [], run), rows, val, run)
    evaluate("float_chunked", forward, model, val, run)
    score_artifact(quantize(model, {}, run), val, forward, run, diagnostics=True)
    assert all(run.ledger.activity.values())
    assert graphs() == primed
    assert not COUNTERS["graph_break"]


def test_more_shapes_than_a_compiler_expects_are_compiled() -> None:
    """Halved micro-batches, QAT, chunks, windows and adaptation have a graph each."""
    cfg = Config(**{**SIZES, "num_layers": 1, "xsa_last_n": 1, "ve_layers": "0", "rope_dims": 4})
    forward, model = make_forward(compiled_run(cfg)), GPT(cfg)
    for rows in range(1, 15):
        ids = random_ids(cfg, rows, 9)
        forward(model, Batch(ids[:, :-1], ids[:, 1:]))
    assert graphs() == 14


@torch.library.custom_op("tests::by_length", mutates_args=())
def by_length(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Stands in for the kernel of a GPU: an operator that takes documents by their boundaries."""
    return document_attention_by_length(q, k, v, ends).contiguous()


by_length.register_fake(lambda q, k, v, ends: torch.empty_like(q))


@pytest.mark.parametrize("on", ["a CPU", "a GPU"])
def test_any_number_of_documents_is_one_graph(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a graph takes their boundaries, and how many there are no priming knows."""
    if on == "a GPU":
        monkeypatch.setattr(train_gpt, "document_attention_by_length", by_length)
        monkeypatch.setattr(train_gpt, "document_extents", lambda documents, ends, in_graph: ends)
    cfg = Config(**SYSTEMS["pr1855"])
    run, model = compiled_run(cfg), GPT(cfg)
    forward, sizes = make_forward(run), set()
    for step in (2, 5, 11):
        ids = torch.full((2, 257), train_gpt.BOS + 1)
        ids[:, ::step] = train_gpt.BOS
        batch = Batch(ids[:, :-1], ids[:, 1:]).by_document(64).moved(run.to_device)
        sizes.add(len(batch.boundaries))
        with torch.no_grad():
            found = [function(model, batch)[0] for function in (forward, training_nats)]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert len(sizes) == 3
    assert graphs() == 1


def test_scoring_an_artifact_again_compiles_before_its_clock(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adaptation divides the budget by what the first windows took: compiling is not in it."""
    cfg = Config(
        **{
            **SYSTEMS["pr1361"],
            "eval_seq_len": 24,
            "eval_stride": 8,
            "eval_batch_seqs": 4,
            "ttt_mode": "score_first",
            "ttt_freeze_blocks": 0,
            "ttt_chunk_tokens": 100,
            "data_path": str(tiny_data.data_path),
            "vocab_size": VOCAB_SIZE,
            "tokenizer_path": str(tiny_data.tokenizer_path),
        }
    )
    val, model, seen = load_validation(cfg), GPT(cfg), []
    initialize(model, cfg)
    stored = quantize(model, {}, compiled_run(cfg))
    (tmp_path / "a.bin").write_bytes(encode_artifact(artifact_header(cfg, val), stored))
    score = train_gpt.score_artifact
    monkeypatch.setattr(
        train_gpt,
        "score_artifact",
        lambda *given, **how: (seen.append(graphs()), score(*given, **how), seen.append(graphs()))[
            1
        ],
    )
    with environment(COMPILE="1", DATA_PATH=cfg.data_path, TOKENIZER_PATH=cfg.tokenizer_path):
        assert train_gpt.main(["--eval", str(tmp_path / "a.bin")]) == 0
    assert seen[0] == seen[1] > 0


# One block, compiled for all layers on a CPU.


def losses_and_gradients(model: GPT, cfg: Config, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of the plain weights, then of QAT's."""
    gamma, found = torch.tensor(cfg.mile_gamma) if cfg.mile_gamma else None, []
    for grids in (None, qat_grids(model) or None):
        model.zero_grad()
        nats, weights = training_nats(model, Batch(ids[:, :-1], ids[:, 1:]), grids, gamma)
        (nats * weights).mean().backward()
        found += [nats.detach(), *(p.grad.clone() for p in model.parameters())]
    return found


def check_one_block(cfg: Config, compiled: Callable, most_graphs: int) -> None:
    """The model that learns through one compiled block learns the same; scoring is not touched."""
    torch.manual_seed(0)
    initialize(model := GPT(cfg), cfg)
    for p in model.parameters():  # no projection at zero
        torch.nn.init.normal_(p, std=0.1)
    ids = random_ids(cfg, 2, 17)
    plain = losses_and_gradients(model, cfg, ids)
    model.compiled_block = compiled
    for ours, expected in zip(losses_and_gradients(model, cfg, ids), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    made = graphs()
    assert 0 < made <= most_graphs
    with torch.no_grad():
        model(Batch(ids[:, :5], ids[:, 1:6]))
    assert graphs() == made


@pytest.mark.parametrize(
    "preset",
    [None, *(s for s in SYSTEMS if s != "pr1855"), pytest.param("pr1855", marks=pytest.mark.slow)],
)
def test_one_compiled_block_serves_eleven_layers(preset: str | None) -> None:
    sizes = {
        **TINY,
        "num_layers": 11,
        "xsa_last_n": 11,
        "ve_layers": "9,10",
        "lora_chunk_tokens": 4,
    }
    check_one_block(
        Config(**{**PRESETS.get(preset, {}), **sizes}),
        torch.compile(Block.forward, dynamic=False),
        8,
    )


@pytest.mark.slow
def test_one_block_compiled_for_this_processor() -> None:
    """By torch's own compiler: its C++ does what the plain block does."""
    compiled = torch.compile.func(Block.forward, dynamic=False)
    check_one_block(Config(**{**TINY, "num_layers": 5}), compiled, 8)


def slowly(block: Block, x: torch.Tensor, *given) -> torch.Tensor:
    time.sleep(0.02)
    return block(x, *given)


def failing(block: Block, x: torch.Tensor, *given) -> torch.Tensor:
    raise RuntimeError("no C++ compiler\nat all")


EARNED = 1.01 * COMPILE_SECONDS / COMPILE_GAIN


@pytest.mark.parametrize(
    ("compiled", "changed", "tried", "kept"),
    [
        (lambda block, x, *given: x, {"max_wallclock_seconds": EARNED}, True, True),
        (slowly, {"max_wallclock_seconds": EARNED}, True, False),
        (failing, {"max_wallclock_seconds": EARNED}, True, False),
        (failing, {"max_wallclock_seconds": EARNED / 1.05}, False, False),
        (failing, {"max_wallclock_seconds": 0.0}, False, False),
        (failing, {"max_wallclock_seconds": EARNED, "compile": "0"}, False, False),
    ],
    ids=["faster", "slower", "no compiler", "short run", "step-driven", "switched off"],
)
def test_blocks_are_compiled_where_it_pays(
    compiled: Callable,
    changed: dict,
    tried: bool,
    kept: bool,
    tiny_data: TinyData,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: asked.append(f) or compiled)
    cfg = Config(
        **{
            **TINY,
            "train_batch_tokens": 80,
            "micro_batch_seqs": 2,
            "vocab_size": VOCAB_SIZE,
            "data_path": str(tiny_data.data_path),
            "tokenizer_path": str(tiny_data.tokenizer_path),
            **changed,
        }
    )
    initialize(model := GPT(cfg), cfg)
    moments = [Moment(1.0, 0.9, qat, False, cfg.mile_gamma) for qat in (False, True)]
    compile_blocks(
        training_nats, model, TrainingRows(cfg), moments, Run(cfg, 0, 1, torch.device("cpu"))
    )
    assert asked == [Block.forward] * tried
    assert (model.compiled_block is compiled) == kept
    assert all(p.grad is None for p in model.parameters())
    said = capsys.readouterr().out
    assert ("blocks compiled:yes" in said) == kept
    assert ("blocks compiled:no" in said) == (
        not kept and "compile" not in changed and changed["max_wallclock_seconds"] > 0
    )
    assert ("no C++ compiler" in said) == (compiled is failing and tried)
