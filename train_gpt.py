"""Train a tiny language model under a byte and a time budget, and score its artifact.

    torchrun --standalone --nproc_per_node=8 train_gpt.py    8 GPUs, FineWeb, the defaults
    PRESET=mini python train_gpt.py                          two CPU cores, built-in corpus
    python train_gpt.py --help                               every setting
    python train_gpt.py --check                              look at settings and data, do nothing
    python train_gpt.py --plan                               what a run would do and cost
    python train_gpt.py --eval runs/<id>/artifact.bin        score an artifact again

The number to bring down is val_bpb: bits per byte of the validation text, of the model read
back from the artifact. Code plus artifact must fit in ARTIFACT_LIMIT_BYTES, training and
calibration in MAX_WALLCLOCK_SECONDS, scoring in EVAL_WALLCLOCK_SECONDS. Hyperparameters are
environment variables; a run leaves its log, metrics, settings, source and artifact in
runs/<RUN_ID>/.

Sections, in the order of a run:

  1  Settings                     what can be set, presets, refusals
  2  Run                          ranks, device, clock, log, run folder
  3  Data                         shards, training rows, validation split, bytes per token
  4  Model                        the network, one forward for everything
  5  Optimizers and schedules     Muon, AdamW, routing table, learning rate at a given time
  6  Training                     priming, one step, the loop
  7  Quantization                 int6/int8 grids, Hessians, GPTQ
  8  Artifact                     bytes to model and back
  9  Evaluation                   windows, bits per byte
 10  Main                         the story, and the verbs above

Shapes: B rows, T tokens a row, D model width, H query heads, G key/value heads, K head width,
V vocabulary, N tokens of a stream. Linear weights are (out, in).
"""

import contextlib
import difflib
import glob
import hashlib
import json
import math
import os
import re
import resource
import secrets
import statistics
import struct
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

# =================================================================================================
# Settings
# A run is decided here, before any work: every name, value and contradiction that can be known
# to be wrong is refused in one line. Environment names are the upper-case field names.
# =================================================================================================

EXIT_FAILED, EXIT_REFUSED, EXIT_OVER_LIMIT, EXIT_INTERRUPTED = 1, 2, 3, 130


class Refusal(ValueError):
    """Settings, data or an artifact that a run cannot use; the message is one line."""


def knob(group: str, default, accepts: tuple, doc: str):
    """A setting: its group in --help, default, (low, high) or choices, and one line of meaning."""
    return field(default=default, metadata={"group": group, "accepts": accepts, "doc": doc})


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run, checked; the defaults are the recommended combination."""

    preset: str = knob("Run", "", (), "Named settings, comma-separated, later ones win.")
    run_id: str = knob("Run", "", (), "Folder under RUNS_DIR; empty picks UTC time and a suffix.")
    runs_dir: str = knob("Run", "runs", (), "Where run folders are made.")
    seed: int = knob("Run", 1337, (0, 2**31 - 1), "Seed of weights and data order.")
    attention: str = knob("Run", "auto", ("auto", "fa3", "sdpa"), "Attention kernel.")
    compile: str = knob("Run", "auto", ("auto", "0", "1"), "torch.compile; auto is on with CUDA.")
    train_log_every: int = knob("Run", 0, (0, math.inf),
                                "Steps between log lines; 0 gives about 50 a run.")
    val_loss_every: int = knob("Run", 4000, (0, math.inf),
                               "Steps between validations; 0 only at the end.")

    data_path: str = knob("Data", "./data/datasets/fineweb10B_sp1024", (), "Folder of the shards.")
    tokenizer_path: str = knob("Data", "./data/tokenizers/fineweb_1024_bpe.model", (),
                               "SentencePiece model the shards were made with.")
    loader: str = knob("Data", "shuffled", ("shuffled", "sequential"), "Order of training rows.")

    vocab_size: int = knob("Model", 1024, (4, 65536), "Pieces of the tokenizer.")
    num_layers: int = knob("Model", 11, (1, 64), "Transformer blocks.")
    model_dim: int = knob("Model", 512, (8, 8192), "Width of the residual stream.")
    num_heads: int = knob("Model", 8, (1, 128), "Query heads; divides MODEL_DIM.")
    num_kv_heads: int = knob("Model", 4, (1, 128), "Key/value heads; divides NUM_HEADS.")
    mlp_mult: float = knob("Model", 3.0, (0.25, 16.0), "MLP width over model width.")
    leaky_slope: float = knob("Model", 0.5, (0.0, 1.0), "Negative slope before the MLP's square.")
    tie_embeddings: bool = knob("Model", True, (), "One matrix for token embedding and head.")
    logit_softcap: float = knob("Model", 30.0, (1.0, 1e4), "Bound c of c tanh(logit / c).")
    qk_gain_init: float = knob("Model", 1.5, (0.0, 100.0), "Initial gain of normalised queries.")
    rope_base: float = knob("Model", 10000.0, (2.0, 1e9), "Base of the rotary frequencies.")
    rope_dims: int = knob("Model", 16, (0, 1024), "Rotated dimensions a head; 0 is all.")
    rope_ntk_ref: int = knob("Model", 1024, (0, 1 << 20),
                             "Row length beyond which the base grows (NTK); 0 never.")
    xsa_last_n: int = knob("Model", 11, (0, 64), "Last layers with exclusive self attention (XSA).")
    ln_scale: bool = knob("Model", True, (), "Scale block inputs of layer l by 1/sqrt(l+1).")
    smear_enabled: bool = knob("Model", True, (), "SmearGate: blend in the previous embedding.")
    smear_bos_mask: bool = knob("Model", True, (), "No SmearGate across a document start.")
    bigram_vocab_size: int = knob("Model", 3072, (0, 1 << 20),
                                  "Buckets of BigramHash; 0 turns it off.")
    bigram_dim: int = knob("Model", 112, (1, 8192), "Width of a BigramHash bucket.")
    bigram_bos_mask: bool = knob("Model", True, (), "No BigramHash across a document start.")
    ve_enabled: bool = knob("Model", True, (), "Value embeddings in VE_LAYERS.")
    ve_dim: int = knob("Model", 128, (1, 8192), "Width of the value embedding table.")
    ve_layers: str = knob("Model", "9,10", (), "Layers with value embeddings, counted from 0.")

    tied_embed_init_std: float = knob("Training", 0.005, (0.0, 1.0),
                                      "Initial deviation of the embedding.")
    iterations: int = knob("Training", 20000, (1, 10**8), "Steps at most.")
    max_wallclock_seconds: float = knob("Training", 600.0, (0.0, 1e7),
                                        "Training and calibration; 0 makes the run step-driven.")
    warmup_steps: int = knob("Training", 20, (0, 1000), "Untimed priming steps of a compiled run.")
    train_batch_tokens: int = knob("Training", 786432, (2, 1 << 30),
                                   "Tokens a step, over all ranks.")
    train_seq_len: int = knob("Training", 2048, (2, 1 << 20), "Tokens a training row.")
    micro_batch_seqs: int = knob("Training", 0, (0, 1 << 20),
        "Rows a forward and rank; 0 takes up to 98,304 tokens (8,192 on a CPU).")
    warmdown_iters: int = knob("Training", 3500, (0, 10**8),
                               "Last steps in which the rate decays to 0.")
    warmdown_frac: float = knob("Training", 0.0, (0.0, 1.0),
        "The same as a share of the run; above 0 it replaces WARMDOWN_ITERS.")
    warmdown_type: str = knob("Training", "linear", ("linear", "cosine"), "Shape of the decay.")
    avg_mode: str = knob("Training", "ema", ("ema", "none"), "Weight average that is exported.")
    ema_decay: float = knob("Training", 0.997, (0.0, 0.999999),
                            "Kept share of the average each step.")

    lr_mult: float = knob("Optimizer", 1.0, (0.0, 100.0), "Multiplies every learning rate.")
    matrix_lr: float = knob("Optimizer", 0.025, (0.0, 10.0),
                            "Muon: block matrices and projections.")
    scalar_lr: float = knob("Optimizer", 0.025, (0.0, 10.0), "AdamW: gains, gates, scales.")
    tied_embed_lr: float = knob("Optimizer", 0.035, (0.0, 10.0), "AdamW: embedding tables.")
    embed_lr: float = knob("Optimizer", 0.6, (0.0, 10.0), "AdamW: token embedding, if untied.")
    head_lr: float = knob("Optimizer", 0.008, (0.0, 10.0), "AdamW: output head, if untied.")
    muon_momentum: float = knob("Optimizer", 0.99, (0.0, 0.9999), "Muon's momentum after its ramp.")
    muon_momentum_warmup_start: float = knob("Optimizer", 0.92, (0.0, 0.9999),
                                             "Muon's momentum at step 0.")
    muon_momentum_warmup_steps: int = knob("Optimizer", 1500, (0, 10**8),
                                           "Steps of the momentum ramp.")
    muon_backend_steps: int = knob("Optimizer", 5, (1, 20), "Newton-Schulz iterations.")
    muon_wd: float = knob("Optimizer", 0.04, (0.0, 10.0), "Muon's decoupled weight decay.")
    adam_wd: float = knob("Optimizer", 0.04, (0.0, 10.0), "AdamW's decoupled weight decay.")
    grad_clip_norm: float = knob("Optimizer", 0.3, (0.0, 1e6),
                                 "Largest global gradient norm; 0 is no bound.")

    qat_mode: str = knob("Quantization", "late", ("late", "off"),
                         "Train through the integer grid near the end.")
    late_qat_threshold: float = knob("Quantization", 0.15, (0.0, 1.0),
                                     "Late QAT starts below this rate scale.")
    bits: str = knob("Quantization", "mlp:6,attn:6,emb:8,aux:8", (),
                     "Bits of an integer by role, 2 to 8, or fp16.")
    int8_keep_float_max_numel: int = knob("Quantization", 65536, (0, 1 << 30),
                                          "Tensors up to this many elements are stored as fp16.")
    gptq_calib_batches: int = knob("Quantization", 256, (1, 10**6),
        "Calibration batches of 8 rows of training data, inside the time budget.")
    gptq_block_size: int = knob("Quantization", 128, (1, 1 << 16),
                                "Columns between lazy GPTQ updates.")

    eval_seq_len: int = knob("Evaluation", 2048, (2, 1 << 20), "Tokens a validation window.")
    eval_stride: int = knob("Evaluation", 64, (0, 1 << 20),
                            "Targets between windows; 0 scores chunks only.")
    sliding: str = knob("Evaluation", "cover", ("cover",),
                        "Which windows; cover scores every target once.")
    eval_batch_seqs: int = knob("Evaluation", 32, (1, 1 << 16), "Windows a forward.")
    eval_truncate: bool = knob("Evaluation", False, (), "Drop the targets after the last full row.")
    eval_wallclock_seconds: float = knob("Evaluation", 600.0, (0.0, 1e7),
                                         "Budget of scoring the artifact.")
    artifact_limit_bytes: int = knob("Evaluation", 16_000_000, (1, 1 << 40),
                                     "Code plus artifact, decimal bytes.")

    def __post_init__(self) -> None:
        """Raise Refusal for settings that contradict each other."""
        roles = self.bits_by_role
        for holds, complaint in (
            (self.model_dim % self.num_heads == 0,
             f"MODEL_DIM={self.model_dim} must be a multiple of NUM_HEADS={self.num_heads}"),
            (self.num_heads % self.num_kv_heads == 0,
             f"NUM_HEADS={self.num_heads} must be a multiple of NUM_KV_HEADS={self.num_kv_heads}"),
            (self.rotary_dims % 2 == 0 and self.rotary_dims <= self.head_dim,
             f"ROPE_DIMS={self.rope_dims} must be even and at most the head width {self.head_dim}"),
            (self.rope_ntk_ref == 0 or self.rotary_dims > 2,
             f"ROPE_NTK_REF={self.rope_ntk_ref} needs more than 2 rotated dimensions "
             f"(ROPE_DIMS={self.rope_dims}, head width {self.head_dim}); 0 turns it off"),
            (self.xsa_last_n <= self.num_layers,
             f"XSA_LAST_N={self.xsa_last_n} must be at most NUM_LAYERS={self.num_layers}"),
            (self.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE=1 must be 0 (off) or at least 2"),
            (all(layer < self.num_layers for layer in self.value_layers),
             f"VE_LAYERS={self.ve_layers!r} names a layer beyond NUM_LAYERS={self.num_layers}"),
            (self.train_batch_tokens % self.train_seq_len == 0,
             f"TRAIN_BATCH_TOKENS={self.train_batch_tokens} must be a multiple of "
             f"TRAIN_SEQ_LEN={self.train_seq_len}"),
            (self.eval_stride <= self.eval_seq_len,
             f"EVAL_STRIDE={self.eval_stride} must be at most EVAL_SEQ_LEN={self.eval_seq_len}"),
            (self.eval_batch_seqs * self.eval_seq_len <= MAX_BATCH_TOKENS,
             f"EVAL_BATCH_SEQS={self.eval_batch_seqs} times EVAL_SEQ_LEN={self.eval_seq_len} must "
             f"be at most {MAX_BATCH_TOKENS:,} tokens"),
            (set(roles) == set(ROLES),
             f"BITS={self.bits!r} must give each of {', '.join(ROLES)} once, as mlp:6,attn:6,..."),
            (re.fullmatch(r"[\w.-]{0,100}", self.run_id) and self.run_id not in (".", ".."),
             f"RUN_ID={self.run_id!r} must be up to 100 letters, digits, '_', '-' and '.'"),
        ):
            if not holds:
                raise Refusal(complaint)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def rotary_dims(self) -> int:
        """Rotated dimensions of a head."""
        return self.rope_dims or self.head_dim

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_mult * self.model_dim)

    @property
    def value_layers(self) -> tuple[int, ...]:
        """Layers with value embeddings, in the order of their scales."""
        try:
            layers = tuple(int(layer) for layer in self.ve_layers.split(",") if layer.strip())
        except ValueError:
            raise Refusal(f"VE_LAYERS={self.ve_layers!r}: expected numbers, as 9,10") from None
        if min(layers, default=0) < 0 or len(set(layers)) < len(layers):
            raise Refusal(f"VE_LAYERS={self.ve_layers!r}: expected different numbers from 0")
        return layers if self.ve_enabled else ()

    @property
    def bits_by_role(self) -> dict[str, int]:
        """Bits of each role's integers; 0 stands for fp16."""
        roles = {}
        for part in self.bits.split(","):
            role, _, width = part.strip().partition(":")
            if role in roles or not re.fullmatch(r"[2-8]|fp16", width):
                raise Refusal(f"BITS={self.bits!r}: {part!r} is not role:bits, bits 2 to 8 or fp16")
            roles[role] = 0 if width == "fp16" else int(width)
        return roles

    @property
    def rows_per_step(self) -> int:
        """Training rows of one optimizer step, over all ranks."""
        return self.train_batch_tokens // self.train_seq_len

    @property
    def step_driven(self) -> bool:
        """Whether ITERATIONS alone ends the run and drives the schedules."""
        return self.max_wallclock_seconds == 0

    @classmethod
    def from_env(cls, env: dict[str, str]) -> "tuple[Config, list[str]]":
        """Settings from defaults, then PRESET, then `env`; and notes for the log.

        Raises Refusal for a name close to ours or with a prefix of ours that is no setting, and
        for a value that does not parse, is out of range or contradicts another.
        """
        known = {f.name.upper(): f for f in fields(cls)}
        given, notes = translate_aliases(env, known)
        for name in env:
            if name not in known and name not in ALIASES and name not in RETIRED:
                refuse_near_miss(name, known)
        values = {}
        names = [name.strip() for name in given.get("PRESET", "").split(",") if name.strip()]
        if unknown := [name for name in names if name not in PRESETS]:
            raise Refusal(f"PRESET={unknown[0]!r}: expected one of {', '.join(PRESETS)}")
        if "mini" in names[:-1]:
            raise Refusal(f"PRESET={','.join(names)}: mini scales the system before it, so it "
                          "goes last")
        for name in names:
            values.update(PRESETS[name])
        for name, text in given.items():
            values[known[name].name] = parse_setting(name, text, known[name])
        return cls(**values), notes

    def listing(self) -> Iterator[str]:
        """Lines of --help and of the log's head: settings, * where they differ from defaults."""
        group = None
        for f in fields(self):
            if f.metadata["group"] != group:
                group = f.metadata["group"]
                yield f"{group}:"
            value, (low, *rest) = getattr(self, f.name), f.metadata["accepts"] or ("",)
            accepts = "0 or 1" if isinstance(f.default, bool) else "text" if low == "" else \
                "|".join((low, *rest)) if isinstance(low, str) else f"{low:g} to {rest[0]:g}"
            mark = " " if value == f.default else "*"
            default = "" if value == f.default else f"; default {show_setting(f.default)}"
            yield (f"{mark} {f.name.upper():<27}{show_setting(value):<12} {f.metadata['doc']} "
                   f"[{accepts}{default}]")


ROLES = ("mlp", "attn", "emb", "aux")
MAX_BATCH_TOKENS = 1 << 23  # of one evaluation forward; an artifact's header may ask for any

PRESETS: dict[str, dict] = {
    # openai/parameter-golf pull request 1361. Where its script and its description differ, late
    # QAT acts (its script never ran it); GPTQ is the full form.
    "pr1361": {
        "warmdown_iters": 3200, "loader": "sequential", "smear_bos_mask": False,
        "bigram_bos_mask": False, "gptq_calib_batches": 64, "eval_stride": 32,
        "eval_truncate": True, "train_log_every": 500,
    },
    # A scale, not a system: two CPU cores, the built-in corpus, five minutes. Goes last.
    "mini": {
        "data_path": "./data/datasets/docs_sp1024",
        "tokenizer_path": "./data/tokenizers/docs_1024_bpe.model",
        "loader": "shuffled", "model_dim": 64, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 8,
        "bigram_vocab_size": 1024, "bigram_dim": 32, "ve_dim": 32, "train_seq_len": 256,
        "eval_seq_len": 256, "train_batch_tokens": 2048, "max_wallclock_seconds": 300.0,
        "warmdown_frac": 0.5, "muon_momentum_warmup_steps": 1500, "ema_decay": 0.9,
        "gptq_calib_batches": 32, "int8_keep_float_max_numel": 1024, "lr_mult": 1.0,
    },
}

# Published names of settings we call otherwise: (our name, {published value: ours}), where no
# table of values means that the value carries over as it is.
ALIASES: dict[str, tuple[str, dict[str, str] | None]] = {
    "EMA_ENABLED": ("AVG_MODE", {"0": "none", "1": "ema"}),
    "LATE_QAT": ("QAT_MODE", {"0": "off", "1": "late"}),
    "MUON_NS_STEPS": ("MUON_BACKEND_STEPS", None),
    "NO_COMPILE": ("COMPILE", {"0": "auto", "1": "0"}),
    "NO_FA3": ("ATTENTION", {"0": "auto", "1": "sdpa"}),
    "QAT_THRESHOLD": ("LATE_QAT_THRESHOLD", None),
    "TORCH_COMPILE_DISABLE": ("COMPILE", {"0": "auto", "1": "0"}),
}

# Published names of techniques that are not here: the values at which they are off. None marks
# a name that has no effect on anything here, whatever its value.
RETIRED: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys((
        "BACKOUT_ENABLED", "DTG_ENABLED", "GATED_ATTENTION", "LATE_K_FP16", "LAWA_ENABLED",
        "MILE_GAMMA", "MTP_NUM_HEADS", "MUON_QUANT_MOMENTUM", "PRUNE_FRAC", "PRUNE_PCT",
        "QAT_ENABLED", "SWA_ENABLED", "TARGET_MB", "TTT_ENABLED", "VALUE_RESIDUAL", "VRL",
    ), ("0",)),
    **dict.fromkeys((
        "BACKOUT_INIT", "BACKOUT_LAMBDA_INIT", "GPTQ_CALIB_SAMPLES", "GPTQ_RESERVE_MS", "LAWA_FREQ",
        "LAWA_K", "MILE_CLAMP_MIN", "MTP_LOSS_WEIGHT", "MUON_BETA2", "MUON_QUANT_BLOCK_SIZE",
        "QAT_CLIP_PCT", "SWA_EVERY", "SWA_INTERVAL", "SWA_PCT", "SWA_START_FRAC", "TTT_BATCH_SEQS",
        "TTT_CHUNK_TOKENS", "TTT_EPOCHS", "TTT_FREEZE_BLOCKS", "TTT_GRAD_CLIP", "TTT_LR",
        "TTT_MOMENTUM", "VAL_BATCH_SIZE",
    )),
    **dict.fromkeys(("CONTROL_TENSOR_NAME_PATTERNS", "FP16_KEEP_NAME_PATTERNS",
                     "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS"), ("",)),
    "ADAM_EPS": ("1e-8", "1e-08"), "BETA1": ("0.9",), "BETA2": ("0.95",), "CACHE_LAYER": ("-1",),
    "USE_GPTQ": ("1",),
}

# Names that begin like this are ours: one that is no setting is a mistake, not somebody else's.
OWNED_PREFIXES = ("ADAM_", "BIGRAM_", "EMA_", "GPTQ_", "MUON_", "QAT_", "ROPE_", "SMEAR_", "SWA_",
                  "TTT_", "VE_", "WARMDOWN_", "XSA_")


def translate_aliases(env: dict[str, str], known: dict) -> tuple[dict[str, str], list[str]]:
    """The settings named in `env` under our names, and a note for each translation.

    Raises Refusal where an alias contradicts the setting or a retired technique is asked for.
    """
    given, notes = {name: env[name] for name in known if name in env}, []
    for alias in sorted(set(ALIASES) & set(env)):
        name, values = ALIASES[alias]
        if values is not None and env[alias] not in values:
            raise Refusal(f"{alias}={env[alias]!r}: expected one of {', '.join(values)}; "
                          f"the setting is {name} here")
        value = values[env[alias]] if values else env[alias]
        stated = given.setdefault(name, value)
        if parse_setting(name, stated, known[name]) != parse_setting(name, value, known[name]):
            raise Refusal(f"{alias}={env[alias].strip()} means {name}={value}, but {name}={stated} "
                          "is set too: keep one")
        notes.append(f"{alias}={env[alias]} read as {name}={value}")
    for name in sorted(set(RETIRED) & set(env)):
        off = RETIRED[name]
        if off is not None and env[name] not in off:
            raise Refusal(f"{name}={env[name]!r}: not available here; only {name}={off[0]} is "
                          "accepted")
        notes.append(f"{name}={env[name]} has no effect here")
    return given, notes


def refuse_near_miss(name: str, known: dict) -> None:
    """Raise Refusal if an environment name that is no setting was probably meant to be one."""
    # Short names lie close to words of other programs (SPEED, SEED): they must differ less.
    cutoff = 0.88 if len(name) > 8 else 0.92
    near = difflib.get_close_matches(name, [*known, *ALIASES], n=1, cutoff=cutoff)
    if near or name.startswith(OWNED_PREFIXES):
        near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise Refusal(f"{name} is not a setting; did you mean {near[0]}? (--help lists them)")


def parse_setting(name: str, text: str, f) -> object:
    """The value of setting `name` from its text; raises Refusal naming what was expected."""
    accepts, kind = f.metadata["accepts"], type(f.default)
    try:
        value = {"0": False, "1": True}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = {bool: "0 or 1", int: "a whole number", float: "a number"}[kind]
        raise Refusal(f"{name}={text!r}: expected {expected}") from None
    if kind is str and accepts and value not in accepts:
        raise Refusal(f"{name}={text!r}: expected one of {', '.join(accepts)}")
    if kind in (int, float) and not accepts[0] <= value <= accepts[1]:  # refuses nan as well
        raise Refusal(f"{name}={value}: expected {accepts[0]} <= value <= {accepts[1]}")
    return value


def show_setting(value: object) -> str:
    """A setting's value as one would write it in the environment."""
    return str(int(value)) if isinstance(value, bool) else f"{value}" if value != "" else "''"


# =================================================================================================
# Run
# What a process is and what a run leaves behind. Every decision that ranks must share goes
# through agree(), every sum through add_up(); with one process both do nothing.
# =================================================================================================


class Clock:
    """Seconds that count against a budget: runs only inside `with clock.running()`."""

    def __init__(self) -> None:
        self.banked, self.since = 0.0, None

    def elapsed(self) -> float:
        """Seconds counted so far."""
        return self.banked + (time.perf_counter() - self.since if self.since is not None else 0.0)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the time spent inside."""
        self.since = time.perf_counter()
        try:
            yield
        finally:
            self.banked, self.since = self.elapsed(), None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside, within running()."""
        self.banked, self.since = self.elapsed(), None
        try:
            yield
        finally:
            self.since = time.perf_counter()


class Run:
    """One process of a run: rank, device, clocks, log, and the count of what acted."""

    def __init__(self, cfg: Config, rank: int, world_size: int, device: torch.device) -> None:
        self.cfg, self.rank, self.world_size, self.device = cfg, rank, world_size, device
        self.is_main = rank == 0
        self.folder: Path | None = None
        self.training_clock, self.scoring_clock = Clock(), Clock()
        self.trained_seconds = 0.0  # of the training clock, before calibration
        self.calibration_tokens = 0
        self.phase = "starting"
        self.activity: Counter[str] = Counter()
        self.ineligible: list[str] = []
        self.source = Path(__file__).read_bytes()  # once: the file may be edited while it runs
        self.last_logged_share = -1
        # Decisions are exchanged through host memory, so that they never wait for a GPU queue.
        self.control = dist.new_group(backend="gloo") if device.type == "cuda" and world_size > 1 \
            else None

    @classmethod
    @contextlib.contextmanager
    def start(cls, cfg: Config) -> "Iterator[Run]":
        """Open the process group that torchrun's environment describes, if any; close it after."""
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        elif torch.backends.mps.is_available() and world_size == 1:
            device = torch.device("mps")
        if world_size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        run = cls(cfg, rank, world_size, device)
        try:
            yield run
        except Refusal:
            raise
        except Exception as error:
            run.log_failure(error)
            raise SystemExit(EXIT_FAILED) from None
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def dtype(self) -> torch.dtype:
        """Type of activations: bf16 only where the hardware multiplies it natively."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def compiled(self) -> bool:
        """Whether the forward is compiled."""
        return self.device.type == "cuda" if self.cfg.compile == "auto" else self.cfg.compile == "1"

    def agree(self, value: float) -> float:
        """Rank 0's value, on every rank."""
        if self.world_size > 1:
            box = torch.tensor(value, dtype=torch.float64)
            dist.broadcast(box, src=0, group=self.control)
            value = box.item()
        return value

    def add_up(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over all ranks, in place, in one exchange; same order on every rank."""
        if self.world_size > 1:
            flat = torch.cat([t.reshape(-1) for t in tensors])
            dist.all_reduce(flat, group=self.control if flat.device.type == "cpu" else None)
            totals = flat.split([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [total.view_as(t) for t, total in
                                           zip(tensors, totals, strict=True)])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Turn one rank's Refusal inside into a Refusal on every rank, so that none waits."""
        refusal = None
        try:
            yield
        except Refusal as error:
            refusal = error
        refused = torch.tensor(float(refusal is not None))
        self.add_up([refused])
        if refusal is not None:
            raise refusal
        if refused:
            raise Refusal("another rank refused its settings or data")

    def copy_from_main(self, model: nn.Module) -> None:
        """Give every rank rank 0's parameters: different CPUs may draw slightly different ones."""
        if self.world_size > 1:
            for p in model.parameters():
                dist.broadcast(p.data, src=0)

    def settle(self) -> None:
        """Wait until the GPU has done what was asked of it, so that a clock tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def put(self, x: Tensor) -> Tensor:
        """`x` on the run's device, without waiting for the copy."""
        if self.device.type == "cuda":
            x = x.pin_memory()
        return x.to(self.device, non_blocking=True)

    def share(self, content: bytes) -> bytes:
        """Rank 0's bytes, on every rank, whether or not they share a file system."""
        if self.world_size > 1:
            box = torch.zeros(int(self.agree(float(len(content)))), dtype=torch.uint8)
            if self.is_main:
                box.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            dist.broadcast(box, src=0, group=self.control)
            content = box.numpy().tobytes()
        return content

    def open_folder(self) -> None:
        """Make runs/<RUN_ID>/ with settings and source; raises Refusal if it exists already."""
        name = self.cfg.run_id or f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-" \
                                  f"{secrets.token_hex(3)}"
        folder = Path(self.cfg.runs_dir, name)
        taken = 0.0
        if self.is_main:
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                taken = 1.0
        if self.agree(taken):
            raise Refusal(f"RUN_ID={name}: {folder} exists already; nothing in it was touched. "
                          "Choose another RUN_ID or leave it empty")
        if self.is_main:
            self.folder = folder
            write_file(folder / "settings.json", json.dumps(asdict(self.cfg), indent=1).encode())
            write_file(folder / "train_gpt.py", self.source)

    def log(self, template: str, event: str = "", **facts: object) -> None:
        """Write one line on rank 0, to the console and log.txt: `template` filled with `facts`.

        With `event`, the facts go to metrics.jsonl as well, at full precision; with an empty
        template, only there.
        """
        if not self.is_main:
            return
        if template:
            line = template.format(**facts) if facts else template
            tqdm.write(line)
            sys.stdout.flush()
            if self.folder is not None:
                with open(self.folder / "log.txt", "a", encoding="utf-8") as log_file:
                    log_file.write(line + "\n")
        if event and self.folder is not None:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as metrics:
                metrics.write(json.dumps({"event": event, **facts}) + "\n")

    def log_failure(self, error: Exception) -> None:
        """Say in one line what failed while doing what; the traceback goes to log.txt."""
        text = str(error).strip().split("\n")[0]
        tqdm.write(f"error: rank {self.rank}, during {self.phase}: {type(error).__name__}: {text}",
                   file=sys.stderr)
        if self.folder is not None:
            with open(self.folder / "log.txt", "a", encoding="utf-8") as log_file:
                log_file.write("".join(traceback.format_exception(error)))

    def progress(self, total: float, unit: str, label: str) -> tqdm:
        """A progress bar with ETA on rank 0's terminal; silent where there is no terminal."""
        return tqdm(total=total, unit=unit, desc=label, leave=False,
                    disable=None if self.is_main else True, unit_scale=True, dynamic_ncols=True)

    def mark_ineligible(self, reason: str) -> None:
        """Note why the run cannot stand as a record."""
        self.ineligible.append(reason)
        self.log(f"warning: not eligible as a record: {reason}")

    def log_header(self, notes: list[str]) -> None:
        """Log what this run takes: settings, versions, machine, source."""
        self.log(f"{self.folder}/log.txt" if self.folder else "")
        for line in (*notes, *self.cfg.listing()):
            self.log(line)
        self.log("versions python:{python} torch:{torch} numpy:{numpy} sentencepiece:{sp} "
                 "zstandard:{zstd}", "versions", python=sys.version.split()[0],
                 torch=torch.__version__, numpy=np.__version__, sp=sentencepiece.__version__,
                 zstd=zstandard.__version__)
        self.log("machine device:{device} name:{name} world_size:{world_size} dtype:{dtype} "
                 "compiled:{compiled}", "machine", device=self.device.type, dtype=str(self.dtype),
                 name=torch.cuda.get_device_name() if self.device.type == "cuda"
                 else f"{torch.get_num_threads()} threads", world_size=self.world_size,
                 compiled=self.compiled)
        self.log("source sha256:{sha256} bytes:{num_bytes}", "source", num_bytes=len(self.source),
                 sha256=hashlib.sha256(self.source).hexdigest())


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def sha256_of(*paths: Path) -> str:
    """sha256 of the files' contents, one after another, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while chunk := f.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


# =================================================================================================
# Data
# A shard is 256 little-endian int32 (magic, version, token count, zeros) and then the tokens as
# uint16. Documents begin with BOS and nothing else separates them.
# =================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES, TOKEN_BYTES = 20240520, 1, 1024, 2
BOS = 1
# Training shards up to this many tokens in all are searched for bad ids before the run; larger
# sets are searched in their first million tokens each, and batch by batch as they are used.
FULL_SCAN_TOKENS, SCAN_TOKENS = 200_000_000, 1 << 20
SIDECAR = "fineweb_val.json"


def open_shard(path: Path, vocab_size: int, scan_tokens: int | None = None) -> np.ndarray:
    """Memory-map a shard's tokens, uint16 (n,); raises Refusal unless header, size and ids fit."""
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise Refusal(f"{path}: not a token shard (expected magic {SHARD_MAGIC}, version "
                      f"{SHARD_VERSION}); make it again with data/prepare.py")
    count = int(header[2])
    if size != SHARD_HEADER_BYTES + TOKEN_BYTES * count or count < 1:
        raise Refusal(f"{path}: its header promises {count:,} tokens "
                      f"({SHARD_HEADER_BYTES + TOKEN_BYTES * count:,} bytes) but it has {size:,} "
                      "bytes; it was probably cut short: delete it and run data/prepare.py again")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))
    check_ids(tokens[:scan_tokens], vocab_size, str(path))
    return tokens


def check_ids(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """Raise Refusal if a token id is outside the vocabulary."""
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise Refusal(f"{where}: token id {largest} is outside VOCAB_SIZE={vocab_size}; "
                      "the shards belong to another tokenizer")


def shard_paths(folder: str, split: str) -> list[Path]:
    """The shards of a split in order; raises Refusal if there are none."""
    paths = [Path(p) for p in sorted(glob.glob(f"{glob.escape(folder)}/fineweb_{split}_*.bin"))]
    if not paths:
        raise Refusal(f"DATA_PATH={folder}: no fineweb_{split}_*.bin there; make the data with "
                      "data/prepare.py, or point DATA_PATH at it")
    return paths


class TrainingRows:
    """Training rows of T+1 tokens, numbered from 0 without end.

    What row n holds depends on LOADER, SEED and the shards' contents alone, so it is the same
    for every world size, folder and restart.
    sequential: row n is the stream's tokens from n T on, shards joined in order and wrapped.
    shuffled: each epoch is a random permutation of all blocks of T tokens that lie inside a
    shard, which is what drawing shards in proportion to what is left of them amounts to.
    """

    def __init__(self, cfg: Config) -> None:
        paths = shard_paths(cfg.data_path, "train")
        total = sum(path.stat().st_size // TOKEN_BYTES for path in paths)
        scan = None if total <= FULL_SCAN_TOKENS else SCAN_TOKENS
        self.shards = [open_shard(path, cfg.vocab_size, scan) for path in paths]
        self.seq_len, self.seed, self.vocab_size = cfg.train_seq_len, cfg.seed, cfg.vocab_size
        self.shuffled = cfg.loader == "shuffled"
        self.first_token = np.cumsum([0, *(len(shard) for shard in self.shards)])
        blocks = [max(len(shard) - 1, 0) // self.seq_len for shard in self.shards]
        self.first_block = np.cumsum([0, *blocks])
        self.num_tokens, self.num_blocks = int(self.first_token[-1]), int(self.first_block[-1])
        self.epoch, self.order = -1, np.empty(0, np.uint32)
        if not self.num_blocks:
            raise Refusal(f"DATA_PATH={cfg.data_path}: no shard holds a row of "
                          f"TRAIN_SEQ_LEN={self.seq_len} tokens and one more")

    def batch(self, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
        """Input and target ids of rows first_row, first_row + 1, ...: int64 (num_rows, T) each."""
        rows = np.stack([self.row(n) for n in range(first_row, first_row + num_rows)])
        try:
            check_ids(rows, self.vocab_size, "training shards")
        except Refusal as refusal:  # too late to refuse: the run has begun
            raise RuntimeError(str(refusal)) from None
        ids = torch.from_numpy(rows.astype(np.int64))
        return ids[:, :-1], ids[:, 1:]

    def row(self, n: int) -> np.ndarray:
        """Row n as uint16 (T+1,)."""
        if not self.shuffled:
            return self.take(n * self.seq_len % self.num_tokens)
        epoch, position = divmod(n, self.num_blocks)
        if epoch != self.epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self.epoch, self.order = epoch, generator.permutation(
                np.arange(self.num_blocks, dtype=np.uint32))
        block = int(self.order[position])
        shard = int(np.searchsorted(self.first_block, block, side="right")) - 1
        start = (block - int(self.first_block[shard])) * self.seq_len
        return self.shards[shard][start : start + self.seq_len + 1]

    def take(self, start: int) -> np.ndarray:
        """T+1 tokens of the circular stream from token `start` on, uint16 (T+1,)."""
        parts, missing = [], self.seq_len + 1
        while missing:
            shard = int(np.searchsorted(self.first_token, start, side="right")) - 1
            offset = start - int(self.first_token[shard])
            parts.append(self.shards[shard][offset : offset + missing])
            missing -= len(parts[-1])
            start = (start + len(parts[-1])) % self.num_tokens
        return np.concatenate(parts)


def piece_bytes(tokenizer: sentencepiece.SentencePieceProcessor) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 bytes each token stands for, and the saving of those that open a document.

    A piece counts its UTF-8 length with every U+2581 read as one space, a byte piece 1, a
    control, unknown or unused piece 0. A tokenizer with a dummy prefix puts a space before each
    document that is not in the text: the first piece after BOS counts one less.
    Example: "a b" as BOS, "a", U+2581 "b" counts 0 + 1 + 2.
    """
    counts = np.zeros(tokenizer.vocab_size(), np.int16)
    for token in range(len(counts)):
        if tokenizer.is_byte(token):
            counts[token] = 1
        elif not (tokenizer.is_control(token) or tokenizer.is_unknown(token)
                  or tokenizer.is_unused(token)):
            counts[token] = len(tokenizer.id_to_piece(token).replace("\u2581", " ").encode())
    opening = np.zeros(len(counts), np.int16)
    if tokenizer.encode("a", out_type=str)[0].startswith("\u2581"):
        opening[:] = [tokenizer.id_to_piece(t).startswith("\u2581") for t in range(len(counts))]
    return counts, opening


@dataclass(frozen=True)
class Validation:
    """A validation split that agrees with its sidecar and tokenizer.

    tokens: uint16 (N,); target_bytes: int16 (N-1,), bytes of tokens[1:], the targets.
    """

    tokens: np.ndarray
    target_bytes: np.ndarray
    fingerprint: str
    tokenizer_sha256: str
    documents: int
    recorded_bytes: int

    def num_targets(self, cfg: Config) -> int:
        """Targets to score: every token but the first, or those of full rows (EVAL_TRUNCATE)."""
        targets = len(self.tokens) - 1
        return targets - targets % cfg.eval_seq_len if cfg.eval_truncate else targets


def read_sidecar(folder: str) -> dict:
    """The facts data/prepare.py recorded of a validation split; raises Refusal if unusable."""
    path = Path(folder, SIDECAR)
    if not path.is_file():
        raise Refusal(f"{path} is missing: the data is incomplete, or was not made here; "
                      "run data/prepare.py (it keeps shards that are already there)")
    try:
        facts = json.loads(path.read_bytes())
        hashes = (facts["tokenizer"]["sha256"], *facts["val_shards"].values())
        if all(isinstance(text, str) for text in hashes) and type(facts["encoded_bytes"]) is int:
            return facts
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise Refusal(f"{path} is damaged: delete it and run data/prepare.py again")


def fingerprint_of(shard_hashes: list[str]) -> str:
    """One name for a validation split: sha256 of its shards' sha256 sums, in order."""
    return hashlib.sha256("".join(shard_hashes).encode()).hexdigest()


def load_validation(cfg: Config) -> Validation:
    """Read the validation split whole and check it; raises Refusal on any disagreement."""
    tokenizer_path = Path(cfg.tokenizer_path)
    if not tokenizer_path.is_file():
        raise Refusal(f"TOKENIZER_PATH={tokenizer_path}: no such file; data/prepare.py makes it")
    paths, sidecar = shard_paths(cfg.data_path, "val"), read_sidecar(cfg.data_path)
    tokenizer_hash = sha256_of(tokenizer_path)
    if tokenizer_hash != sidecar["tokenizer"]["sha256"]:
        raise Refusal(f"TOKENIZER_PATH={tokenizer_path} is not the tokenizer that made the shards "
                      f"in {cfg.data_path} (sha256 {tokenizer_hash[:12]}, expected "
                      f"{sidecar['tokenizer']['sha256'][:12]})")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    except (OSError, RuntimeError) as error:
        raise Refusal(f"TOKENIZER_PATH={tokenizer_path}: not a SentencePiece model ({error})") \
            from None
    if tokenizer.vocab_size() != cfg.vocab_size or tokenizer.bos_id() != BOS:
        raise Refusal(f"TOKENIZER_PATH={tokenizer_path} has {tokenizer.vocab_size()} pieces, BOS "
                      f"id {tokenizer.bos_id()}; expected VOCAB_SIZE={cfg.vocab_size} and {BOS}")
    hashes = {path.name: sha256_of(path) for path in paths}
    if hashes != sidecar["val_shards"]:
        raise Refusal(f"the validation shards in {cfg.data_path} are not those its {SIDECAR} "
                      "records; delete that folder and run data/prepare.py again")
    tokens = np.concatenate([open_shard(path, cfg.vocab_size) for path in paths])
    counts, opening = piece_bytes(tokenizer)
    target_bytes = counts[tokens[1:]] - opening[tokens[1:]] * (tokens[:-1] == BOS)
    counted = int(target_bytes.sum(dtype=np.int64)) + int(counts[tokens[0]])
    if counted != sidecar["encoded_bytes"]:
        raise Refusal(f"the pieces of {cfg.data_path}'s validation split add up to {counted:,} "
                      f"bytes, but its {SIDECAR} records {sidecar['encoded_bytes']:,}: no score "
                      "could be trusted; run data/prepare.py again")
    val = Validation(tokens, target_bytes.astype(np.int16), fingerprint_of(list(hashes.values())),
                     tokenizer_hash, int((tokens == BOS).sum()), sidecar["encoded_bytes"])
    if not target_bytes[: val.num_targets(cfg)].any():
        raise Refusal(f"the validation split in {cfg.data_path} has no target to score "
                      f"({len(tokens):,} tokens, EVAL_SEQ_LEN={cfg.eval_seq_len}, "
                      f"EVAL_TRUNCATE={int(cfg.eval_truncate)})")
    return val


# =================================================================================================
# Model
# A decoder-only transformer whose second half takes U-shaped skips from its first half. Optional
# parts are modules with a neutral stand-in, so that every forward reads as its equation.
# =================================================================================================

RMS_EPS = 1.1920929e-07  # float32 machine epsilon, whatever the activation type
BIGRAM_CURRENT, BIGRAM_PREVIOUS = 36313, 27191
AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, without gain."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def like(parameter: Tensor, x: Tensor) -> Tensor:
    """A float32 gain or gate in the type of the activations it meets."""
    return parameter.to(x.dtype)


class Linear(nn.Linear):
    """Matrix product without bias; the float32 weight is cast to the activations' type."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, like(self.weight, x))


class Nothing(nn.Module):
    """Stands in for an optional part that adds to the embedding."""

    def forward(self, input_ids: Tensor) -> float:
        """(B, T) -> 0."""
        return 0.0


class Unchanged(nn.Module):
    """Stands in for an optional part that transforms its first argument."""

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """(B, T, ...) -> the same (B, T, ...)."""
        return x


class BigramHash(nn.Module):
    """Additive embedding of the pair (previous, current token), hashed into buckets.

    bucket_i = (36313 t_i XOR 27191 t_{i-1}) mod (buckets - 1); a row's first position, and with
    the mask every BOS, takes the reserved last bucket. The table starts at zero, so does the sum.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.num_buckets, self.bos_mask = cfg.bigram_vocab_size, cfg.bigram_bos_mask
        self.embed = nn.Embedding(cfg.bigram_vocab_size, cfg.bigram_dim)
        self.proj = Linear(cfg.bigram_dim, cfg.model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def buckets(self, input_ids: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T) bucket numbers."""
        last = self.num_buckets - 1
        mixed = (BIGRAM_CURRENT * input_ids[:, 1:]) ^ (BIGRAM_PREVIOUS * input_ids[:, :-1])
        hashed = F.pad(mixed % last, (1, 0), value=last)
        return torch.where(input_ids == BOS, last, hashed) if self.bos_mask else hashed

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        return self.scale * self.proj(self.embed(self.buckets(input_ids)))


class SmearGate(nn.Module):
    """x_i <- (1 - s) x_i + s x_{i-1}, s = sigmoid(gate) per channel; starts at s = 1/2.

    Before a row stands the zero vector. With the mask a BOS keeps its own embedding, since what
    stands before it belongs to another document.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.bos_mask = cfg.smear_bos_mask
        self.gate = nn.Parameter(torch.zeros(cfg.model_dim))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """x: (B, T, D), input_ids: (B, T) -> (B, T, D)."""
        share = torch.sigmoid(like(self.gate, x))
        if self.bos_mask:
            share = share * (input_ids != BOS).unsqueeze(-1)
        return torch.lerp(x, F.pad(x[:, :-1], (0, 0, 1, 0)), share.expand_as(x))


class ValueEmbedding(nn.Module):
    """Token identity for the values of late layers: scale * P E[t], shared by those layers."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.ve_dim)
        self.proj = Linear(cfg.ve_dim, cfg.num_kv_heads * cfg.head_dim)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T) -> (B, T, G*K)."""
        extra = self.proj(self.embed(input_ids).to(dtype))
        return like(self.scale, extra) * extra


def rotary_tables(cfg: Config, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i/R), float32 (T, R/2), R the rotated dimensions.

    Rows longer than ROPE_NTK_REF stretch the base by (T / ref)^(R / (R - 2)), the NTK rule.
    Built in float32 always: bf16 positions above 256 collapse onto each other.
    """
    dims, base = cfg.rotary_dims, cfg.rope_base
    if 0 < cfg.rope_ntk_ref < seq_len:
        base = base * (seq_len / cfg.rope_ntk_ref) ** (dims / (dims - 2))
    exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / base**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first R of K dimensions of each head, in half-split pairs: (B, T, H, K)."""
    cos, sin = (like(table, x)[:, None, :] for table in rotation)
    half = cos.size(-1)
    first, second, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch: q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K)."""
    if q.device.type != "cuda":  # repeated heads take 0.7 of the time of enable_gqa on a CPU
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


def pick_attention(cfg: Config, device: torch.device) -> tuple[str, AttentionKernel]:
    """The attention kernel and its name: FlashAttention-3 where it works, else torch's.

    It is tried on one small input, since it can import on GPUs it does not run on. Raises Refusal
    if ATTENTION=fa3 and it is not to be had.
    """
    why = "there is no CUDA device"
    if device.type == "cuda" and cfg.attention in ("auto", "fa3"):
        try:
            from flash_attn_interface import flash_attn_func
            q, kv = (torch.zeros(1, 64, heads, cfg.head_dim, dtype=torch.bfloat16, device=device)
                     for heads in (cfg.num_heads, cfg.num_kv_heads))
            as_tuple = isinstance(flash_attn_func(q, kv, kv, causal=True), tuple)
            pick = (lambda out: out[0]) if as_tuple else (lambda out: out)
            return "fa3", lambda q, k, v: pick(flash_attn_func(q, k, v, causal=True))
        except (ImportError, RuntimeError, TypeError) as error:
            why = f"flash_attn_interface does not work here ({error})"
    if cfg.attention == "fa3":
        raise Refusal(f"ATTENTION=fa3: {why}; use ATTENTION=auto")
    return "sdpa", sdpa_attention


class ExclusiveSelfAttention(nn.Module):
    """XSA: y <- y - (y . n) n, n = v / ||v||, a head's output without its own value's direction.

    arXiv:2603.09078. Query heads of one group share that group's value.
    """

    def forward(self, y: Tensor, v: Tensor) -> Tensor:
        """y: (B, T, H, K) attention output, v: (B, T, G, K) values it attended -> (B, T, H, K)."""
        direction = F.normalize(v, dim=-1).unsqueeze(3)  # (B, T, G, 1, K)
        grouped = y.unflatten(2, (v.size(2), -1))  # (B, T, G, H/G, K)
        along = (grouped * direction).sum(-1, keepdim=True)
        return (grouped - along * direction).flatten(2, 3)


class Attention(nn.Module):
    """Causal grouped-query attention with normalised, rotated queries and keys."""

    def __init__(self, cfg: Config, kernel: AttentionKernel, exclusive: bool) -> None:
        super().__init__()
        width = cfg.num_kv_heads * cfg.head_dim
        self.c_q, self.c_k = Linear(cfg.model_dim, cfg.model_dim), Linear(cfg.model_dim, width)
        self.c_v, self.proj = Linear(cfg.model_dim, width), Linear(cfg.model_dim, cfg.model_dim)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        self.kernel, self.head_dim = kernel, cfg.head_dim
        self.xsa = ExclusiveSelfAttention() if exclusive else Unchanged()

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], extra_v: Tensor | None) -> Tensor:
        """x: (B, T, D), extra_v: (B, T, G*K) to add to the values or None -> (B, T, D)."""
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if extra_v is not None:
            v = v + extra_v
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        q = rotate(rms_norm(q), rotation) * like(self.q_gain, q)[:, None]
        y = self.kernel(q, rotate(rms_norm(k), rotation), v)
        return self.proj(self.xsa(y, v).flatten(2))


class MLP(nn.Module):
    """x -> P leaky_relu(W x)^2."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.fc, self.proj = Linear(cfg.model_dim, cfg.mlp_dim), Linear(cfg.mlp_dim, cfg.model_dim)
        self.slope = cfg.leaky_slope

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.proj(F.leaky_relu(self.fc(x), self.slope).square())


class Block(nn.Module):
    """One layer: mix in the embedding, then attention, then MLP, each with a learned gain."""

    def __init__(self, cfg: Config, layer: int, kernel: AttentionKernel) -> None:
        super().__init__()
        exclusive = layer >= cfg.num_layers - cfg.xsa_last_n
        self.attn, self.mlp = Attention(cfg, kernel, exclusive), MLP(cfg)
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(cfg.model_dim),
                                                   torch.zeros(cfg.model_dim)]))
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.depth_scale = 1.0 / math.sqrt(layer + 1) if cfg.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor, rotation: tuple[Tensor, Tensor],
                extra_v: Tensor | None) -> Tensor:
        """x: residual stream, x0: normed embedding, both (B, T, D) -> (B, T, D)."""
        keep, inject = like(self.resid_mix, x)
        a, b, s = like(self.attn_scale, x), like(self.mlp_scale, x), self.depth_scale
        x = keep * x + inject * x0
        x = x + a * self.attn(rms_norm(x) * s, rotation, extra_v)
        x = x + b * self.mlp(rms_norm(x) * s)
        return x


class GPT(nn.Module):
    """hidden(ids) -> logits(hidden) -> token_nats(logits, targets); forward is all three."""

    def __init__(self, cfg: Config, kernel: AttentionKernel = sdpa_attention,
                 dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.lm_head = None if cfg.tie_embeddings else Linear(cfg.model_dim, cfg.vocab_size)
        self.bigram = BigramHash(cfg) if cfg.bigram_vocab_size else Nothing()
        self.smear = SmearGate(cfg) if cfg.smear_enabled else Unchanged()
        self.blocks = nn.ModuleList(Block(cfg, n, kernel) for n in range(cfg.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(cfg.num_layers // 2, cfg.model_dim))
        self.ve_shared = ValueEmbedding(cfg) if cfg.value_layers else None
        self.ve_layer_scales = nn.ParameterList(torch.ones(1) for _ in cfg.value_layers)

    def value_embeddings(self, input_ids: Tensor) -> dict[int, Tensor]:
        """What each layer of VE_LAYERS adds to its values: (B, T) -> {layer: (B, T, G*K)}."""
        if self.ve_shared is None:
            return {}
        shared = self.ve_shared(input_ids, self.dtype)
        return {layer: like(scale, shared) * shared
                for layer, scale in zip(self.cfg.value_layers, self.ve_layer_scales, strict=True)}

    def hidden(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D): the normed residual stream after the last block."""
        x = rms_norm((self.tok_emb(input_ids) + self.bigram(input_ids)).to(self.dtype))
        x = x0 = self.smear(x, input_ids)
        rotation = rotary_tables(self.cfg, input_ids.size(1), x.device)
        extra_v = self.value_embeddings(input_ids)
        half, skips = self.cfg.num_layers // 2, []
        for layer, block in enumerate(self.blocks):
            if layer >= half and skips:
                x = x + like(self.skip_weights[layer - half], x) * skips.pop()
            x = block(x, x0, rotation, extra_v.get(layer))
            if layer < half:
                skips.append(x)
        return rms_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V) float32, bounded by the softcap c: c tanh(z / c)."""
        head = self.tok_emb if self.lm_head is None else self.lm_head
        z, cap = F.linear(hidden, like(head.weight, hidden)).float(), self.cfg.logit_softcap
        return cap * torch.tanh(z / cap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """(B, T) and (B, T) -> nats of each target, float32 (B, T)."""
        logits = self.logits(self.hidden(input_ids))
        return F.cross_entropy(logits.flatten(0, 1), target_ids.flatten(),
                               reduction="none").view_as(target_ids)


@torch.no_grad()
def initialize(model: GPT, cfg: Config) -> None:
    """Set initial weights from SEED, on the CPU, so that every device starts alike.

    Matrices are orthogonal, except that the output projections of blocks and an untied head are
    zero: each block starts as the identity. Projections of the auxiliary embeddings are scaled
    by 1 / sqrt(2 L). The token embedding is N(0, TIED_EMBED_INIT_STD^2), the value table
    N(0, 0.01^2), the bigram table zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                if name == "lm_head" or re.fullmatch(r"blocks\.\d+\.(attn|mlp)\.proj", name):
                    module.weight.zero_()
                else:
                    nn.init.orthogonal_(module.weight)
                if name in ("bigram.proj", "ve_shared.proj"):
                    module.weight.mul_(1.0 / math.sqrt(2 * cfg.num_layers))
        nn.init.normal_(model.tok_emb.weight, std=cfg.tied_embed_init_std)
        if cfg.bigram_vocab_size:
            model.bigram.embed.weight.zero_()
        if cfg.value_layers:
            nn.init.normal_(model.ve_shared.embed.weight, std=0.01)


# =================================================================================================
# Optimizers and schedules
# Two tables and one rule each: ROUTES says which parameter goes where, Schedule.at() what the
# rates are at a given time, Muon.step() and AdamW what they do.
# =================================================================================================

# Quintic Newton-Schulz of the Muon optimizer: large slope at zero; singular values from 0.003
# of the norm upward end within 0.68 to 1.21 after five steps.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

BLOCK_GAINS = r"blocks\.\d+\.(attn\.q_gain|attn_scale|mlp_scale|resid_mix)"
OTHER_GAINS = r"skip_weights|smear\.gate|(bigram|ve_shared)\.scale|ve_layer_scales\.\d+"
ROUTES = (
    # parameter name (full match, first row wins)      optimizer learning rate  decay
    (r"lm_head\.weight",                                "adam", "head_lr",       "adam_wd"),
    (r"tok_emb\.weight",                                "adam", "token_lr",      "adam_wd"),
    (r"(bigram|ve_shared)\.embed\.weight",              "adam", "tied_embed_lr", "adam_wd"),
    (r"blocks\.\d+\.attn\.(c_q|c_k|c_v|proj)\.weight", "muon", "matrix_lr",     "muon_wd"),
    (r"blocks\.\d+\.mlp\.(fc|proj)\.weight",           "muon", "matrix_lr",     "muon_wd"),
    (r"(bigram|ve_shared)\.proj\.weight",               "muon", "matrix_lr",     "muon_wd"),
    (BLOCK_GAINS,                                       "adam", "scalar_lr",     "adam_wd"),
    (OTHER_GAINS,                                       "adam", "scalar_lr",     "adam_wd"),
)


def route_parameters(cfg: Config, model: nn.Module) -> list[dict]:
    """Parameter groups, one for each row of ROUTES in use; raises ValueError on one unrouted."""
    rates = {**asdict(cfg), "token_lr": cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr}
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        row = next((row for row in ROUTES if re.fullmatch(row[0], name)), None)
        if row is None:
            raise ValueError(f"parameter {name} matches no row of ROUTES")
        group = groups.setdefault(row[0], {
            "route": row[0], "optimizer": row[1], "params": [], "names": [],
            "base_lr": rates[row[2]] * cfg.lr_mult, "weight_decay": rates[row[3]]})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Push the singular values of each matrix towards 1 by Newton-Schulz: (..., r, c) -> same.

    X <- aX + (bA + cA^2)X with A = XX^T, from X = G / ||G||_F; wide side last, so that A is the
    smaller square. A zero matrix stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(-2) > matrices.size(-1)
    X = matrices.mT if tall else matrices
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """W <- (1 - lr wd) W - lr sqrt(max(1, r/c)) orthogonalize(g + mu M), M <- mu M + g.

    Equal shapes are stacked and orthogonalised together. Products run in `dtype`, which should
    be bf16 only where that is fast. Source: Keller Jordan's Muon.
    """

    def __init__(self, groups: list[dict], steps: int, dtype: torch.dtype) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": 0.95})
        self.steps, self.dtype = steps, dtype

    @torch.no_grad()
    def step(self) -> None:
        """Apply one update from the parameters' gradients."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                self.step_stack(weights, group)

    def step_stack(self, weights: list[Tensor], group: dict) -> None:
        """Update n matrices of one shape (r, c) through their stack (n, r, c)."""
        mu, lr, (rows, cols) = group["momentum"], group["lr"], weights[0].shape
        grads = torch.stack([weight.grad for weight in weights])
        state = self.state[weights[0]]
        if not state:
            state["momentum"] = torch.zeros_like(grads)
        momentum = state["momentum"].mul_(mu).add_(grads)
        update = orthogonalize(grads.add(momentum, alpha=mu).to(self.dtype), self.steps)
        torch._foreach_mul_(weights, 1.0 - lr * group["weight_decay"])
        torch._foreach_add_(weights, update.to(weights[0].dtype).unbind(),
                            alpha=-lr * math.sqrt(max(1.0, rows / cols)))


def build_optimizers(cfg: Config, groups: list[dict], dtype: torch.dtype) -> list:
    """AdamW and Muon over the groups of route_parameters; rates are set step by step."""
    adam = [group for group in groups if group["optimizer"] == "adam"]
    muon = [group for group in groups if group["optimizer"] == "muon"]
    return [torch.optim.AdamW(adam, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True),
            Muon(muon, cfg.muon_backend_steps, dtype)]


def decay_scale(remaining: float, warmdown: float, shape: str) -> float:
    """Learning-rate scale with `remaining` of the run left, in the unit of `warmdown`."""
    linear = min(1.0, max(0.0, remaining) / warmdown) if warmdown > 0 else 1.0
    return linear if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * linear))


@dataclass(frozen=True)
class Moment:
    """What the schedules say at one step."""

    lr_scale: float
    momentum: float
    qat: bool
    done: bool


class Schedule:
    """Where the run stands, from steps done and seconds used; the same on every rank.

    Clock-driven runs measure what is left in seconds, step-driven ones in steps. WARMDOWN_ITERS
    becomes seconds through the median of recent step times, and only once a few are known: a
    slow first step must not look like the end of the run. A warmdown never exceeds the run.
    """

    STEPS_TIMED = (5, 50)  # needed before the median counts; kept

    def __init__(self, cfg: Config, reserve_seconds: float = 0.0, queued_steps: int = 0) -> None:
        self.cfg, self.queued_steps, self.qat = cfg, queued_steps, False
        self.budget = max(cfg.max_wallclock_seconds - reserve_seconds, 0.0)
        self.step_seconds: deque[float] = deque(maxlen=self.STEPS_TIMED[1])
        self.last_seconds = 0.0

    def remaining_and_warmdown(self, step: int, seconds: float) -> tuple[float, float]:
        """What is left of the run and how much of it decays, in steps or seconds alike."""
        cfg, steps_left = self.cfg, self.cfg.iterations - step
        if cfg.step_driven:
            whole, left, iters = cfg.iterations, steps_left, float(cfg.warmdown_iters)
        else:
            whole, iters = self.budget, 0.0
            if step_seconds := self.typical_step():
                whole = min(whole, seconds + steps_left * step_seconds)
                iters = cfg.warmdown_iters * step_seconds
            left = whole - seconds
        return left, cfg.warmdown_frac * whole if cfg.warmdown_frac else min(iters, whole)

    def typical_step(self) -> float:
        """Median seconds of recent steps; 0 until enough are known."""
        known = len(self.step_seconds) >= self.STEPS_TIMED[0]
        return statistics.median(self.step_seconds) if known else 0.0

    def at(self, step: int, seconds: float) -> Moment:
        """The schedules before step `step` (from 0), `seconds` into training."""
        if step > 0:
            self.step_seconds.append(seconds - self.last_seconds)
        self.last_seconds = seconds
        cfg = self.cfg
        left, warmdown = self.remaining_and_warmdown(step, seconds)
        scale = decay_scale(left, warmdown, cfg.warmdown_type)
        ramp = min(step / cfg.muon_momentum_warmup_steps, 1.0) \
            if cfg.muon_momentum_warmup_steps else 1.0
        start = cfg.muon_momentum_warmup_start
        # Late QAT stays on once it is on: the scale is measured and may waver.
        self.qat = self.qat or (cfg.qat_mode == "late" and scale < cfg.late_qat_threshold)
        # The last step must end inside the budget, not begin there, after any that a GPU still
        # has in its queue.
        ahead = (1 + self.queued_steps) * self.typical_step()
        over = seconds + ahead >= self.budget and not cfg.step_driven
        done = step >= cfg.iterations or (step > 0 and over)
        return Moment(scale, (1.0 - ramp) * start + ramp * cfg.muon_momentum, self.qat, done)


# =================================================================================================
# Training
# A step's gradient is that of the mean over the whole global batch, however many ranks and
# micro-batches share it. The loss is read back one step late, so that a GPU never waits for it.
# =================================================================================================

Forward = Callable[[nn.Module, Tensor, Tensor, bool], Tensor]


def training_nats(model: GPT, input_ids: Tensor, target_ids: Tensor, qat: bool) -> Tensor:
    """Nats of each target (B, T); with `qat`, matrices are seen as they would be exported."""
    if not qat:
        return model(input_ids, target_ids)
    return torch.func.functional_call(model, fake_quantized(model), (input_ids, target_ids))


def make_forward(run: Run) -> Forward:
    """The forward of training and evaluation; compiled, one graph for each shape and for QAT."""
    return torch.compile(training_nats, fullgraph=True, dynamic=False) if run.compiled \
        else training_nats


def micro_batches(cfg: Config, run: Run) -> list[tuple[int, int]]:
    """This rank's rows of a step's global batch, as (first row, number of rows)."""
    first = run.rank * cfg.rows_per_step // run.world_size
    last = (run.rank + 1) * cfg.rows_per_step // run.world_size
    tokens = 98_304 if run.device.type == "cuda" else 8_192
    size = cfg.micro_batch_seqs or max(1, tokens // cfg.train_seq_len)
    return [(start, min(size, last - start)) for start in range(first, last, size)]


def train_step(forward: Forward, model: GPT, optimizers: list, rows: TrainingRows, step: int,
               moment: Moment, run: Run) -> Tensor:
    """One optimizer step; returns [mean loss, then the gradient norm of each group]."""
    cfg, groups = run.cfg, [group for opt in optimizers for group in opt.param_groups]
    loss = torch.zeros(1, device=run.device)
    for first, count in micro_batches(cfg, run):
        input_ids, target_ids = rows.batch(step * cfg.rows_per_step + first, count)
        nats = forward(model, run.put(input_ids), run.put(target_ids), moment.qat)
        part = nats.sum() / cfg.train_batch_tokens
        part.backward()
        loss += part.detach()
    for p in model.parameters():  # a rank without rows in this step adds nothing
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    run.add_up([loss, *(p.grad for p in model.parameters())])
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group["params"]]) for group in groups]
    if cfg.grad_clip_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.grad_clip_norm,
                                             torch.stack(norms).norm())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = group["base_lr"] * moment.lr_scale, moment.momentum
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.cat([loss, torch.stack(norms)])


def refuse_non_finite(stats: list[float], step: int, groups: list[dict]) -> None:
    """Raise FloatingPointError naming step and tensors if a loss or gradient is not finite."""
    if not all(map(math.isfinite, stats)):
        bad = [group["route"] for group, norm in zip(groups, stats[1:], strict=True)
               if not math.isfinite(norm)]
        raise FloatingPointError(f"step {step}: loss {stats[0]}, gradient not finite in: "
                                 f"{'; '.join(bad) or 'no group'}")


def prime(forward: Forward, model: GPT, rows: TrainingRows, run: Run) -> tuple[float, float]:
    """Compile and warm up every path of the run, untimed, and put everything back.

    Trains a few steps with throw-away optimizers, with and without QAT. Returns the measured
    seconds of one calibration batch and of one evaluation batch.
    """
    cfg, run.phase = run.cfg, "priming"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    variants = [False, True] if cfg.qat_mode == "late" else [False]
    steps = max(cfg.warmup_steps, len(variants)) if run.compiled else len(variants)
    optimizers = build_optimizers(cfg, route_parameters(cfg, model), run.dtype)
    for step in range(steps):
        moment = Moment(1.0, cfg.muon_momentum_warmup_start, variants[step % len(variants)], False)
        train_step(forward, model, optimizers, rows, step, moment, run)
        run.log(f"warmup_step:{step + 1}/{steps}")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    ids = torch.randint(cfg.vocab_size, (cfg.eval_batch_seqs, cfg.eval_seq_len), device=run.device,
                        generator=torch.Generator(run.device).manual_seed(0))
    return (run.agree(timed(lambda: collect_hessians(model, rows, 0, 1, run))),
            run.agree(timed(lambda: forward(model, ids, ids, False).sum().item())))


@torch.no_grad()
def timed(work: Callable[[], object]) -> float:
    """Seconds of the second of two calls, so that compilation and first use are left out."""
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def train(forward: Forward, model: GPT, rows: TrainingRows, val: Validation,
          reserve_seconds: float, run: Run) -> tuple[nn.Module, int]:
    """Train until the budget less `reserve_seconds` ends; returns averaged model and steps."""
    cfg, run.phase = run.cfg, "training"
    optimizers = build_optimizers(cfg, route_parameters(cfg, model), run.dtype)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema_decay))
    average.n_averaged.fill_(1)  # the average starts at the initial weights, not at step 1's
    schedule = Schedule(cfg, reserve_seconds, queued_steps=int(run.device.type == "cuda"))
    matrices = len(fake_quantized(model))
    step, pending, qat_before = 0, None, False
    bar = run.progress(cfg.iterations if cfg.step_driven else schedule.budget,
                       "step" if cfg.step_driven else "s", "training")
    with run.training_clock.running(), bar:
        while True:
            seconds = run.agree(run.training_clock.elapsed())
            moment = schedule.at(step, seconds)
            if moment.done:
                break
            if cfg.val_loss_every and step and step % cfg.val_loss_every == 0:
                run.settle()
                with run.training_clock.paused():
                    report(f"step:{step}/{cfg.iterations}",
                           evaluate("validation", forward, model, val, run), run, step)
            qat_starts = moment.qat and not qat_before
            if qat_starts:
                run.log("late_qat:enabled step:{step} scale:{scale:.4f} matrices:{matrices}",
                        "late_qat", step=step, scale=moment.lr_scale, matrices=matrices)
            stats = train_step(forward, model, optimizers, rows, step, moment, run)
            if cfg.avg_mode == "ema":
                average.update_parameters(model)
            count_activity(moment, matrices, run)
            if pending is not None:
                log_step(*pending, step, seconds, groups, run)
            pending, step, qat_before = (stats, moment, qat_starts), step + 1, moment.qat
            bar.update((step if cfg.step_driven else seconds) - bar.n)
        log_step(*pending[:2], True, step, run.training_clock.elapsed(), groups, run)
    run.trained_seconds = run.training_clock.elapsed()
    run.log("{reason} train_time:{ms:.0f}ms step:{step}/{iterations}", "trained", step=step,
            reason="stopping: last step" if step == cfg.iterations
            else "stopping_early: wallclock_cap",
            ms=1e3 * run.trained_seconds, iterations=cfg.iterations)
    if cfg.avg_mode == "ema":
        run.log("ema:applying EMA weights")
    return (average.module if cfg.avg_mode == "ema" else model), step


def log_step(stats: Tensor, moment: Moment, show: bool, step: int, seconds: float,
             groups: list[dict], run: Run) -> None:
    """Check the step-th step, which is finished; note it, and log it if its turn has come."""
    stats = stats.tolist()
    refuse_non_finite(stats, step, groups)
    cfg = run.cfg
    share = step / cfg.iterations if cfg.step_driven else seconds / cfg.max_wallclock_seconds
    due = step % cfg.train_log_every == 0 if cfg.train_log_every else \
        int(50 * share) > run.last_logged_share
    show = show or step <= 10 or due
    if show:
        run.last_logged_share = int(50 * share)
    template = ("step:{step}/{iterations} train_loss:{train_loss:.4f} train_time:{ms:.0f}ms "
                "step_avg:{step_avg:.2f}ms lr_scale:{lr_scale:.4f} eta:{eta:.0f}s")
    run.log(template if show else "", "step", step=step, iterations=cfg.iterations,
            train_loss=stats[0], ms=1e3 * seconds, step_avg=1e3 * seconds / step,
            lr_scale=moment.lr_scale, eta=seconds * (1 - share) / max(share, 1e-9))


def count_activity(moment: Moment, qat_matrices: int, run: Run) -> None:
    """Count the steps in which each technique that is configured to act at some time acted."""
    cfg = run.cfg
    run.activity["steps"] += 1
    for name, configured, acts in (
        ("late_qat", cfg.qat_mode == "late", moment.qat and qat_matrices > 0),
        ("warmdown", cfg.warmdown_iters or cfg.warmdown_frac, moment.lr_scale < 1.0),
        ("momentum_ramp", cfg.muon_momentum_warmup_steps, moment.momentum != cfg.muon_momentum),
        ("ema", cfg.avg_mode == "ema", True),
    ):
        if configured:
            run.activity[name] += bool(acts)


def log_activity(run: Run) -> None:
    """Log how many steps each scheduled technique was active; warn of any that never was."""
    for name, steps in run.activity.items():
        if name != "steps":
            run.log("activity {name} steps:{steps} of:{of}", "activity", name=name, steps=steps,
                    of=run.activity["steps"])
            if not steps:
                run.log(f"warning: {name} was configured and never acted")


# =================================================================================================
# Quantization
# Policy (which tensor gets which grid), quantizers (tensor to integers and scales), and the
# Hessians that GPTQ needs. None of them knows about files.
# =================================================================================================

CALIBRATION_ROWS = 8  # rows a calibration batch
CLIP_PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
INT8_PERCENTILE = 0.9999984
DAMPING, DAMPING_TRIES = 0.01, 5
ROLE_PATTERNS = ((r"blocks\.\d+\.mlp\..*", "mlp"), (r"blocks\.\d+\.attn\..*", "attn"),
                 (r"(tok_emb|lm_head)\..*", "emb"), (r".*", "aux"))


@dataclass(frozen=True)
class Stored:
    """A tensor as the artifact holds it: integers with one fp16 scale a row, or floats.

    values: int8 (rows, cols) with scale fp16 (rows,), or fp16 of any shape with scale None.
    """

    values: Tensor
    scale: Tensor | None = None

    def restore(self) -> Tensor:
        """The float32 tensor that the values stand for."""
        values = self.values.float()
        return values if self.scale is None else values * self.scale.float()[:, None]


def role_of(name: str) -> str:
    """The role of a parameter in BITS."""
    return next(role for pattern, role in ROLE_PATTERNS if re.fullmatch(pattern, name))


def bits_of(cfg: Config, name: str, tensor: Tensor) -> int:
    """Bits of a parameter's integers; 0 for fp16.

    Only matrices above INT8_KEEP_FLOAT_MAX_NUMEL elements become integers, at their role's bits.
    """
    small = tensor.ndim != 2 or tensor.numel() <= cfg.int8_keep_float_max_numel
    return 0 if small else cfg.bits_by_role[role_of(name)]


def largest_integer(bits: int) -> int:
    """The top of a symmetric grid: 31 at 6 bits, 127 at 8."""
    return 2 ** (bits - 1) - 1


def fake_quantized(model: GPT) -> dict[str, Tensor]:
    """The linear weights that export makes integers, on their grid, gradients passing through.

    s = max(absmax of the row, 1) / levels, W' = clamp(round(W / s)) s, dW' / dW = 1.
    """
    seen = {}
    for name, module in model.named_modules():
        weight, bits = (module.weight, bits_of(model.cfg, f"{name}.weight", module.weight)) \
            if isinstance(module, Linear) else (None, 0)
        if bits:
            levels = largest_integer(bits)
            scale = weight.detach().abs().amax(dim=1, keepdim=True).clamp_min(1.0) / levels
            grid = torch.round(weight.detach() / scale).clamp(-levels, levels) * scale
            seen[f"{name}.weight"] = weight + (grid - weight.detach())
    return seen


def clip_candidates(W: Tensor, bits: int) -> Tensor:
    """Row scales for each of CLIP_PERCENTILES: (r, c) -> fp16 (candidates, r).

    The scale never falls below 1 / levels, which keeps small rows coarse and cheap.
    """
    levels = largest_integer(bits)
    clips = torch.quantile(W.abs(), torch.tensor(CLIP_PERCENTILES, device=W.device), dim=1)
    clips[-1] = W.abs().amax(dim=1)
    return (clips / levels).clamp_min(1.0 / levels).half()


def round_to_nearest(W: Tensor, bits: int) -> Stored:
    """Nearest integers at the clip percentile of least squared error over the matrix."""
    levels, best = largest_integer(bits), None
    for scale in clip_candidates(W, bits):
        q = torch.round(W / scale.float()[:, None]).clamp(-levels, levels)
        error = (W - q * scale.float()[:, None]).square().mean().item()
        if best is None or error < best[0]:
            best = (error, Stored(q.to(torch.int8), scale))
    return best[1]


def int8_rows(W: Tensor) -> Stored:
    """Embedding tables: nearest of +-127 steps of a row's 0.9999984 quantile / 127."""
    clip = torch.quantile(W.abs(), INT8_PERCENTILE, dim=1)
    scale = (clip / 127).clamp_min(1.0 / 127)
    q = torch.round(W.clamp(-clip[:, None], clip[:, None]) / scale[:, None]).clamp(-127, 127)
    return Stored(q.to(torch.int8), scale.half())


def inverse_factor(H: Tensor) -> Tensor:
    """Upper U with U^T U = (H + damping)^-1, float32 (c, c).

    Damping is 1 % of the mean diagonal, ten times more after each failed factorisation; raises
    torch.linalg.LinAlgError if the last one fails as well.
    """
    identity = torch.eye(H.size(0), device=H.device)
    damping = DAMPING * H.diagonal().mean().clamp_min(1e-12)
    for attempt in range(DAMPING_TRIES):
        try:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(H + damping * identity))
            return torch.linalg.cholesky(inverse, upper=True)
        except torch.linalg.LinAlgError:
            if attempt == DAMPING_TRIES - 1:
                raise
            damping = damping * 10


def gptq(W: Tensor, H: Tensor, bits: int, block: int) -> Stored:
    """Integers Q and row scales s that keep ||(W - s Q) X||^2 small, H = X X^T.

    GPTQ (arXiv:2210.17323): columns in order of falling diag(H); each column's rounding error is
    pushed onto the columns not yet rounded, through U with U^T U = H^-1. All clip candidates go
    through at once; the one of least squared error wins. W: (r, c), H: (c, c), both float32.
    """
    levels = largest_integer(bits)
    dead = H.diagonal() == 0
    H = H + torch.diag(dead.float())
    W = W.masked_fill(dead, 0.0)
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    U = inverse_factor(H[order][:, order])
    scales = clip_candidates(W, bits)
    step = scales.float().unsqueeze(-1)  # (candidates, r, 1)
    rest = W[:, order].expand(len(scales), -1, -1).clone()  # (candidates, r, c)
    Q = torch.empty_like(rest)
    for start in range(0, W.size(1), block):
        stop = min(start + block, W.size(1))
        errors = torch.empty_like(rest[..., start:stop])
        for col in range(start, stop):
            column = rest[..., col : col + 1]
            Q[..., col : col + 1] = torch.round(column / step).clamp_(-levels, levels)
            error = (column - Q[..., col : col + 1] * step) / U[col, col]
            rest[..., col:stop] -= error * U[col, col:stop]
            errors[..., col - start : col - start + 1] = error
        rest[..., stop:] -= errors @ U[start:stop, stop:]
    squared = (W[:, order] - Q * step).square().mean(dim=(1, 2))
    best = int(squared.argmin())
    return Stored(Q[best][:, torch.argsort(order)].to(torch.int8), scales[best])


def weighted_error(W: Tensor, stored: Stored, H: Tensor) -> float:
    """GPTQ's objective tr((W - Q) H (W - Q)^T), in float64."""
    delta = (W - stored.restore().to(W.device)).double()
    return float(((delta @ H.double()) * delta).sum())


def hessian_source(name: str) -> str:
    """The linear whose inputs a linear shares: queries, keys and values read the same."""
    return re.sub(r"attn\.c_[kv]$", "attn.c_q", name)


@torch.no_grad()
def collect_hessians(model: GPT, rows: TrainingRows, first_row: int, num_batches: int,
                     run: Run) -> dict[str, Tensor]:
    """Mean x x^T of the inputs of each linear that becomes integers: {name: float32 (c, c)}.

    Batches of CALIBRATION_ROWS rows from `first_row` on are dealt to the ranks in turn; when the
    training budget ends first, those not yet seen are left out. An untied head is stored like
    the embedding, without a Hessian.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)
               and name != "lm_head" and bits_of(model.cfg, f"{name}.weight", module.weight)}
    sums = {name: torch.zeros(linears[name].in_features, linears[name].in_features,
                              device=run.device) for name in map(hessian_source, linears)}
    seen = torch.zeros(1, device=run.device)

    def observe(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0].flatten(0, -2).float()
            sums[name].addmm_(x.T, x)
        return hook

    hooks = [linears[name].register_forward_pre_hook(observe(name)) for name in sums]
    limit = math.inf if model.cfg.step_driven or run.phase != "calibration" \
        else model.cfg.max_wallclock_seconds
    try:
        for batch in range(run.rank, num_batches, run.world_size):
            start = run.training_clock.elapsed()
            input_ids, _ = rows.batch(first_row + batch * CALIBRATION_ROWS, CALIBRATION_ROWS)
            model.hidden(run.put(input_ids))
            seen += input_ids.numel()
            run.settle()
            end = run.training_clock.elapsed()
            if end + 2 * (end - start) > limit:  # another could end too late
                break
    finally:
        for hook in hooks:
            hook.remove()
    run.add_up([seen, *sums.values()])
    run.calibration_tokens = int(seen.item())
    return {name: total / seen for name, total in sums.items()}


def calibration_reserve(batch_seconds: float, run: Run) -> float:
    """Seconds of the training budget to keep for collecting Hessians, from the measured cost."""
    share = math.ceil(run.cfg.gptq_calib_batches / run.world_size)
    reserve = min(1.2 * share * batch_seconds, 0.5 * run.cfg.max_wallclock_seconds)
    run.log("calibration reserve:{seconds:.1f}s batches:{batches}", "reserve", seconds=reserve,
            batches=run.cfg.gptq_calib_batches)
    return reserve


def calibrate(model: GPT, rows: TrainingRows, steps: int, run: Run) -> dict[str, Tensor]:
    """Hessians on training rows after the last trained one, inside the training budget."""
    run.phase = "calibration"
    with run.training_clock.running():
        hessians = collect_hessians(model, rows, steps * run.cfg.rows_per_step,
                                    run.cfg.gptq_calib_batches, run)
    used = run.agree(run.training_clock.elapsed())
    run.log("gptq:calibrated tokens:{tokens} train_time:{ms:.0f}ms", "calibrated",
            tokens=run.calibration_tokens, ms=1e3 * used)
    if used > run.cfg.max_wallclock_seconds and not run.cfg.step_driven:
        run.mark_ineligible(f"training and calibration took {used:.1f} s")
    return hessians


@torch.no_grad()
def quantize(model: GPT, hessians: dict[str, Tensor], run: Run) -> dict[str, Stored]:
    """Every parameter as it will be stored: GPTQ for linears, nearest for tables, else fp16."""
    run.phase = "quantization"
    stored, fallbacks, objective = {}, 0, 0.0
    parameters = dict(model.named_parameters())
    # Factorisations and float64 sums are not to be had on every other device.
    device = run.device if run.device.type == "cuda" else torch.device("cpu")
    with run.progress(len(parameters), "tensor", "quantizing") as bar:
        for name, p in parameters.items():
            W, bits = p.detach().float().to(device), bits_of(model.cfg, name, p)
            if not W.half().isfinite().all():
                raise FloatingPointError(f"{name} is not finite, or too large for fp16")
            H = hessians.get(hessian_source(name.removesuffix(".weight")))
            if bits and H is not None:
                H = H.to(device)
                try:
                    stored[name] = gptq(W, H, bits, model.cfg.gptq_block_size)
                except torch.linalg.LinAlgError:
                    stored[name], fallbacks = round_to_nearest(W, bits), fallbacks + 1
                objective += weighted_error(W, stored[name], H)
            elif bits:
                stored[name] = int8_rows(W) if bits == 8 else round_to_nearest(W, bits)
            else:
                stored[name] = Stored(W.half())
            bar.update()
    run.log("gptq:quantized matrices:{matrices} fallbacks:{fallbacks} objective:{objective:.6g}",
            "quantized", matrices=sum(1 for s in stored.values() if s.scale is not None),
            fallbacks=fallbacks, objective=objective)
    return {name: Stored(s.values.cpu(), None if s.scale is None else s.scale.cpu())
            for name, s in stored.items()}


# =================================================================================================
# Artifact
# One file: an uncompressed prelude (magic, version, codec, body length, sha256 of the rest), then
# one compressed body of JSON header, integers, floats. A reader trusts none of it.
# =================================================================================================

ARTIFACT_MAGIC, ARTIFACT_VERSION, CODEC_ZSTD = b"TINYGPT\n", 1, 1
PRELUDE = struct.Struct("<8sHHQ32s")  # magic, version, codec, body bytes, sha256 of the rest
ZSTD_LEVEL = 22
MAX_ARTIFACT_BYTES, MAX_BODY_BYTES, MAX_HEADER_BYTES = 1 << 28, 1 << 30, 1 << 20
STORAGE_SETTINGS = ("bits", "int8_keep_float_max_numel")
EVALUATION_SETTINGS = ("eval_seq_len", "eval_stride", "sliding", "eval_batch_seqs",
                       "eval_truncate")


def model_settings() -> list[str]:
    """Settings that an artifact decides: what the model is and how it was stored."""
    return [f.name for f in fields(Config) if f.metadata["group"] == "Model"] + \
        list(STORAGE_SETTINGS)


def storage_order(name: str) -> tuple[str, list[int]]:
    """Sort key that puts the same matrix of all layers side by side, which compresses best."""
    return re.sub(r"\d+", "", name), [int(digits) for digits in re.findall(r"\d+", name)]


def artifact_header(cfg: Config, val: Validation) -> dict:
    """What rebuilding the model and repeating the evaluation takes."""
    return {"settings": {name.upper(): show_setting(getattr(cfg, name))
                         for name in (*model_settings(), *EVALUATION_SETTINGS)},
            "tokenizer": val.tokenizer_sha256, "validation": val.fingerprint}


def encode_artifact(header: dict, stored: dict[str, Stored]) -> bytes:
    """The artifact's bytes; the same header and tensors always give the same bytes."""
    names = sorted(stored, key=storage_order)
    tensors = [[name, int(stored[name].scale is not None), *stored[name].values.shape]
               for name in names]
    text = json.dumps({**header, "tensors": tensors}, sort_keys=True, separators=(",", ":"))
    integers = [stored[name].values for name in names if stored[name].scale is not None]
    floats = [stored[name].values if stored[name].scale is None else stored[name].scale
              for name in names]
    body = b"".join([struct.pack("<I", len(text)), text.encode(),
                     *(q.numpy().astype("<i1").tobytes() for q in integers),
                     *(x.numpy().astype("<f2").tobytes() for x in floats)])
    packed = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(body)
    return PRELUDE.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, CODEC_ZSTD, len(body),
                        hashlib.sha256(packed).digest()) + packed


def unpack_body(blob: bytes) -> bytes:
    """The decompressed body of an artifact; raises Refusal before trusting any length in it."""
    if len(blob) < PRELUDE.size or blob[:8] != ARTIFACT_MAGIC:
        raise Refusal("not an artifact of train_gpt.py (its first bytes are wrong)")
    _, version, codec, body_bytes, digest = PRELUDE.unpack_from(blob)
    packed = blob[PRELUDE.size :]
    if (version, codec) != (ARTIFACT_VERSION, CODEC_ZSTD):
        raise Refusal(f"artifact version {version}, codec {codec}: this train_gpt.py reads "
                      f"version {ARTIFACT_VERSION}, codec {CODEC_ZSTD}")
    if hashlib.sha256(packed).digest() != digest:
        raise Refusal("the artifact is damaged (its sha256 does not match); copy it again")
    try:
        if body_bytes > MAX_BODY_BYTES or zstandard.frame_content_size(packed) != body_bytes:
            raise Refusal(f"the artifact's body length {body_bytes:,} is not that of its data, or "
                          f"above the bound of {MAX_BODY_BYTES:,} bytes")
        return zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Refusal(f"the artifact's body does not decompress ({error})") from None


def decode_artifact(blob: bytes) -> tuple[dict, dict[str, Stored]]:
    """Header and tensors of an artifact; raises Refusal for anything malformed."""
    body = unpack_body(blob)
    try:
        (header_bytes,) = struct.unpack_from("<I", body)
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"it is longer than {MAX_HEADER_BYTES:,} bytes")
        header = json.loads(body[4 : 4 + header_bytes])
        texts = [header["tokenizer"], header["validation"], *header["settings"].values()]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a setting or fingerprint is not text")
        return header, cut_payload(body, 4 + header_bytes, header["tensors"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise Refusal(f"the artifact's header is malformed ({error!r})") from None


def cut_payload(body: bytes, start: int, tensors: list) -> dict[str, Stored]:
    """Cut integers and floats into the header's tensors, each [name, is integer, *shape].

    Raises ValueError or TypeError for a shape, name or value that cannot be.
    """
    sizes = []
    for name, is_integer, *shape in tensors:
        whole = all(type(n) is int and 0 <= n <= MAX_BODY_BYTES for n in shape)
        if type(name) is not str or len(shape) > 2 or not whole or (is_integer and len(shape) < 2):
            raise ValueError(f"tensor {name!r} of shape {shape!r}")
        sizes.append((math.prod(shape), shape[0] if is_integer else math.prod(shape)))
    q_at = start
    x_at = start + sum(size for (_, is_integer, *_), (size, _) in zip(tensors, sizes, strict=True)
                       if is_integer)
    if x_at + 2 * sum(floats for _, floats in sizes) != len(body):
        raise ValueError("the tensors do not add up to the body")
    stored = {}
    for (name, is_integer, *shape), (size, floats) in zip(tensors, sizes, strict=True):
        x = torch.from_numpy(np.frombuffer(body, "<f2", floats, x_at).astype(np.float16))
        x_at += 2 * floats
        if name in stored or not x.isfinite().all():
            raise ValueError(f"tensor {name!r} is there twice or is not finite")
        if is_integer:
            q = torch.from_numpy(np.frombuffer(body, "<i1", size, q_at).astype(np.int8))
            q_at += size
            stored[name] = Stored(q.view(shape), x)
        else:
            stored[name] = Stored(x.view(shape))
    return stored


def read_artifact(path: Path) -> tuple[dict, dict[str, Stored]]:
    """Header and tensors of the file; raises Refusal if it is missing, huge or malformed."""
    if not path.is_file():
        raise Refusal(f"{path}: no such artifact")
    if path.stat().st_size > MAX_ARTIFACT_BYTES:
        raise Refusal(f"{path} has {path.stat().st_size:,} bytes; artifacts are read up to "
                      f"{MAX_ARTIFACT_BYTES:,}")
    try:
        return decode_artifact(path.read_bytes())
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal}") from None


def rebuild_model(cfg: Config, stored: dict[str, Stored], run: Run) -> GPT:
    """The model an artifact holds, on the run's device; raises Refusal if names or shapes differ.

    The empty model is laid out without memory first, so that a lying header allocates nothing.
    """
    with torch.device("meta"):
        model = GPT(cfg, pick_attention(cfg, run.device)[1], run.dtype)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if expected != {name: tuple(s.values.shape) for name, s in stored.items()}:
        raise Refusal("the artifact's tensors are not those of the model its settings describe")
    model.load_state_dict({name: s.restore() for name, s in stored.items()}, assign=True)
    return model.to(run.device)


def export(model: GPT, hessians: dict[str, Tensor], val: Validation, run: Run) -> bytes:
    """Quantise on rank 0, write artifact.bin, and return what can be read back, on all ranks."""
    blob = b""
    if run.is_main:
        stored = quantize(model, hessians, run)
        run.phase = "export"
        path = run.folder / "artifact.bin"
        write_file(path, encode_artifact(artifact_header(run.cfg, val), stored))
        blob = path.read_bytes()
        log_sizes(stored, run)
        total, limit = len(run.source) + len(blob), run.cfg.artifact_limit_bytes
        label = f"{grid_label(run.cfg, stored)}+zstd"
        run.log(f"Serialized model {label}: {len(blob)} bytes")
        run.log(f"Code size: {len(run.source)} bytes")
        run.log("Total submission size {label}: {total} bytes limit:{limit} left:{left}",
                "artifact", label=label, model_bytes=len(blob), code_bytes=len(run.source),
                total=total, limit=limit, left=limit - total,
                sha256=hashlib.sha256(blob).hexdigest())
        if total > limit:
            run.mark_ineligible(f"code and artifact have {total} bytes, {total - limit} over "
                                f"ARTIFACT_LIMIT_BYTES={limit}")
    return run.share(blob)


def log_sizes(stored: dict[str, Stored], run: Run) -> None:
    """Log what each role takes: elements, and the order-0 entropy of its integers in bytes."""
    for role in ROLES:
        mine = [s for name, s in stored.items() if role_of(name) == role]
        integers = [s.values.flatten() for s in mine if s.scale is not None]
        counts = torch.bincount(torch.cat(integers).int() + 128).double() if integers \
            else torch.ones(1)
        share = counts[counts > 0] / counts.sum()
        entropy = float(-(share * share.log2()).sum() * sum(map(len, integers)) / 8)
        floats = sum(s.values.numel() if s.scale is None else len(s.scale) for s in mine)
        run.log("size {role} tensors:{tensors} integers:{integers} entropy_bytes:{entropy:.0f} "
                "float_bytes:{floats}", "size", role=role, tensors=len(mine),
                integers=sum(map(len, integers)), entropy=entropy, floats=2 * floats)


def grid_label(cfg: Config, stored: dict[str, Stored]) -> str:
    """How log lines call the artifact's block matrices."""
    integers = any(s.scale is not None for name, s in stored.items() if role_of(name) == "mlp")
    return f"int{cfg.bits_by_role['mlp']}" if integers else "fp16"


# =================================================================================================
# Evaluation
# Windows are data: (start, first scored, end of scored), in targets. One loop scores any of
# them. Batches are formed before they are dealt to ranks, so no world size changes the score.
# =================================================================================================


@dataclass(frozen=True)
class EvalResult:
    """Sums over the scored targets, and what was scored."""

    name: str
    nats: float
    targets: int
    num_bytes: int
    seconds: float

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nats / self.targets

    @property
    def bpb(self) -> float:
        """Bits per byte: nats / (ln 2 * bytes), both over the same targets."""
        return self.nats / (math.log(2) * self.num_bytes)


def windows(num_targets: int, seq_len: int, stride: int) -> np.ndarray:
    """Windows that score each of `num_targets` targets once: int64 (windows, 3).

    A row is (start, first scored, end of scored): the window reads targets start to
    start + seq_len and scores a part of them. Stride 0 gives chunks side by side, the last one
    short. Otherwise windows start at 0, stride, 2 stride, ...; each scores what is not yet
    scored, and the last is anchored at the end.
    """
    if stride == 0 or num_targets <= seq_len:
        starts = np.arange(0, num_targets, seq_len)
        return np.stack([starts, starts, np.minimum(starts + seq_len, num_targets)], axis=1)
    last = num_targets - seq_len
    starts = np.unique(np.append(np.arange(0, last, stride), last))
    ends = starts + seq_len
    return np.stack([starts, np.concatenate([[0], ends[:-1]]), ends], axis=1)


def window_batch(val: Validation, rows: np.ndarray, num_targets: int, seq_len: int) -> tuple:
    """Input ids, target ids, scored mask, bytes of the windows `rows`: (B, T) each."""
    at = rows[:, :1] + np.arange(seq_len)
    scored = (at >= rows[:, 1:2]) & (at < rows[:, 2:])
    at = np.minimum(at, num_targets - 1)  # a short window is padded; causality keeps it harmless
    return (torch.from_numpy(val.tokens[at].astype(np.int64)),
            torch.from_numpy(val.tokens[at + 1].astype(np.int64)),
            torch.from_numpy(scored), torch.from_numpy(val.target_bytes[at].astype(np.int64)))


@torch.no_grad()
def evaluate(name: str, forward: Forward, model: GPT, val: Validation, run: Run,
             stride: int = 0) -> EvalResult:
    """Score the validation split in windows of EVAL_SEQ_LEN; stride 0 for chunks.

    Sums are float64, one row a batch, added up in the order of batches on every rank.
    """
    cfg, start, num_targets = run.cfg, time.perf_counter(), val.num_targets(run.cfg)
    spans = windows(num_targets, cfg.eval_seq_len, stride)
    num_batches = -(-len(spans) // cfg.eval_batch_seqs)
    unscored = np.repeat(spans[-1:] * [1, 0, 0], num_batches * cfg.eval_batch_seqs - len(spans), 0)
    batches = np.concatenate([spans, unscored]).reshape(num_batches, cfg.eval_batch_seqs, 3)
    sums = torch.zeros(num_batches, 3, dtype=torch.float64)
    with run.progress(num_batches, "batch", name) as bar:
        for index in range(run.rank, num_batches, run.world_size):
            input_ids, target_ids, scored, num_bytes = window_batch(
                val, batches[index], num_targets, cfg.eval_seq_len)
            nats = forward(model, run.put(input_ids), run.put(target_ids), False)
            sums[index] = torch.stack([(nats.cpu().double() * scored).sum(),
                                       scored.sum().double(), (num_bytes * scored).sum().double()])
            bar.update(run.world_size)
    run.add_up([sums])
    nats, targets, num_bytes = sums.sum(0).tolist()
    return EvalResult(name, nats, int(targets), int(num_bytes), time.perf_counter() - start)


def report(label: str, result: EvalResult, run: Run, step: int = 0) -> None:
    """Log a score under what was scored, exact to eight decimals.

    Raises FloatingPointError if it is not finite.
    """
    if not math.isfinite(result.nats):
        raise FloatingPointError(f"{result.name}: the loss is {result.nats}")
    run.log("{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} name:{name} targets:{targets} "
            "bytes:{num_bytes} eval_time:{ms:.0f}ms", "eval", label=label, name=result.name,
            step=step, val_loss=result.loss, val_bpb=result.bpb, targets=result.targets,
            num_bytes=result.num_bytes, ms=1e3 * result.seconds)


def score_artifact(cfg: Config, stored: dict[str, Stored], val: Validation, forward: Forward,
                   run: Run, chunked: bool) -> list[EvalResult]:
    """Rebuild the model from an artifact's tensors and score it; the last is the headline."""
    run.phase, results, label = "scoring the artifact", [], grid_label(cfg, stored)
    with run.scoring_clock.running():
        model = rebuild_model(cfg, stored, run)
        if chunked or not cfg.eval_stride:
            results.append(evaluate("artifact_chunked", forward, model, val, run))
            report(f"final_{label}_roundtrip_exact", results[-1], run)
        if cfg.eval_stride:
            results.append(evaluate("artifact_sliding", forward, model, val, run, cfg.eval_stride))
            report(f"final_{label}_sliding_window_exact", results[-1], run)
    if run.scoring_clock.elapsed() > cfg.eval_wallclock_seconds:
        run.mark_ineligible(f"scoring took {run.scoring_clock.elapsed():.0f} s, "
                            f"EVAL_WALLCLOCK_SECONDS={cfg.eval_wallclock_seconds:.0f}")
    return results


def announce_scoring(batch_seconds: float, val: Validation, run: Run) -> None:
    """Warn before scoring starts if the measured speed says that it will pass its budget."""
    cfg, targets = run.cfg, val.num_targets(run.cfg)
    passes = [0, cfg.eval_stride] if cfg.eval_stride else [0]
    batches = sum(-(-len(windows(targets, cfg.eval_seq_len, stride)) // cfg.eval_batch_seqs)
                  for stride in passes)
    seconds = batch_seconds * math.ceil(batches / run.world_size)
    run.log("scoring expected:{seconds:.0f}s budget:{budget:.0f}s", seconds=seconds,
            budget=cfg.eval_wallclock_seconds)
    if seconds > cfg.eval_wallclock_seconds:
        run.log("warning: scoring will pass EVAL_WALLCLOCK_SECONDS; it runs to the end all the "
                "same, and the run will not be eligible as a record")


# =================================================================================================
# Main
# The story of a run, and the verbs that do less.
# =================================================================================================


def verb_train(cfg: Config, notes: list[str]) -> int:
    """Train, export, and score the exported model; returns the exit code."""
    with Run.start(cfg) as run:
        with run.together():
            rows, val = TrainingRows(cfg), load_validation(cfg)
            kernel_name, kernel = pick_attention(cfg, run.device)
        run.open_folder()
        run.log_header(notes)
        model = GPT(cfg, kernel, run.dtype)
        initialize(model, cfg)
        run.copy_from_main(model.to(run.device))
        log_work(model, rows, val, kernel_name, run)
        forward = make_forward(run)
        calibration_seconds, eval_seconds = prime(forward, model, rows, run)
        reserve = calibration_reserve(calibration_seconds, run)
        model, steps = train(forward, model, rows, val, reserve, run)
        hessians = calibrate(model, rows, steps, run)
        run.phase = "scoring the float model"
        float_result = evaluate("float_chunked", forward, model, val, run)
        report("DIAGNOSTIC post_ema" if cfg.avg_mode == "ema" else "DIAGNOSTIC", float_result, run)
        blob = export(model, hessians, val, run)
        announce_scoring(eval_seconds, val, run)
        scores = score_artifact(cfg, decode_artifact(blob)[1], val, forward, run, chunked=True)
        log_activity(run)
        total = len(run.source) + len(blob)
        log_summary(model, steps, len(blob), [float_result, *scores], run)
        if total > cfg.artifact_limit_bytes:
            run.log(f"error: code and artifact have {total:,} bytes, ARTIFACT_LIMIT_BYTES="
                    f"{cfg.artifact_limit_bytes:,}; take fewer parameters or BITS")
            return EXIT_OVER_LIMIT
        return 0


def log_work(model: GPT, rows: TrainingRows, val: Validation, kernel: str, run: Run) -> None:
    """Log what is about to be trained, on what."""
    cfg, first_xsa = run.cfg, run.cfg.num_layers - run.cfg.xsa_last_n
    machine = torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type
    if "H100" not in machine or run.world_size != 8:
        run.mark_ineligible(f"ran on {run.world_size} x {machine}, the track asks for 8 x H100")
    for reason in static_ineligibility(cfg):
        run.mark_ineligible(reason)
    run.log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={cfg.tokenizer_path}")
    run.log("train_loader:dataset:{dataset} train_shards:{shards} tokens:{tokens}", "train_data",
            dataset=Path(cfg.data_path).name, shards=len(rows.shards), tokens=rows.num_tokens)
    run.log("val_loader:shards pattern={pattern} tokens:{tokens} documents:{documents} "
            "bytes:{num_bytes} recorded_bytes:{recorded} fingerprint:{fingerprint}", "val_data",
            tokens=len(val.tokens), pattern=f"{cfg.data_path}/fineweb_val_*.bin",
            documents=val.documents, num_bytes=int(val.target_bytes.sum(dtype=np.int64)),
            recorded=val.recorded_bytes, fingerprint=val.fingerprint)
    run.log("model_params:{params}", "model", params=sum(p.numel() for p in model.parameters()))
    run.log(f"XSA:last_{cfg.xsa_last_n} active_layers:{list(range(first_xsa, cfg.num_layers))}")
    run.log(f"world_size:{run.world_size} rows_per_step:{cfg.rows_per_step} "
            f"micro_batch_rows:{max((n for _, n in micro_batches(cfg, run)), default=0)}")
    run.log(f"attention_mode:gqa num_heads:{cfg.num_heads} num_kv_heads:{cfg.num_kv_heads} "
            f"kernel:{kernel}")
    run.log(f"train_batch_tokens:{cfg.train_batch_tokens} train_seq_len:{cfg.train_seq_len} "
            f"iterations:{cfg.iterations} warmup_steps:{cfg.warmup_steps} "
            f"max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}")
    for line in routing_table(cfg, model):
        run.log(line)
    run.log(f"seed:{cfg.seed}")


def routing_table(cfg: Config, model: nn.Module) -> Iterator[str]:
    """One line a parameter group: how many parameters learn how."""
    for group in route_parameters(cfg, model):
        yield (f"{sum(p.numel() for p in group['params']):>12,} parameters  {group['optimizer']}  "
               f"lr:{group['base_lr']:<8g} wd:{group['weight_decay']:<6g} {group['route']}")


def log_summary(model: GPT, steps: int, model_bytes: int, scores: list[EvalResult],
                run: Run) -> None:
    """The last lines of the log: what was trained, its size, its scores, where it is."""
    cfg = run.cfg
    if run.device.type == "cuda":
        run.log(f"peak memory allocated: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB "
                f"reserved: {torch.cuda.max_memory_reserved() / 2**20:.0f} MiB")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    run.log("peak memory resident: {mib:.0f} MiB", "memory",
            mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
    run.log("eligible:{eligible} {reasons}", "eligibility", eligible=int(not run.ineligible),
            reasons="; ".join(run.ineligible))
    run.log("params:{params} steps:{steps} tokens_per_second:{rate:.0f} "
            "train_seconds:{seconds:.1f} eval_seconds:{eval_seconds:.1f}", "summary",
            params=sum(p.numel() for p in model.parameters()), steps=steps,
            rate=steps * cfg.train_batch_tokens / run.trained_seconds,
            seconds=run.training_clock.elapsed(), eval_seconds=run.scoring_clock.elapsed())
    total = len(run.source) + model_bytes
    run.log(f"artifact {model_bytes:,} bytes + code {len(run.source):,} = {total:,} of "
            f"{cfg.artifact_limit_bytes:,} bytes, {cfg.artifact_limit_bytes - total:,} left")
    for score in scores[:-1]:
        run.log(f"{score.name} val_bpb:{score.bpb:.8f}")
    run.log("val_bpb:{val_bpb:.8f} val_loss:{val_loss:.8f} ({name}, stride {stride}, {sliding})",
            "final", val_bpb=scores[-1].bpb, val_loss=scores[-1].loss, name=scores[-1].name,
            stride=cfg.eval_stride, sliding=cfg.sliding)
    run.log(f"log: {run.folder}/log.txt")
    run.log(f"artifact: {run.folder}/artifact.bin")


def static_ineligibility(cfg: Config) -> list[str]:
    """Settings that keep a run from standing as a record of the 10-minute, 16 MB track."""
    return [reason for wrong, reason in (
        (cfg.step_driven, "MAX_WALLCLOCK_SECONDS=0: the run is step-driven"),
        (cfg.max_wallclock_seconds > 600, "MAX_WALLCLOCK_SECONDS is above 600"),
        (cfg.eval_wallclock_seconds > 600, "EVAL_WALLCLOCK_SECONDS is above 600"),
        (cfg.artifact_limit_bytes > 16_000_000, "ARTIFACT_LIMIT_BYTES is above 16,000,000"),
        (not Path(cfg.data_path).name.startswith("fineweb10B_"), "the text is not FineWeb"),
    ) if wrong]


def verb_check(cfg: Config, notes: list[str]) -> int:
    """Look at settings, data and tokenizer as a run would, and do nothing else."""
    rows, val = TrainingRows(cfg), load_validation(cfg)
    pick_attention(cfg, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if cfg.run_id and Path(cfg.runs_dir, cfg.run_id).exists():
        raise Refusal(f"RUN_ID={cfg.run_id}: {Path(cfg.runs_dir, cfg.run_id)} exists already")
    for note in notes:
        print(note)
    print(f"ok: {rows.num_tokens:,} training tokens in {len(rows.shards)} shards, "
          f"{len(val.tokens):,} validation tokens in {val.documents:,} documents")
    return 0


def verb_plan(cfg: Config, notes: list[str]) -> int:
    """Say what a run would do, without data and without training."""
    with torch.device("meta"):
        model = GPT(cfg)
    for note in notes:
        print(note)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    print(*routing_table(cfg, model), sep="\n")
    by_bits = Counter()
    for name, p in model.named_parameters():
        by_bits[bits_of(cfg, name, p)] += p.numel()
    print("stored as: " + ", ".join(f"{count:,} at {f'int{bits}' if bits else 'fp16'}"
                                    for bits, count in sorted(by_bits.items())))
    print(f"a step: {cfg.train_batch_tokens:,} tokens, {cfg.rows_per_step:,} rows of "
          f"{cfg.train_seq_len:,}")
    for line in schedule_dates(cfg):
        print(line)
    reasons = static_ineligibility(cfg)
    print("eligible as a record: " + ("no: " + "; ".join(reasons) if reasons else
                                      "yes, on 8 x H100 within its budgets"))
    return 0


def schedule_dates(cfg: Config) -> Iterator[str]:
    """When each scheduled thing starts, in the unit that drives the run."""
    whole = cfg.iterations if cfg.step_driven else cfg.max_wallclock_seconds
    unit = "steps" if cfg.step_driven else "s"
    yield f"end: {whole:g} {unit}" + (
        "" if cfg.step_driven else f", less the time calibration takes; at most {cfg.iterations:,} "
        "steps")
    yield f"momentum ramp: {cfg.muon_momentum_warmup_start:g} to {cfg.muon_momentum:g} in " \
          f"{cfg.muon_momentum_warmup_steps:,} steps"
    if cfg.warmdown_frac or cfg.step_driven:
        warmdown = cfg.warmdown_frac * whole or min(cfg.warmdown_iters, whole)
        yield f"warmdown ({cfg.warmdown_type}): from {whole - warmdown:g} {unit} on"
        before = f"from {whole - cfg.late_qat_threshold * warmdown:g} {unit} on"
    else:
        yield f"warmdown ({cfg.warmdown_type}): the last {cfg.warmdown_iters:,} steps"
        before = f"the last {cfg.late_qat_threshold * cfg.warmdown_iters:,.0f} steps"
    if cfg.qat_mode == "late":
        yield f"late QAT: {before}" + (
            "" if cfg.warmdown_type == "linear" else " if the warmdown were linear")


def locate_validation(cfg: Config, header: dict) -> Config:
    """Settings pointing at the validation split and tokenizer that an artifact was scored on.

    Looks in DATA_PATH and TOKENIZER_PATH, then under data/; raises Refusal if it finds none.
    """
    for folder in (cfg.data_path, *sorted(glob.glob("data/datasets/*"))):
        with contextlib.suppress(Refusal):
            hashes = read_sidecar(folder)["val_shards"]
            if fingerprint_of([hashes[name] for name in sorted(hashes)]) == header["validation"]:
                break
    else:
        raise Refusal(f"no validation split with fingerprint {header['validation'][:12]} in "
                      f"DATA_PATH={cfg.data_path} or data/datasets/*; make it with data/prepare.py")
    for tokenizer in (cfg.tokenizer_path, *sorted(glob.glob("data/tokenizers/*.model"))):
        if Path(tokenizer).is_file() and sha256_of(Path(tokenizer)) == header["tokenizer"]:
            return replace(cfg, data_path=folder, tokenizer_path=tokenizer)
    raise Refusal(f"no tokenizer with sha256 {header['tokenizer'][:12]} at "
                  f"TOKENIZER_PATH={cfg.tokenizer_path} or in data/tokenizers/")


def verb_eval(path: Path, env: dict[str, str]) -> int:
    """Score an artifact again: the model comes from its header alone."""
    model_names = {name.upper() for name in model_settings()}
    if repeated := sorted(model_names & set(env)):
        raise Refusal(f"{repeated[0]} is set, but --eval takes the model from the artifact: "
                      "unset it")
    header, stored = read_artifact(path)
    expected = model_names | {name.upper() for name in EVALUATION_SETTINGS}
    if wrong := sorted(set(header["settings"]) ^ expected):
        raise Refusal(f"{path}: its header must name the settings of this train_gpt.py; "
                      f"{wrong[0]!r} is not here or missing there")
    cfg, notes = Config.from_env({**header["settings"], **env})
    cfg = locate_validation(cfg, header)
    with Run.start(cfg) as run:
        run.log_header(notes)
        with run.together():
            val = load_validation(cfg)
        score = score_artifact(cfg, stored, val, make_forward(run), run, chunked=False)[-1]
        run.log(f"val_bpb:{score.bpb:.8f} val_loss:{score.loss:.8f} ({score.name}, "
                f"stride {cfg.eval_stride})")
    return 0


def main(arguments: list[str]) -> int:
    """Do what the command line asks; returns the exit code, having said in one line what failed."""
    quiet = int(os.environ.get("RANK", 0)) > 0  # under torchrun one line is enough
    try:
        env = dict(os.environ)
        if arguments[:1] == ["--eval"] and len(arguments) == 2:
            return verb_eval(Path(arguments[1]), env)
        cfg, notes = Config.from_env(env)
        if arguments in (["--help"], ["-h"]):
            print(__doc__, *cfg.listing(), sep="\n")
            print(f"\nPresets: {', '.join(PRESETS)}. * marks what differs from the defaults.")
            return 0
        if arguments == ["--check"]:
            return verb_check(cfg, notes)
        if arguments == ["--plan"]:
            return verb_plan(cfg, notes)
        if arguments:
            raise Refusal(f"arguments {' '.join(arguments)!r}: expected nothing, --help, --check, "
                          "--plan or --eval ARTIFACT; hyperparameters are environment variables")
        return verb_train(cfg, notes)
    except Refusal as refusal:
        if not quiet:
            print(f"error: {refusal}", file=sys.stderr)
        return EXIT_REFUSED
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("error: interrupted; what the run folder holds was kept", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
