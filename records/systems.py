"""Write records/SYSTEMS.md: the seven published systems line by line, beside our presets.

    python records/systems.py            write the file
    python records/systems.py --check    exit 1 if it is not what would be written

What was published is data here; every value of ours is read from the presets, every score from
the newest entry of records/track_cpu_5min that was made with the preset and `mini`.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import GPT, PRESETS, Config, show_setting

PAGE = Path(__file__).resolve().parent / "SYSTEMS.md"
ENTRIES = PAGE.parent / "track_cpu_5min"
SAME = "as published"

# Steps, bits per byte of the artifact, bytes of code and artifact, as the pull requests state them.
PUBLISHED = {
    "pr1361": ("5,851", "1.12200 at stride 32 (seed 1337)", "15,877,304"),
    "pr569": ("6,560 to 6,569", "1.11749 (mean of three seeds)", "15,943,643"),
    "pr703": ("no log", "1.1176 (in its title)", "about 15.95 million (in its text)"),
    "pr334": (
        "3,374, one H100 for 6,400 s",
        "never printed; 1.2207 in chunks before quantisation",
        "16,182,081, over the limit",
    ),
    "pr295": ("6,457", "1.14771 (seed 42)", "15,935,368"),
    "pr1855": ("4,917 to 4,945", "1.06108 (mean of three seeds)", "at most 15,907,550"),
    "pr2135": ("4,983 to 5,001", "1.05651 (mean of three seeds)", "at most 15,947,490"),
}
SYSTEMS = tuple(PUBLISHED)
FRONTIER = ("pr1855", "pr2135")

# Line of the description; what each script had, in the order of SYSTEMS; settings that give it
# here; what differs, for all systems or by system.
ROWS: tuple[tuple[str, tuple[str, ...], str, str | dict[str, str]], ...] = (
    (
        "layers (first half / second half)",
        (
            "11 (5/6)",
            "11 (5/6)",
            "11 (5/6)",
            "11 (5/6)",
            "10 (5/5)",
            "11 (5/6; 8/9 with loops)",
            "11 (5/6; 8/9 with loops)",
        ),
        "NUM_LAYERS",
        SAME,
    ),
    (
        "width / query heads / key-value heads",
        ("512/8/4",) * 7,
        "MODEL_DIM NUM_HEADS NUM_KV_HEADS",
        SAME,
    ),
    (
        "grouped-query attention, q/k norm, q gain",
        ("1.5",) * 5 + ("5.0",) * 2,
        "QK_GAIN_INIT",
        SAME,
    ),
    (
        "MLP",
        ("3x leaky(0.5)²",) * 3 + ("3x relu²",) * 2 + ("4x leaky(0.5)²",) * 2,
        "MLP_MULT MLP_ACT LEAKY_SLOPE",
        {
            "pr334": "LEAKY_SLOPE has no effect with relu2",
            "pr295": "LEAKY_SLOPE has no effect with relu2",
        },
    ),
    (
        "vocabulary, tied embedding, logit softcap",
        ("1024, tied, 30",) * 5 + ("8192 CaseOps, tied, 30", "8192 CaseOps, tied, 30 on each side"),
        "VOCAB_SIZE TIE_EMBEDDINGS LOGIT_SOFTCAP",
        {
            "pr2135": "the two softcaps were never trained and stayed at 30",
        },
    ),
    (
        "text",
        ("FineWeb",) * 5 + ("FineWeb, capitals as marks",) * 2,
        "DATA_PATH TOKENIZER_PATH",
        {},
    ),
    (
        "RMSNorm without gain",
        ("eps of float32",) * 7,
        "",
        "a constant here, RMS_EPS",
    ),
    (
        "rotary dimensions / base / NTK reference",
        ("16 / 1e4 / 1024",) * 3
        + ("16 / 5e4 / none", "64 / 1e4 / 2048")
        + ("16 / 1e4 / none",) * 2,
        "ROPE_DIMS ROPE_BASE ROPE_NTK_REF",
        {
            "pr295": "the script built its tables in bf16, so that late positions fell together; here "
            "they are float32",
            **dict.fromkeys(FRONTIER, "the script's frequencies were rounded to bf16"),
        },
    ),
    ("XSA, last layers", ("11", "11", "4", "0", "0", "11", "11"), "XSA_LAST_N", SAME),
    (
        "LN scale 1/sqrt(l+1)",
        ("yes", "yes", "yes", "yes", "no", "yes", "yes"),
        "LN_SCALE",
        {"pr569": "its README says learned; the script has the fixed rule"},
    ),
    (
        "SmearGate",
        ("yes, unmasked",) * 5 + ("of the input, masked", "of the input, unmasked"),
        "SMEAR_ENABLED SMEAR_BOS_MASK SMEAR_FORM",
        {"pr2135": "its README says masked, its command switched the mask off"},
    ),
    (
        "BigramHash, buckets x width, hash",
        (
            "3072x112 XOR",
            "2048x128 XOR",
            "1536x128 XOR",
            "2048x64 sum",
            "10240x128 XOR",
            "none",
            "none",
        ),
        "BIGRAM_VOCAB_SIZE BIGRAM_DIM BIGRAM_HASH BIGRAM_BOS_MASK",
        {
            "pr703": "the script's default is 2048 buckets, its run had 1536",
            **dict.fromkeys(FRONTIER, "without effect but for the 0 buckets"),
        },
    ),
    (
        "bigram table / projection at the start",
        (
            "0 / orthogonal x 0.213",
            "0 / orthogonal x 0.213",
            "0 / orthogonal",
            "0 / orthogonal x 0.213",
            "orthogonal / 0",
            "none",
            "none",
        ),
        "BIGRAM_INIT OPTIMIZER_ROUTING",
        {
            "pr703": "OPTIMIZER_ROUTING=banks leaves auxiliary projections unscaled",
            **dict.fromkeys(FRONTIER, "without effect on a bigram table, there is none"),
        },
    ),
    (
        "value embeddings (width; layers)",
        ("128; 9,10",) * 3 + ("none",) * 2 + ("none",) * 2,
        "VE_ENABLED VE_DIM VE_LAYERS",
        dict.fromkeys(FRONTIER, "VE_DIM, VE_LAYERS without effect"),
    ),
    (
        "value residual learning",
        ("no", "added, 10 gates at 0.5", "no", "no", "no", "no", "no"),
        "VRL_MODE",
        SAME,
    ),
    (
        "U-Net skips",
        ("5, a weight a channel",) * 5 + ("8, a weight and a gate a channel",) * 2,
        "SKIP_PER_DIM SKIP_GATES",
        {"pr1361": "its metadata says 5 skip weights: five rows, not five scalars"},
    ),
    (
        "residual mix at the start",
        ("1, 0", "by depth", "1, 0", "1, 0", "by depth", "1, 0", "1, 0"),
        "RESID_MIX_INIT",
        SAME,
    ),
    (
        "Backout",
        ("none", "off", "cache of layer 7, 0.1", "none", "of the middle, 0.2", "none", "none"),
        "BACKOUT_MODE CACHE_LAYER BACKOUT_INIT",
        {"pr569": "there in the script, switched off in the published runs"},
    ),
    (
        "embedding at the start",
        ("N(0, 0.005²)",) * 4 + ("spectrum k^-1/2",) + ("N(0, 0.005²)",) * 2,
        "TIED_EMBED_INIT_STD EMB_SVD_INIT",
        SAME,
    ),
    (
        "output projections at the start",
        ("0",) * 7,
        "PROJ_INIT",
        dict.fromkeys(
            ("pr1361", "pr569", "pr703", "pr334", "pr295"),
            "READMEs say muP-scaled orthogonal (PROJ_INIT=ortho_mup); the scripts set zero",
        ),
    ),
    (
        "types of initial values",
        ("through bf16",) * 3
        + ("float32", "through bf16")
        + ("embedding bf16, others float32",) * 2,
        "",
        {
            "": "float32 here",
            **dict.fromkeys(
                ("pr1361", "pr569", "pr703", "pr295"), "bf16 moves gains such as 0.1 by about 0.1 %"
            ),
        },
    ),
    (
        "row length, training / evaluation",
        ("2048/2048",) * 3 + ("1024/1024", "2048/2048") + ("2048/2048", "2048/2560"),
        "TRAIN_SEQ_LEN EVAL_SEQ_LEN",
        SAME,
    ),
    (
        "tokens a step",
        ("786,432",) * 3 + ("524,288", "786,432") + ("786,432",) * 2,
        "TRAIN_BATCH_TOKENS",
        SAME,
    ),
    (
        "loader",
        ("sequential",) * 7,
        "LOADER",
        "rows of T+1 tokens at stride T of one stream; the scripts' spans skip a token between ranks",
    ),
    (
        "Muon rate",
        (".025", ".025", ".026", ".04", ".02", ".026", ".028"),
        "MATRIX_LR LR_MULT",
        {"pr703": "the script's defaults, 1.04 times #549's; its README's command cancels that"},
    ),
    (
        "Muon momentum",
        ("0.92 to 0.99 in 1500",) * 3
        + ("0.85 to 0.95 in 500", "0.92 to 0.99 in 1500")
        + ("0.92 to 0.97 in 1500",) * 2,
        "MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM MUON_MOMENTUM_WARMUP_STEPS",
        {"pr334": "its README says 0.99"},
    ),
    (
        "Newton-Schulz steps / weight decay",
        ("5 / .04",) * 3 + ("5 / .04 after the step", "5 / .04") + ("5 / .095",) * 2,
        "MUON_BACKEND_STEPS MUON_WD MUON_WD_ORDER",
        SAME,
    ),
    (
        "Muon's form",
        ("per matrix, all-reduced",) * 2
        + ("banks, sharded, int8 momentum",)
        + ("per matrix",) * 2
        + ("banks, sharded",) * 2,
        "MUON_QUANT_MOMENTUM OPTIMIZER_ROUTING",
        {
            "": "equal shapes are stacked in the optimizer, which is the same arithmetic",
            "pr334": "OPTIMIZER_ROUTING=by_ndim: Muon for every 2-D tensor but the embedding",
        },
    ),
    (
        "token rate / scalar rate",
        (".035/.025", ".035/.025", ".0364/.026", ".05/.04", ".03/.02", ".03/.02", ".03/.02"),
        "TIED_EMBED_LR SCALAR_LR",
        SAME,
    ),
    (
        "untied head: embedding and head rate",
        ("0.6 / 0.008",) * 2
        + ("0.624 / 0.00832",)
        + ("0.6 / 0.008",) * 2
        + ("without effect",) * 2,
        "EMBED_LR HEAD_LR",
        "no effect: the embedding is tied",
    ),
    (
        "Adam decay / betas",
        (".04 / .9, .95",) * 3
        + ("0 / .9, .95", ".01 / .9, .95")
        + (".02, embedding .085 / .9, .99",) * 2,
        "ADAM_WD BETA2 EMBED_WD",
        {"pr334": "its README says 0.04, which is Muon's"},
    ),
    (
        "gradient clipping",
        (
            ".3",
            ".3",
            ".3, each rank's own",
            "none",
            ".3",
            ".3, each rank's own",
            ".3, each rank's own",
        ),
        "GRAD_CLIP_NORM CLIP_BEFORE_REDUCE",
        SAME,
    ),
    (
        "warmdown",
        (
            "3200 linear",
            "3500 linear",
            "3500 linear",
            "3000 linear",
            "3000 linear",
            "the last 85 %, linear, to .1",
            "the last 85 %, linear, to .1",
        ),
        "WARMDOWN_ITERS WARMDOWN_TYPE WARMDOWN_FRAC MIN_LR",
        {
            "": "the step time is the median of recent steps here, not the mean since the start, which a "
            "slow first step would upset",
            "pr569": "its README says cosine, the script is linear",
            "pr334": "its README says cosine, the script is linear",
            **dict.fromkeys(
                FRONTIER, "WARMDOWN_FRAC of the time; WARMDOWN_ITERS has no effect with it"
            ),
        },
    ),
    (
        "priming steps, then reset",
        ("20",) * 5 + ("20 each without and with loops",) * 2,
        "WARMUP_STEPS",
        SAME,
    ),
    (
        "loss",
        ("cross entropy",) * 2
        + ("MiLe, gamma 1.1 to 0",)
        + ("cross entropy",) * 2
        + ("cross entropy",) * 2,
        "MILE_GAMMA MILE_CLAMP_MIN",
        {
            "pr703": "normalised over the global batch here, over each micro-batch there; gamma 1.1 "
            "exactly, 1.1015625 there (bf16); it fades out, its README says in"
        },
    ),
    (
        "average that is exported",
        ("EMA .997",) * 3 + ("SWA each step below .4", "SWA each 50 below .4") + ("EMA .9965",) * 2,
        "AVG_MODE EMA_DECAY SWA_START_FRAC SWA_EVERY",
        "float32 sums",
    ),
    (
        "average computed and never applied",
        ("SWA each 50 below .2",) * 3 + ("EMA .997", "none") + ("none",) * 2,
        "",
        "not computed here",
    ),
    (
        "quantisation-aware training",
        (
            "late .15, int6 row maximum",
            "late .15, int6 0.9995 quantile",
            "late .15, not on the banks",
            "none",
            "always, int5 MLP, int6 attention",
            "none",
            "none",
        ),
        "QAT_MODE LATE_QAT_THRESHOLD QAT_CLIP QAT_TARGETS",
        {
            "pr1361": "most likely never acted in the published run (no recompilation in its log); here "
            "it acts, QAT_MODE=off gives that run",
            "pr569": "most likely never acted in the published run; here it acts",
            "pr703": "acts on the bigram and value projections only, as there",
        },
    ),
    (
        "quantiser",
        (
            "simplified GPTQ int6",
            "GPTQ int6",
            "GPTQ int6",
            "row maximum int5",
            "row maximum int5 / int6",
            "GPTQ int6, embedding int7",
            "GPTQ int6, embedding int7",
        ),
        "GPTQ_VARIANT GPTQ_ACTORDER GPTQ_BLOCK_SIZE CLIP_SEARCH GPTQ_SELECT",
        {"pr1361": "errors go through an inverse that is never updated; kept to reproduce it"},
    ),
    (
        "calibration",
        (
            "64 rows of rank 0",
            "256 batches a rank",
            "256 batches a rank",
            "none",
            "none",
            "16 batches of 48 rows of rank 0",
            "32 batches of 48 rows of rank 0",
        ),
        "GPTQ_CALIB GPTQ_CALIB_BATCHES",
        {
            "pr1361": "after the cap there, which was ruled out since; here inside the budget, Hessians "
            "averaged over all ranks, batches of 8 rows",
            "pr569": "after the cap there, 25 M tokens a rank; inside the budget here, 4.2 M in all",
            "pr703": "after the cap there, 25 M tokens a rank; inside the budget here, 4.2 M in all",
            "pr334": "without effect: GPTQ is off",
            "pr295": "without effect: GPTQ is off",
            **dict.fromkeys(
                FRONTIER,
                "after the cap there; inside the budget here, Hessians averaged over all ranks, batches of 8 rows",
            ),
        },
    ),
    (
        "least step of a row",
        ("1/31 (int8: 1/127)",) * 3 + ("2^-14",) * 2 + ("1e-10, which is 0 as fp16",) * 2,
        "Q_SCALE_FLOOR",
        dict.fromkeys(FRONTIER, "without effect with QUANT_CLIP=std_published"),
    ),
    (
        "storage by role",
        (
            "int6, tables int8",
            "int6, bigram and value tables int6, embedding int8",
            "int6, tables int8",
            "int5, tables int8",
            "int5 MLP, int6 attention, embedding and last two keys fp16, bigram int6",
            "int6, embedding int7, gates int8",
            "int6, embedding int7, gates fp16",
        ),
        "BITS INT8_KEEP_FLOAT_MAX_NUMEL GATE_STORAGE",
        {
            "": "control tensors fp16, as the scripts stored all but #334's, which are float32 there",
            "pr295": "its script kept up to 8,192 elements as floats and the bigram projection besides: "
            "the same tensors",
        },
    ),
    (
        "pruning",
        (
            "none",
            "2 % after quantisation",
            "none",
            "none",
            "8 % before quantisation",
            "none",
            "none",
        ),
        "PRUNE_FRAC PRUNE_PCT",
        {"pr569": "its threshold was 0, so nothing was pruned; here 2 % of the integers are"},
    ),
    (
        "container / codec",
        (
            "torch.save / zstd-22",
            "raw / zstd-22",
            "torch.save / lzma-6",
            "torch.save / zstd-22",
            "torch.save / zstd-22",
            "7 groups of lrzip, 3 sorted; brotli",
            "1 stream of lrzip, all sorted; brotli",
        ),
        "CODEC",
        {
            "": "one container for all, without pickle",
            "pr334": "the published size is that of its fall-back, zlib (benchmarks/README.md)",
            **dict.fromkeys(FRONTIER, "CODEC=range in place of ZPAQ"),
        },
    ),
    (
        "stride of evaluation",
        ("32 (and 64)", "64", "64", "64", "64", "without effect", "without effect"),
        "EVAL_STRIDE",
        {"pr1361": "32 is the headline; EVAL_STRIDE=64 gives the other"},
    ),
    (
        "sliding windows",
        ("S1", "S2", "S1", "S3", "S2", "none", "none"),
        "SLIDING",
        {
            **dict.fromkeys(
                ("pr1361", "pr703", "pr334"),
                "the headline is the exact cover; the published form is printed on a second line",
            ),
            **dict.fromkeys(
                ("pr569", "pr295"),
                "the headline is the exact cover; which is what S2 is for these lengths",
            ),
            **dict.fromkeys(FRONTIER, "without effect: the headline is the adapters' score"),
        },
    ),
    (
        "targets left out",
        ("after the last full row",) * 5 + ("none: the adapters score all",) * 2,
        "EVAL_TRUNCATE",
        dict.fromkeys(FRONTIER, "the setting holds for plain scores"),
    ),
    (
        "test-time training",
        (
            "none",
            "none",
            "there, switched off",
            "3 epochs before scoring",
            "none",
            "adapters for each document",
            "adapters for each document",
        ),
        "TTT_MODE TTT_LR TTT_MOMENTUM TTT_EPOCHS TTT_BATCH_SEQS TTT_GRAD_CLIP TTT_FREEZE_BLOCKS",
        {
            "pr334": "trains on text before scoring it, no legal score: the headline comes before it, "
            "and it is trimmed to the budget (the published run never finished it)",
            **dict.fromkeys(FRONTIER, "see adapters; the other settings have no effect"),
        },
    ),
    (
        "seeds published",
        ("1337", "42, 1337, 2024", "2025, 1337, 2024", "1337", "42", "42, 0, 1234", "0, 42, 314"),
        "SEED",
        "any seed",
    ),
    (
        "steps at most / seconds",
        ("20000/600",) * 5 + ("never reached/600",) * 2,
        "ITERATIONS MAX_WALLCLOCK_SECONDS",
        {
            "pr703": "9000 steps in its README's command",
            "pr334": "published after 6,400 s on one GPU",
        },
    ),
    (
        "compilation / data parallel",
        (
            "yes / DDP",
            "yes / DDP",
            "yes / none",
            "no / DDP",
            "yes / DDP",
            "yes / none",
            "yes / none",
        ),
        "COMPILE",
        "no DDP: gradients are added up in one exchange",
    ),
    (
        "attention kernel",
        (
            "SDPA flash",
            "FlashAttention-3",
            "FlashAttention-3",
            "SDPA",
            "SDPA flash",
            "in documents of flat rows",
            "in documents of flat rows",
        ),
        "ATTENTION",
        {"": "auto takes the quickest that works", "pr703": "its script required it"},
    ),
    (
        "off in every script",
        ("MTP, DTG, gated attention, LAWA",) * 5
        + ("-", "Huber decay, Hadamard rotation, q gain schedule, LoRA EMA"),
        "",
        dict.fromkeys(
            ("pr1361", "pr569", "pr703", "pr334", "pr295"),
            "their names are accepted at the value that is off, refused otherwise",
        ),
    ),
    ("attention inside documents", ("no",) * 5 + ("yes",) * 2, "ATTN_DOCS", SAME),
    (
        "gate on what heads give, scale, channels",
        ("none",) * 5 + ("sparse, .5, 12",) * 2,
        "ATTN_GATE ATTN_GATE_SCALE GATE_WINDOW",
        SAME,
    ),
    (
        "loops: layers, more passes, from",
        ("none",) * 5 + ("3 to 5, 2, .35",) * 2,
        "NUM_LOOPS LOOP_START LOOP_END ENABLE_LOOPING_AT",
        dict.fromkeys(SYSTEMS[:5], "the places have no effect without passes"),
    ),
    (
        "two lanes, from layer",
        ("none",) * 5 + ("8, their mean goes on",) * 2,
        "PARALLEL_START_LAYER",
        SAME,
    ),
    (
        "Muon's polynomial / rows normed",
        ("Newton-Schulz / no",) * 5 + ("Polar Express / yes",) * 2,
        "MUON_NS MUON_ROW_NORM",
        dict.fromkeys(FRONTIER, "all in bf16 there"),
    ),
    (
        "steps from the spread of a row",
        ("no",) * 5 + ("11.5, 13, embedding 14",) * 2,
        "QUANT_CLIP CLIP_SIGMAS",
        dict.fromkeys(SYSTEMS[:5], "CLIP_SIGMAS has no effect"),
    ),
    (
        "LQER: tensors, rank, group",
        ("none",) * 5 + ("3, 4, 64", "3, 4, 32"),
        "LQER_TOP_K LQER_RANK LQER_GROUP",
        dict.fromkeys(SYSTEMS[:5], "rank and group have no effect"),
    ),
    (
        "adapters: documents, chunk, rank, alpha, places",
        ("none",) * 5 + ("64, 48, 80, 144, q k v o mlp head", "64, 48, 80, 144, q v o mlp head"),
        "LORA_BATCH_DOCS LORA_CHUNK_TOKENS LORA_RANK LORA_ALPHA LORA_PLACES",
        dict.fromkeys(SYSTEMS[:5], "without effect"),
    ),
    (
        "adapters: rate, beta2, decay",
        ("none",) * 5 + ("1e-4, .99, .5", "8e-5, .99, 2"),
        "LORA_LR LORA_BETA2 LORA_DECAY",
        dict.fromkeys(SYSTEMS[:5], "without effect"),
    ),
    (
        "phases of SGD, documents, rate, chunk",
        ("none",) * 5 + ("3, 2500, 1e-3, 32768", "1, 2500, 1e-3, 32768"),
        "LORA_PHASES LORA_PHASE_DOCS LORA_PHASE_LR LORA_PHASE_CHUNK_TOKENS LORA_PHASE_ROW_TOKENS",
        {
            **dict.fromkeys(SYSTEMS[:5], "without effect"),
            "pr2135": "rows of 2560 there, one or two a rank, whose means weighed the same",
        },
    ),
    (
        "n-gram tilt, order, threshold",
        ("none",) * 5 + ("none", "2.625, 16, .8"),
        "NGRAM_TILT NGRAM_ORDER NGRAM_THRESHOLD",
        dict.fromkeys((*SYSTEMS[:5], "pr1855"), "order and threshold have no effect"),
    ),
)


def note_for(system: str, note: str | dict[str, str]) -> str:
    """What differs for one system: its own words, after those for all."""
    if isinstance(note, str):
        return note
    words = [note[key] for key in ("", system) if key in note]
    return "; ".join(words) or SAME


def parameters(cfg: Config) -> int:
    """Parameters of the full-size model, without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(cfg).parameters())


def results() -> list[str]:
    """A table of published and of our small results; a dash where there is no entry yet."""
    entries = {}
    for path in sorted(ENTRIES.glob("*/submission.json")):  # by date: the newest one stays
        facts = json.loads(path.read_text(encoding="utf-8"))
        entries[facts["settings"].get("PRESET")] = path.parent.name, facts
    lines = [
        "## Results",
        "",
        "Published: on 8 H100, 600 s, FineWeb, unless said otherwise. Here: the same preset with "
        "`mini`, 300 s on two CPU cores, the built-in corpus; the mean of three seeds, their "
        "standard deviation in brackets. **The two are not comparable**: text, tokenizer, size of "
        "the network and machine are others, so a score here says nothing about the published one, "
        "and the order of the systems here nothing about their order at full size.",
        "",
        "| system | published bpb | steps | bytes | bpb here | steps | bytes | entry |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for system, (steps, bpb, num_bytes) in PUBLISHED.items():
        here = "- | - | - | none yet"
        if f"{system},mini" in entries:
            name, facts = entries[f"{system},mini"]
            taken = statistics.fmean(seed["steps"] for seed in facts["seed_results"].values())
            here = (
                f"{facts['val_bpb']:.5f} ({facts['val_bpb_std']:.5f}) | {taken:,.0f} | "
                f"{facts['bytes_total']:,} | [{name}]({ENTRIES.name}/{name})"
            )
        lines.append(f"| {system} | {bpb} | {steps} | {num_bytes} | {here} |")
    return [*lines, ""]


def page() -> str:
    """The text of SYSTEMS.md."""
    lines = [
        "# The seven published systems",
        "",
        "Generated by `python records/systems.py`; change that file, not this one.",
        "",
        "Each preset reproduces what a pull request's *script did* at openai/parameter-golf, where "
        "script, README and metadata disagree. A row is one line of its published description: "
        "what was published, the settings that give it here with the values of the preset, and "
        "what differs. `PRESET=pr569 ./run.sh --plan` shows a system at full size, "
        "`PRESET=pr569,mini ./run.sh` trains it on two CPU cores. Of the forms of sliding windows, "
        "S1 starts one at every stride and cuts the last ones short, S3 has full windows only, the "
        "last one anchored at the end of the text; both score the last `stride` targets of each "
        "window, so that some targets count twice. S2 is what the exact cover is here.",
        "",
        *results(),
    ]
    for index, system in enumerate(SYSTEMS):
        cfg, _ = Config.from_env({"PRESET": system})
        lines += [
            f"## {system}",
            "",
            f"{parameters(cfg):,} parameters at full size; "
            f"the preset sets {len(PRESETS[system])} settings, all others keep their "
            "defaults.",
            "",
            "| line | published | here | difference |",
            "|---|---|---|---|",
        ]
        for item, published, names, note in ROWS:
            ours = ", ".join(
                f"`{name}={show_setting(getattr(cfg, name.lower()))}`" for name in names.split()
            )
            lines.append(
                f"| {item} | {published[index]} | {ours or '-'} | {note_for(system, note)} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Write the page, or compare it; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if parser.parse_args(arguments).check:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        print(f"{PAGE.name}: {'up to date' if same else 'differs, run python records/systems.py'}")
        return int(not same)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
