"""The seven presets against the published table, and the generated page against the presets."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields

import pytest
import torch
from conftest import ROOT

from train_gpt import ALIASES, GPT, PRESETS, Config, parse_setting

SYSTEMS = ("pr1361", "pr569", "pr703", "pr334", "pr295", "pr1855", "pr2135")
# The settings among the lines of the published table, one column a system.
TABLE = {
    "num_layers": (11, 11, 11, 11, 10, 11, 11),
    "model_dim": (512,) * 7,
    "num_heads": (8,) * 7,
    "num_kv_heads": (4,) * 7,
    "mlp_mult": (3.0,) * 5 + (4.0, 4.0),
    "mlp_act": ("leaky2", "leaky2", "leaky2", "relu2", "relu2", "leaky2", "leaky2"),
    "vocab_size": (1024,) * 5 + (8192, 8192),
    "tie_embeddings": (True,) * 7,
    "logit_softcap": (30.0,) * 7,
    "qk_gain_init": (1.5,) * 5 + (5.0, 5.0),
    "rope_dims": (16, 16, 16, 16, 64, 16, 16),
    "rope_base": (1e4, 1e4, 1e4, 5e4, 1e4, 10000.0, 10000.0),
    "rope_ntk_ref": (1024, 1024, 1024, 0, 2048, 0, 0),
    "xsa_last_n": (11, 11, 4, 0, 0, 11, 11),
    "ln_scale": ("1", "1", "1", "1", "0", "1", "1"),
    "smear_enabled": (True,) * 7,
    "smear_bos_mask": (False,) * 5 + (True, False),
    "bigram_bos_mask": (False,) * 5 + (True, True),
    "bigram_vocab_size": (3072, 2048, 1536, 2048, 10240, 0, 0),
    "bigram_dim": (112, 128, 128, 64, 128, 112, 112),
    "bigram_hash": ("xor", "xor", "xor", "sum", "xor", "xor", "xor"),
    "bigram_init": ("zero_embed",) * 4 + ("zero_proj",) + ("zero_embed", "zero_embed"),
    "ve_enabled": (True,) * 3 + (False,) * 2 + (False, False),
    "vrl_mode": ("off", "add", "off", "off", "off", "off", "off"),
    "resid_mix_init": (
        "identity",
        "phase",
        "identity",
        "identity",
        "phase",
        "identity",
        "identity",
    ),
    "backout_mode": ("none", "none", "cache", "none", "mid", "none", "none"),
    "tied_embed_init_std": (0.005,) * 7,
    "emb_svd_init": (False,) * 4 + (True,) + (False, False),
    "proj_init": ("zero",) * 7,
    "skip_per_dim": ("1",) * 7,
    "train_seq_len": (2048, 2048, 2048, 1024, 2048, 2048, 2048),
    "eval_seq_len": (2048, 2048, 2048, 1024, 2048, 2048, 2560),
    "train_batch_tokens": (786432, 786432, 786432, 524288, 786432, 786432, 786432),
    "loader": ("sequential",) * 7,
    "matrix_lr": (0.025, 0.025, 0.026, 0.04, 0.02, 0.026, 0.028),
    "muon_momentum": (0.99, 0.99, 0.99, 0.95, 0.99, 0.97, 0.97),
    "muon_momentum_warmup_start": (0.92, 0.92, 0.92, 0.85, 0.92, 0.92, 0.92),
    "muon_momentum_warmup_steps": (1500, 1500, 1500, 500, 1500, 1500, 1500),
    "muon_backend_steps": (5,) * 7,
    "muon_wd": (0.04,) * 5 + (0.095, 0.095),
    "muon_wd_order": ("before",) * 3 + ("after", "before") + ("before", "before"),
    "muon_quant_momentum": (False, False, True, False, False, False, False),
    "tied_embed_lr": (0.035, 0.035, 0.0364, 0.05, 0.03, 0.03, 0.03),
    "scalar_lr": (0.025, 0.025, 0.026, 0.04, 0.02, 0.02, 0.02),
    "lr_mult": (1.0,) * 7,
    "adam_wd": (0.04, 0.04, 0.04, 0.0, 0.01, 0.02, 0.02),
    "grad_clip_norm": (0.3, 0.3, 0.3, 0.0, 0.3, 0.3, 0.3),
    "clip_before_reduce": (False, False, True, False, False, True, True),
    "warmdown_iters": (3200, 3500, 3500, 3000, 3000, 3500, 3500),
    "warmdown_type": ("linear",) * 7,
    "warmup_steps": (20,) * 7,
    "mile_gamma": (0.0, 0.0, 1.1, 0.0, 0.0, 0.0, 0.0),
    "avg_mode": ("ema", "ema", "ema", "swa", "swa", "ema", "ema"),
    "qat_mode": ("late", "late", "late", "off", "always", "off", "off"),
    "qat_clip": ("absmax", "quantile", "absmax", "absmax", "absmax", "absmax", "absmax"),
    "gptq_variant": ("simple", "full", "full", "off", "off", "full", "full"),
    "prune_pct": (0.0, 0.02, 0.0, 0.0, 0.0, 0.0, 0.0),
    "prune_frac": (0.0, 0.0, 0.0, 0.0, 0.08, 0.0, 0.0),
    "q_scale_floor": ("inv_clip",) * 3 + ("tiny",) * 2 + ("inv_clip", "inv_clip"),
    "bits": (
        "mlp:6,attn:6,emb:8,aux:8",
        "mlp:6,attn:6,emb:8,aux:6",
        "mlp:6,attn:6,emb:8,aux:8",
        "mlp:5,attn:5,emb:8,aux:8",
        "mlp:5,attn:6,emb:fp16,aux:6,blocks.8.attn.c_k:fp16,blocks.9.attn.c_k:fp16",
        "mlp:6,attn:6,emb:7,aux:8",
        "mlp:6,attn:6,emb:7,aux:8",
    ),
    "codec": ("zstd", "zstd", "lzma", "zstd", "zstd", "range", "range"),
    "eval_stride": (32, 64, 64, 64, 64, 0, 0),
    "sliding": ("published_s1", "cover", "published_s1", "published_s3", "cover", "cover", "cover"),
    "ttt_mode": ("off", "off", "off", "train_then_score", "off", "lora", "lora"),
    "iterations": (20000,) * 7,
    "max_wallclock_seconds": (600.0,) * 7,
    "eval_truncate": (True,) * 7,
    "compile": ("auto", "auto", "auto", "0", "auto", "auto", "auto"),
    "attention": ("sdpa", "auto", "auto", "sdpa", "sdpa", "auto", "auto"),
    "gptq_calib": ("train",) * 7,
}
# Of #1855 and #2135 alone, and alike.
OF_BOTH = {
    "attn_docs": True,
    "attn_gate": "sparse",
    "attn_gate_scale": 0.5,
    "beta2": 0.99,
    "clip_sigmas": "mlp:11.5,attn:13,emb:14,aux:13",
    "embed_wd": 0.085,
    "lqer_top_k": 3,
    "lqer_rank": 4,
    "min_lr": 0.1,
    "muon_ns": "polar",
    "muon_row_norm": True,
    "num_loops": 2,
    "loop_start": 3,
    "loop_end": 5,
    "enable_looping_at": 0.35,
    "gate_window": 12,
    "parallel_start_layer": 8,
    "quant_clip": "std_published",
    "skip_gates": True,
    "smear_form": "input",
    "warmdown_frac": 0.85,
    "lora_rank": 80,
    "lora_alpha": 144.0,
    "lora_beta2": 0.99,
    "lora_chunk_tokens": 48,
    "lora_batch_docs": 64,
    "lora_phase_docs": 2500,
    "lora_phase_lr": 0.001,
    "lora_phase_chunk_tokens": 32768,
}
# Lines that say something of some systems only.
OF_SOME = {
    **{name: dict.fromkeys(("pr1855", "pr2135"), value) for name, value in OF_BOTH.items()},
    "leaky_slope": {"pr1361": 0.5, "pr569": 0.5, "pr703": 0.5},
    "ve_dim": {"pr1361": 128, "pr569": 128, "pr703": 128},
    "ve_layers": {"pr1361": "9,10", "pr569": "9,10", "pr703": "9,10"},
    "cache_layer": {"pr703": 7},
    "backout_init": {"pr703": 0.1, "pr295": 0.2},
    "late_qat_threshold": {"pr1361": 0.15, "pr569": 0.15, "pr703": 0.15},
    "qat_targets": {"pr1361": "linears", "pr569": "linears", "pr703": "aux", "pr295": "blocks"},
    "ema_decay": {
        "pr1361": 0.997,
        "pr569": 0.997,
        "pr703": 0.997,
        "pr1855": 0.9965,
        "pr2135": 0.9965,
    },
    "swa_start_frac": {"pr334": 0.4, "pr295": 0.4},
    "swa_every": {"pr334": 1, "pr295": 50},
    "gptq_calib_batches": {"pr1361": 64, "pr569": 256, "pr703": 256, "pr1855": 16, "pr2135": 32},
    "gptq_actorder": {"pr1361": False, "pr569": True, "pr703": True},
    "clip_search": {
        "pr1361": "matrix",
        "pr569": "matrix",
        "pr703": "matrix",
        "pr334": "absmax",
        "pr295": "absmax",
    },
    "mile_clamp_min": {"pr703": 0.1},
    "ttt_epochs": {"pr334": 3},
    "ttt_lr": {"pr334": 0.002},
    "ttt_momentum": {"pr334": 0.9},
    "ttt_freeze_blocks": {"pr334": 2},
    "ttt_batch_seqs": {"pr334": 1},
    "ttt_grad_clip": {"pr334": 0.0},
    "embed_lr": {"pr703": 0.624},
    "head_lr": {"pr703": 0.00832},
    "optimizer_routing": {"pr1361": "standard", "pr703": "banks", "pr334": "by_ndim"},
    "data_path": dict.fromkeys(
        ("pr1855", "pr2135"),
        "./data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
    ),
    "tokenizer_path": dict.fromkeys(
        ("pr1855", "pr2135"),
        "./data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model",
    ),
    "gate_storage": {"pr1855": "int8", "pr2135": "fp16"},
    "lora_phase_row_tokens": {"pr1855": 4096},
    "lora_phases": {"pr1855": 3, "pr2135": 1},
    "lqer_group": {"pr1855": 64, "pr2135": 32},
    "lora_places": {"pr1855": "q,k,v,o,mlp,head", "pr2135": "q,v,o,mlp,head"},
    "lora_lr": {"pr1855": 0.0001, "pr2135": 8e-05},
    "lora_decay": {"pr1855": 0.5, "pr2135": 2.0},
    "ngram_tilt": {"pr1855": 0.0, "pr2135": 2.625},
    "ngram_order": {"pr2135": 16},
    "ngram_threshold": {"pr2135": 0.8},
}


def systems_page():
    """The generator, as a module."""
    spec = importlib.util.spec_from_file_location("systems", ROOT / "records" / "systems.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_preset_has_the_values_of_its_published_column(system: str) -> None:
    cfg, notes = Config.from_env({"PRESET": system})
    assert notes == []
    for name, column in TABLE.items():
        assert getattr(cfg, name) == column[SYSTEMS.index(system)], name
    for name, of in OF_SOME.items():
        assert system not in of or getattr(cfg, name) == of[system], name


def test_nothing_is_preset_that_was_not_published() -> None:
    assert tuple(name for name in PRESETS if name.startswith("pr")) == SYSTEMS
    for system in SYSTEMS:
        assert set(PRESETS[system]) <= {*TABLE, *OF_SOME}


def test_the_page_is_what_the_presets_give() -> None:
    module = systems_page()
    assert module.SYSTEMS == SYSTEMS
    assert (ROOT / "records" / "SYSTEMS.md").read_text(encoding="utf-8") == module.page()
    assert module.main(["--check"]) == 0


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_page_names_every_setting_of_a_preset_with_its_value(system: str) -> None:
    text = (ROOT / "records" / "SYSTEMS.md").read_text(encoding="utf-8")
    section = text.split(f"## {system}\n")[1].split("\n## ")[0]
    cfg = Config.from_env({"PRESET": system})[0]
    named = dict(re.findall(r"`([A-Z][A-Z0-9_]+)=([^`]*)`", section))
    known = {f.name.upper(): f for f in fields(Config)}
    assert {name.upper() for name in PRESETS[system]} <= named.keys()
    for name, value in named.items():
        assert parse_setting(name, value, known[name]) == getattr(cfg, name.lower()), name
    assert {row.count(" | ") for row in section.splitlines() if row.startswith("| ")} == {3}
    with torch.device("meta"):
        assert f"{sum(p.numel() for p in GPT(cfg).parameters()):,} parameters" in section


def test_the_switches_of_the_page_are_settings_or_aliases() -> None:
    text = (ROOT / "records" / "SYSTEMS.md").read_text(encoding="utf-8")
    outside = re.sub(r"`[^`]*`", "", text)
    mentioned = set(re.findall(r"\b([A-Z][A-Z0-9]+_[A-Z0-9_]+)=", outside))
    assert mentioned <= {f.name.upper() for f in fields(Config)} | set(ALIASES)
