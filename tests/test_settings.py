"""What a run can be told, and every way of telling it wrong."""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import asdict, fields
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import environment, launch

from train_gpt import (
    ALIASES,
    PRESETS,
    RETIRED,
    Config,
    Refusal,
    knob_of,
    main,
    parse_setting,
    show_setting,
)

FIELDS = {f.name.upper(): f for f in fields(Config)}
NUMBERS = {name: f for name, f in FIELDS.items() if type(f.default) in (int, float)}
CHOICES = {name: f for name, f in FIELDS.items() if type(f.default) is str and knob_of(f).accepts}

# What mini may set: it is a scale, so it must leave every technique as it finds it.
MINI_MAY_SET = {
    "vocab_size",
    "model_dim",
    "num_heads",
    "num_kv_heads",
    "rope_dims",
    "train_seq_len",
    "eval_seq_len",
    "train_batch_tokens",
    "bigram_dim",
    "ve_dim",
    "bigram_vocab_size",
    "max_wallclock_seconds",
    "warmdown_frac",
    "muon_momentum_warmup_steps",
    "ema_decay",
    "gptq_calib_batches",
    "swa_every",
    "ttt_chunk_tokens",
    "int8_keep_float_max_numel",
    "loader",
    "data_path",
    "tokenizer_path",
    "lr_mult",
    "lora_batch_docs",
    "lora_lanes",
    "lora_phase_docs",
    "lora_phase_row_tokens",
    "lora_phase_chunk_tokens",
}

# Environment names of shells, clusters, containers and libraries. None of them is meant for us.
FOREIGN_NAMES = re.findall(
    r"\w+",
    """
PATH HOME SHELL USER LANG LC_ALL TERM PWD OLDPWD SHLVL _ LS_COLORS EDITOR PAGER DISPLAY HOSTNAME
LOGNAME MAIL TMPDIR TZ XDG_RUNTIME_DIR SSH_AUTH_SOCK SSH_CONNECTION HISTSIZE PS1 LESS COLUMNS LINES
PYTHONPATH PYTHONUNBUFFERED PYTHONHASHSEED VIRTUAL_ENV CONDA_PREFIX CONDA_EXE PIP_INDEX_URL CI
NCCL_NET NCCL_DEBUG NCCL_IB_DISABLE NCCL_SOCKET_IFNAME OMP_NUM_THREADS MKL_NUM_THREADS KMP_AFFINITY
SLURM_JOB_ID SLURM_PROCID SLURM_NTASKS SLURM_NODELIST SLURM_CPUS_PER_TASK SLURMD_NODENAME PMI_RANK
CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_PATH CUDA_LAUNCH_BLOCKING CUDA_DEVICE_ORDER CUDNN_VERSION
CUBLAS_WORKSPACE_CONFIG NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES LD_LIBRARY_PATH LD_PRELOAD
TORCH_HOME TORCH_LOGS TORCH_CUDA_ARCH_LIST TORCH_DISTRIBUTED_DEBUG TORCH_NCCL_ASYNC_ERROR_HANDLING
TORCHINDUCTOR_CACHE_DIR TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT PYTORCH_CUDA_ALLOC_CONF
TRITON_CACHE_DIR RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT
HF_HOME HF_TOKEN HF_ENDPOINT TOKENIZERS_PARALLELISM WANDB_API_KEY WANDB_RUN_ID CC CXX CFLAGS
KUBERNETES_SERVICE_HOST GITHUB_RUN_ID GITHUB_WORKSPACE RUNNER_TEMP JOB_NAME BUILD_ID MODULEPATH
LOADEDMODULES AWS_REGION SM_MODEL_DIR RUNPOD_POD_ID http_proxy HTTPS_PROXY NO_COLOR COLORTERM
""",
)

# A value for each alias that carries its value over.
UNTRANSLATED = {
    "MUON_NS_STEPS": {"7": "7"},
    "MUON_ROW_NORMALIZE": {"1": "1"},
    "QAT_THRESHOLD": {"0.5": "0.5"},
    "BACKOUT_LAMBDA_INIT": {"0.3": "0.3"},
    "SWA_INTERVAL": {"7": "7"},
    "SWA_PCT": {"0.3": "0.3"},
}

# Names in published command lines and scripts that change what is trained, stored or scored.
PUBLISHED_NAMES = re.findall(
    r"\w+",
    """
ATTN_BITS AUX_EMB_BITS AUX_PROJ_MUP EMB_BITS MLP_BITS Q_SYMMETRIC TARGET_BYTES
BACKOUT_ENABLED BACKOUT_INIT BACKOUT_LAMBDA_INIT BETA1 BETA2 ADAM_EPS CACHE_LAYER DTG_ENABLED
EMA_ENABLED GATED_ATTENTION GPTQ_CALIB_SAMPLES GPTQ_RESERVE_MS LATE_QAT LAWA_ENABLED LAWA_FREQ
LAWA_K MILE_CLAMP_MIN MILE_GAMMA MTP_LOSS_WEIGHT MTP_NUM_HEADS MUON_NS_STEPS MUON_QUANT_MOMENTUM
MUON_QUANT_BLOCK_SIZE NO_COMPILE NO_FA3 PRUNE_FRAC PRUNE_PCT QAT_CLIP_PCT QAT_ENABLED QAT_THRESHOLD
SWA_ENABLED SWA_EVERY SWA_INTERVAL SWA_PCT SWA_START_FRAC TARGET_MB TTT_ENABLED TTT_EPOCHS TTT_LR
TTT_CHUNK_TOKENS TTT_FREEZE_BLOCKS TTT_MOMENTUM USE_GPTQ VALUE_RESIDUAL VAL_BATCH_SIZE
""",
)


def given_settings(**env: str) -> Config:
    """The settings of an environment."""
    return Config.from_env(env)[0]


def refusal(env: dict[str, str]) -> str:
    """The one line an environment is refused with, quotes left out."""
    with pytest.raises(Refusal) as caught:
        Config.from_env(env)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).replace("'", "")


def in_range(f) -> st.SearchStrategy:
    """Values that a number accepts."""
    low, high = knob_of(f).accepts
    if isinstance(f.default, float):
        return st.floats(low, high)
    return st.integers(low, 10**12 if high == math.inf else int(high))


# Precedence


def test_environment_wins_over_presets_and_later_presets_over_earlier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PRESETS, "first", {"seed": 1, "warmdown_iters": 1})
    monkeypatch.setitem(PRESETS, "second", {"seed": 2})
    assert given_settings() == Config()
    assert given_settings(PRESET="first") == Config(preset="first", seed=1, warmdown_iters=1)
    assert given_settings(PRESET="first,second").seed == 2
    assert given_settings(PRESET="second,first").seed == 1
    both = given_settings(PRESET="first,second", SEED="3")
    assert (both.seed, both.warmdown_iters) == (3, 1)
    assert given_settings(PRESET="first", MUON_NS_STEPS="7").muon_backend_steps == 7


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_setting_shown_reads_back_as_itself(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(NUMBERS)))
    value = data.draw(in_range(NUMBERS[name]))
    assert parse_setting(name, show_setting(value), NUMBERS[name]) == value


# Refusals


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"MATIRX_LR": "0.1"}, ["MATIRX_LR", "MATRIX_LR"]),
        ({"NUM_LAYER": "9"}, ["NUM_LAYER ", "NUM_LAYERS"]),
        ({"MUONWD": "0.1"}, ["MUONWD", "MUON_WD"]),
        ({"LATE_QATT": "0"}, ["LATE_QATT", "LATE_QAT?"]),
        ({"GPTQ_GRID": "1"}, ["GPTQ_GRID", "did you mean"]),
        ({"EMA_DECAY": "nan"}, ["EMA_DECAY=nan", "0.0 <= value <= 0.999999"]),
        ({"EMA_DECAY": "nan\n"}, ["EMA_DECAY=", "0.999999"]),
        ({"MATRIX_LR": "inf"}, ["MATRIX_LR=inf", "10.0"]),
        ({"MATRIX_LR": "fast"}, ["MATRIX_LR=fast", "a number"]),
        ({"NUM_LAYERS": "nine"}, ["NUM_LAYERS=nine", "a whole number"]),
        ({"NUM_LAYERS": "9.0"}, ["NUM_LAYERS=9.0", "a whole number"]),
        ({"NUM_LAYERS": "0"}, ["NUM_LAYERS=0", "1 <= value <= 64"]),
        ({"NUM_LAYERS": "65"}, ["NUM_LAYERS=65", "1 <= value <= 64"]),
        ({"SEED": ""}, ["SEED=", "a whole number"]),
        ({"TIE_EMBEDDINGS": "False"}, ["TIE_EMBEDDINGS=False", "0 or 1"]),
        ({"ATTENTION": "flash2"}, ["ATTENTION=flash2", "auto, fa3, cudnn, flash, sdpa"]),
        ({"PRESET": "pr1362"}, ["PRESET=pr1362", "pr1361, pr569"]),
        ({"PRESET": "mini,pr1361"}, ["PRESET=mini,pr1361", "last"]),
        ({"PRESET": "pr1361,cpu"}, ["PRESET=pr1361,cpu", "cannot be combined"]),
        # Contradictions
        ({"NUM_HEADS": "7"}, ["MODEL_DIM=512", "NUM_HEADS=7"]),
        ({"NUM_KV_HEADS": "3"}, ["NUM_HEADS=8", "NUM_KV_HEADS=3"]),
        (
            {"OPTIMIZER_ROUTING": "adam", "BIGRAM_VOCAB_SIZE": "0", "VE_ENABLED": "0"},
            ["OPTIMIZER_ROUTING=adam", "BIGRAM_VOCAB_SIZE=0", "VE_ENABLED=0"],
        ),
        ({"ROPE_DIMS": "15"}, ["ROPE_DIMS=15", "even"]),
        ({"ROPE_DIMS": "66"}, ["ROPE_DIMS=66", "NUM_HEADS=8, 64"]),
        ({"ROPE_DIMS": "2"}, ["ROPE_NTK_REF=1024", "ROPE_DIMS=2"]),
        ({"XSA_LAST_N": "12"}, ["XSA_LAST_N=12", "NUM_LAYERS=11"]),
        ({"BIGRAM_VOCAB_SIZE": "1"}, ["BIGRAM_VOCAB_SIZE=1", "0 (off)"]),
        ({"VE_LAYERS": "9,11"}, ["VE_LAYERS=9,11", "NUM_LAYERS=11"]),
        ({"VE_LAYERS": "last"}, ["VE_LAYERS=last", "numbers"]),
        ({"VE_LAYERS": "9,9"}, ["VE_LAYERS=9,9", "distinct"]),
        ({"VE_LAYERS": "-1"}, ["VE_LAYERS=-1", "from 0"]),
        ({"TRAIN_BATCH_TOKENS": "3000"}, ["TRAIN_BATCH_TOKENS=3000", "TRAIN_SEQ_LEN=2048"]),
        ({"EVAL_STRIDE": "2049"}, ["EVAL_STRIDE=2049", "EVAL_SEQ_LEN=2048"]),
        ({"EVAL_BATCH_SEQS": "4097"}, ["EVAL_BATCH_SEQS=4097", "EVAL_SEQ_LEN=2048", "8,388,608"]),
        (
            {"TTT_BATCH_SEQS": "4097", "TTT_MODE": "score_first"},
            ["TTT_BATCH_SEQS=4097", "8,388,608"],
        ),
        ({"BITS": "mlp:6,attn:6,emb:8"}, ["BITS=mlp:6,attn:6,emb:8", "aux"]),
        ({"BITS": "mlp:6,attn:6,emb:8,aux:9"}, ["aux:9", "2 to 8 or fp16"]),
        ({"BITS": "mlp:6,mlp:6,attn:6,emb:8,aux:8"}, ["BITS=", "mlp:6"]),
        (
            {"BITS": "mlp:6,attn:6,emb:8,aux:8,all:8"},
            ["BITS=", "names all", "no tensor of the model"],
        ),
        (
            {"BITS": "mlp:6,attn:6,emb:8,aux:8,blocks.3.attn.c_x:8"},
            ["names blocks.3.attn.c_x", "no tensor of the model"],
        ),
        ({"BITS": "mlp:6,attn:6,emb:8,aux:8,blocks.11.attn.c_k:8"}, ["BITS=", "NUM_LAYERS=11"]),
        ({"CLIP_SIGMAS": "mlp:12,attn:12,emb:20"}, ["CLIP_SIGMAS=mlp:12,attn:12,emb:20", "aux"]),
        ({"CLIP_SIGMAS": "mlp:0,attn:12,emb:20,aux:20"}, ["mlp:0", "a number from 1 to 999"]),
        (
            {"CLIP_SIGMAS": "mlp:12,attn:12,emb:20,aux:20,blocks.11.mlp.fc:8"},
            ["CLIP_SIGMAS=", "NUM_LAYERS=11"],
        ),
        ({"BACKOUT_MODE": "cache", "CACHE_LAYER": "10"}, ["CACHE_LAYER=10", "NUM_LAYERS=11"]),
        (
            {"BACKOUT_MODE": "mid", "NUM_LAYERS": "2", "XSA_LAST_N": "1", "VE_LAYERS": "0"},
            ["BACKOUT_MODE=mid", "NUM_LAYERS=2"],
        ),
        ({"CACHE_LAYER": "-1"}, ["CACHE_LAYER=-1", "0 <= value"]),
        ({"TTT_MODE": "score_first", "EVAL_STRIDE": "0"}, ["TTT_MODE=score_first", "EVAL_STRIDE"]),
        (
            {"TTT_MODE": "score_first", "TTT_FREEZE_BLOCKS": "11"},
            ["TTT_FREEZE_BLOCKS=11", "NUM_LAYERS=11"],
        ),
        ({"RUN_ID": "../elsewhere"}, ["RUN_ID=../elsewhere", "letters"]),
        ({"RUN_ID": ".."}, ["RUN_ID=..", "letters"]),
        ({"RUN_ID": "x" * 300}, ["RUN_ID=", "xxx"]),
    ],
)
def test_refusal_says_what_was_given_and_what_was_expected(env: dict, said: list[str]) -> None:
    message = refusal(env)
    assert all(part in message for part in said), message


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_accepted_between_its_bounds_only(name: str) -> None:
    f, (low, high) = NUMBERS[name], knob_of(NUMBERS[name]).accepts
    beyond = 1 if isinstance(f.default, int) else 1e-3 + 1e-3 * abs(high)
    assert low <= f.default <= high
    assert parse_setting(name, str(low), f) == low
    outside = [str(low - beyond), *(["nan", "inf"] if isinstance(f.default, float) else [])]
    if high != math.inf:
        assert parse_setting(name, str(high), f) == high
        outside.append(str(high + beyond))
    for text in outside:
        with pytest.raises(Refusal, match=f"{name}=.*: expected {low} <= value <= "):
            parse_setting(name, text, f)


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_accepted_by_its_own_names_only(name: str) -> None:
    f = CHOICES[name]
    assert f.default in knob_of(f).accepts
    assert [parse_setting(name, text, f) for text in knob_of(f).accepts] == [*knob_of(f).accepts]
    for text in {"", "None", f.default.upper(), f"{f.default} "} - {*knob_of(f).accepts}:
        with pytest.raises(Refusal, match=f"{name}=.*expected one of {knob_of(f).accepts[0]}"):
            parse_setting(name, text, f)


def test_a_shell_full_of_foreign_names_is_accepted() -> None:
    assert Config.from_env(dict.fromkeys(FOREIGN_NAMES, "1")) == (Config(), [])


def misspelled(name: str) -> st.SearchStrategy[str]:
    """A name itself, or with one letter left out, doubled or changed."""

    def change(at: int, how: int) -> str:
        middle = ("", name[at] * 2, "X", name[at])[how]
        return name[:at] + middle + name[at + 1 :]

    return st.builds(change, st.integers(0, len(name) - 1), st.integers(0, 3))


NEAR_NAMES = st.sampled_from([*FIELDS, *ALIASES, *RETIRED]).flatmap(misspelled)
ODD_VALUES = st.one_of(
    st.sampled_from(
        [
            "",
            "0",
            "1",
            "nan",
            "-inf",
            "1e400",
            "False",
            "mini",
            "off",
            "mlp:6,attn:6",
            "nan\n",
            "2e9\r",
            "9" * 5000,
            "\u0663",
            "1_0",
            "..",
            ",",
            "0,,1",
            "mlp:fp16",
        ]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(NEAR_NAMES, ODD_VALUES, max_size=3))
def test_any_environment_is_read_or_refused_in_one_line(env: dict[str, str]) -> None:
    try:
        cfg, notes = Config.from_env(env)
    except Refusal as refused:
        assert len(str(refused).splitlines()) == 1
    else:
        for name in set(env) & set(FIELDS):
            assert getattr(cfg, name.lower()) == parse_setting(name, env[name], FIELDS[name])
        ours = {*FIELDS, *ALIASES, *RETIRED}
        assert len(notes) >= len(set(env) & {*ALIASES, *RETIRED})
        assert len(notes) <= len(set(env) & {*ALIASES, *RETIRED}) + len(set(env) - ours)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_accepted_model_can_be_planned(data: st.DataObject) -> None:
    env = {"NUM_LAYERS": str(data.draw(st.integers(1, 4))), "VE_LAYERS": "0", "XSA_LAST_N": "1"}
    for name in ("MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS"):
        env[name] = str(2 ** data.draw(st.integers(0, 5)))
    for name in ("ROPE_DIMS", "ROPE_NTK_REF", "BIGRAM_VOCAB_SIZE"):
        env[name] = str(data.draw(st.integers(0, 8)))
    for name in ("TIE_EMBEDDINGS", "VE_ENABLED", "SMEAR_ENABLED"):
        env[name] = data.draw(st.sampled_from("01"))
    try:
        Config.from_env(env)
    except Refusal:
        return
    with environment(**env):
        assert main(["--plan"]) == 0


# Names that others published


@pytest.mark.parametrize(
    ("alias", "theirs", "name", "ours"),
    [
        (alias, theirs, name, ours)
        for alias, (name, values) in ALIASES.items()
        for theirs, ours in (values or UNTRANSLATED[alias]).items()
        if ours is not None
    ],
)
def test_an_alias_sets_our_setting_and_is_noted(
    alias: str, theirs: str, name: str, ours: str
) -> None:
    cfg, notes = Config.from_env({alias: theirs})
    assert getattr(cfg, name.lower()) == parse_setting(name, ours, FIELDS[name])
    assert len(notes) == 1
    assert f"{alias}={theirs}" in notes[0]
    assert f"{name}={ours}" in notes[0]
    assert Config.from_env({alias: theirs, name: ours})[0] == cfg


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"LATE_QAT": "0", "QAT_MODE": "late"}, ["LATE_QAT=", "QAT_MODE=off", "QAT_MODE=late"]),
        (
            {"EMA_ENABLED": "1", "AVG_MODE": "none"},
            ["EMA_ENABLED=", "AVG_MODE=ema", "AVG_MODE=none"],
        ),
        (
            {"MUON_NS_STEPS": "4", "MUON_BACKEND_STEPS": "5"},
            ["MUON_NS_STEPS=", "MUON_BACKEND_STEPS=5"],
        ),
        ({"NO_COMPILE": "1", "COMPILE": "1"}, ["NO_COMPILE=", "COMPILE=0", "COMPILE=1"]),
        ({"LATE_QAT": "True"}, ["LATE_QAT=True", "0, 1", "QAT_MODE"]),
        ({"QAT_THRESHOLD": "nan"}, ["LATE_QAT_THRESHOLD=nan", "0.0 <= value <= 1.0"]),
        ({"MTP_NUM_HEADS": "2"}, ["MTP_NUM_HEADS=2", "0"]),
        ({"DTG_ENABLED": "1"}, ["DTG_ENABLED=1", "0"]),
        ({"TARGET_MB": "15.9"}, ["TARGET_MB=15.9", "0"]),
        (
            {"SWA_ENABLED": "1", "EMA_ENABLED": "1"},
            ["SWA_ENABLED=1", "AVG_MODE=swa", "AVG_MODE=ema"],
        ),
        ({"VRL": "1", "VALUE_RESIDUAL": "1"}, ["VRL_MODE=add", "VRL_MODE=mix"]),
        (
            {"BACKOUT_ENABLED": "1", "BACKOUT_MODE": "cache"},
            ["BACKOUT_MODE=mid", "BACKOUT_MODE=cache"],
        ),
    ],
)
def test_an_alias_that_contradicts_and_a_technique_not_here_are_refused(
    env: dict, said: list[str]
) -> None:
    message = refusal(env)
    assert all(part in message for part in said), message


@pytest.mark.parametrize("name", RETIRED)
def test_a_technique_not_here_is_accepted_where_it_is_off(name: str) -> None:
    for value in RETIRED[name] or ("0", "0.25", "anything"):
        cfg, notes = Config.from_env({name: value})
        assert cfg == Config()
        assert len(notes) == 1
        assert f"{name}={value}" in notes[0]


def test_the_tables_of_names_do_not_contradict_each_other() -> None:
    assert not set(ALIASES) & set(FIELDS)
    assert not set(RETIRED) & {*FIELDS, *ALIASES}
    for name, values in ALIASES.values():
        for ours in (values or {}).values():
            assert ours is None or parse_setting(name, ours, FIELDS[name]) is not None


def test_switching_off_what_is_not_on_changes_nothing() -> None:
    for others in ({}, {"AVG_MODE": "none"}, {"PRESET": "pr334"}):
        cfg, notes = Config.from_env({"SWA_ENABLED": "0", **others})
        assert cfg == given_settings(**others)
        assert "SWA_ENABLED=0" in notes[0]


@pytest.mark.parametrize(
    ("env", "meant"),
    [
        ({"EMA_ENABLED": "0", "SWA_ENABLED": "1"}, {"AVG_MODE": "swa"}),
        ({"LATE_QAT": "0", "QAT_ENABLED": "1"}, {"QAT_MODE": "always"}),
        ({"LATE_QAT": "1", "QAT_ENABLED": "0"}, {"QAT_MODE": "late"}),
        ({"LATE_QAT": "0", "QAT_ENABLED": "0"}, {"QAT_MODE": "off"}),
        ({"VRL": "0", "VALUE_RESIDUAL": "1"}, {"VRL_MODE": "mix"}),
        ({"NO_COMPILE": "0", "TORCH_COMPILE_DISABLE": "1"}, {"COMPILE": "0"}),
    ],
)
def test_a_switch_that_is_off_gives_way_to_one_that_is_on(env: dict, meant: dict) -> None:
    cfg, notes = Config.from_env(env)
    assert cfg == given_settings(**meant)
    assert len(notes) == 2


def test_no_published_name_is_passed_over_in_silence() -> None:
    def ignored(env: dict[str, str]) -> bool:
        with contextlib.suppress(Refusal):
            return Config.from_env(env) == (Config(), [])
        return False

    assert [
        name
        for name in PUBLISHED_NAMES
        if name not in FIELDS and any(ignored({name: x}) for x in "01")
    ] == []


# Presets


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_settings_and_values_they_accept(preset: str) -> None:
    for name, value in PRESETS[preset].items():
        if isinstance(value, Fraction):
            assert type(FIELDS[name.upper()].default) is int
            continue
        assert parse_setting(name.upper(), show_setting(value), FIELDS[name.upper()]) == value
        assert type(value) is type(FIELDS[name.upper()].default)
    fixed = {n: v for n, v in PRESETS[preset].items() if not isinstance(v, Fraction)}
    ours = asdict(given_settings(PRESET=preset))
    scaled = {n: ours[n] for n, v in PRESETS[preset].items() if isinstance(v, Fraction)}
    assert ours == {**asdict(Config()), **fixed, **scaled, "preset": preset}
    assert bool(scaled) == (preset == "mini")


@pytest.mark.parametrize("system", [name for name in PRESETS if name.startswith("pr")])
def test_mini_scales_a_systems_own_sizes(system: str) -> None:
    """In proportion: 64 rotated dimensions of 64 stay all of 32, and what is off stays off."""
    whole, mini = given_settings(PRESET=system), given_settings(PRESET=f"{system},mini")
    assert mini.rotary_dims / mini.head_dim == whole.rotary_dims / whole.head_dim
    assert mini.bigram_vocab_size == round(whole.bigram_vocab_size / 3)
    assert mini.bigram_dim == round(whole.bigram_dim * 2 / 7)
    assert mini.swa_every == max(1, round(whole.swa_every / 10))
    assert given_settings(PRESET=system + ",mini", BIGRAM_VOCAB_SIZE="0").bigram_vocab_size == 0


def test_a_warmdown_in_steps_that_is_asked_for_comes_before_a_presets_share() -> None:
    """WARMDOWN_FRAC rules where it is above 0; mini has one."""
    assert given_settings(PRESET="mini").warmdown_frac == 0.5
    asked = given_settings(PRESET="mini", WARMDOWN_ITERS="200")
    assert (asked.warmdown_frac, asked.warmdown_iters) == (0.0, 200)
    both = given_settings(PRESET="mini", WARMDOWN_ITERS="200", WARMDOWN_FRAC="0.3")
    assert both.warmdown_frac == 0.3


def test_mini_sets_a_scale_and_nothing_else() -> None:
    assert set(PRESETS["mini"]) <= MINI_MAY_SET


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("pr")])
def test_mini_composes_with_every_preset(preset: str) -> None:
    scaled = asdict(given_settings(PRESET=f"{preset},mini"))
    kept = set(scaled) - set(PRESETS["mini"]) - {"preset"}
    system = asdict(given_settings(PRESET=preset))
    assert {name: scaled[name] for name in kept} == {name: system[name] for name in kept}


# --help and --plan


def test_help_lists_every_setting_with_default_and_range(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with environment(SEED="7"):
        assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, f in FIELDS.items():
        (line,) = re.findall(rf"^[ *] {name} .*$", out, re.M)
        assert knob_of(f).meaning in line
        assert show_setting(f.default) in line
        accepts = line[line.rindex("[") :]
        if name in CHOICES:
            assert "|".join(knob_of(f).accepts) in accepts
        elif name in NUMBERS:
            low, high = re.search(r"\[(\S+) to ([^\s\];]+)", accepts).groups()
            assert [float(low), float(high)] == pytest.approx(knob_of(f).accepts, rel=1e-5)
        elif isinstance(f.default, bool):
            assert "0 or 1" in accepts
    assert re.findall(r"^\* (\w+) +(\S+).*default (\d+)\]$", out, re.M) == [("SEED", "7", "1337")]


def test_help_needs_neither_data_nor_gpu(tmp_path) -> None:
    job = launch("--help", cwd=tmp_path)
    assert (job.returncode, job.stderr) == (0, "")
    assert all(verb in job.stdout for verb in ("--check", "--plan", "--eval", *PRESETS))
    assert list(tmp_path.iterdir()) == []


ONE_LAYER = {"NUM_LAYERS": "1", "XSA_LAST_N": "1", "VE_ENABLED": "0"}  # is traced in no time


def planned(capsys: pytest.CaptureFixture[str], **env: str) -> str:
    """What --plan prints; of one layer, unless a preset says otherwise."""
    with environment(**({} if "PRESET" in env else ONE_LAYER), **env):
        assert main(["--plan"]) == 0
    return capsys.readouterr().out


def test_plan_counts_the_published_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, PRESET="pr1361")
    assert "parameters: 27,067,484\n" in plan
    groups = re.findall(r"^ +([\d,]+) parameters  \w", plan, re.M)
    assert sum(int(count.replace(",", "")) for count in groups) == 27_067_484
    assert "786,432 tokens, 384 rows of 2,048" in plan


@pytest.mark.parametrize(
    ("env", "dates"),
    [
        (
            {},
            [
                "end: 600 s",
                "in 1,500 steps",
                "the last 3,500 steps",
                "late QAT: the last 525 steps",
            ],
        ),
        ({"WARMDOWN_FRAC": "0.5"}, ["from 300 s on", "late QAT: from 555 s on"]),
        (
            {"MAX_WALLCLOCK_SECONDS": "0", "ITERATIONS": "1000", "WARMDOWN_ITERS": "100"},
            ["end: 1000 steps", "from 900 steps on", "late QAT: from 985 steps on"],
        ),
        (
            {"MAX_WALLCLOCK_SECONDS": "0", "ITERATIONS": "1000"},
            ["from 0 steps on", "from 850 steps"],
        ),
    ],
)
def test_plan_says_when_scheduled_things_start(
    env: dict[str, str], dates: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, **env)
    assert all(date in plan for date in dates), plan
    assert "late QAT" not in planned(capsys, **env, QAT_MODE="off")


def test_plan_says_what_changes_at_a_share_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    asked = {
        "MAX_WALLCLOCK_SECONDS": "0",
        "ITERATIONS": "300",
        "MUON_MOMENTUM_COOLDOWN_FRAC": "0.1",
        "MUON_SLOW_SHARE": "0.5",
        "PREFIX_TARGET": "0.25",
        "WARMDOWN_FRAC": "0.5",
        "MIN_LR": "0.2",
    }
    plan, plain = planned(capsys, **asked), planned(capsys)
    for name, step in {
        "momentum cool-down": 270,
        "slower momentum": 120,
        "prefix target: its fall": 100,
        "prefix target: none": 200,
        "rate floor of 0.2": 270,
    }.items():
        assert f"{name}: from {step} steps on" in plan
        assert name not in plain


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({}, "yes"),
        ({"MAX_WALLCLOCK_SECONDS": "0"}, "no: MAX_WALLCLOCK_SECONDS=0"),
        ({"MAX_WALLCLOCK_SECONDS": "601"}, "no: MAX_WALLCLOCK_SECONDS is above 600"),
        ({"EVAL_WALLCLOCK_SECONDS": "601"}, "no: EVAL_WALLCLOCK_SECONDS is above 600"),
        ({"ARTIFACT_LIMIT_BYTES": "16000001"}, "no: ARTIFACT_LIMIT_BYTES is above 16,000,000"),
        ({"DATA_PATH": "data/datasets/docs_sp1024"}, "no: the text is not FineWeb"),
    ],
)
def test_plan_says_what_makes_a_run_ineligible(
    env: dict[str, str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"eligible as a record: {reason}" in planned(capsys, **env)
