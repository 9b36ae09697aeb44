"""The pages of records/: an entry's, a track's, and the board. Their numbers come from the runs."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import tracks
from tracks import TRACKS

Found = Sequence[tuple[Path, dict]]  # folders of entries, each with its submission.json
SHAPE = (
    ("layers", "num_layers"),
    ("width", "model_dim"),
    ("query heads", "num_heads"),
    ("key-value heads", "num_kv_heads"),
    ("vocabulary", "vocab_size"),
    ("tokens a row", "train_seq_len"),
    ("tokens a step", "train_batch_tokens"),
    ("bits", "bits"),
)
# What compliance.py tries, by the names it has in submission.json.
CONDITION_WORDS = {
    "causality": "no probability depends on a later token",
    "full_distribution": "the probabilities of all tokens sum to one and are what is scored",
    "single_pass": "every target is scored once, from left to right",
    "score_before_update": "the model learns from no target before it is scored",
    "determinism": "the artifact gives the same model, to the bit, each time",
    "legal_settings": "no setting uses data after the budget or before its score",
}


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def with_spread(mean: float, spread: float, seeds: int) -> str:
    """A mean and how far the seeds scatter; one seed does not scatter."""
    return f"**{mean:.6f}** ({spread:.6f})" if seeds > 1 else f"**{mean:.6f}**"


# =================================================================================================
# The page of an entry
# =================================================================================================


def results_of(claims: dict) -> str:
    """The scores of all seeds, and what the words mean."""
    seeds = claims["seed_results"]
    rows: list[list[object]] = []
    for seed, facts in seeds.items():
        in_chunks = [facts[key] for key in ("pre_quant_val_bpb", "post_quant_val_bpb")]
        rows.append(
            [
                seed,
                f"{facts['val_bpb']:.6f}",
                f"{facts['val_loss']:.6f}",
                *("-" if value is None else f"{value:.6f}" for value in in_chunks),
                f"{facts['steps']:,}",
                f"{facts['artifact_bytes']:,}",
                f"{facts['train_s']:.1f}",
                f"{facts['eval_s']:.1f}",
            ]
        )
    rows.append(
        [
            "mean (std)",
            with_spread(claims["val_bpb"], claims["val_bpb_std"], len(seeds)),
            with_spread(claims["val_loss"], claims["val_loss_std"], len(seeds)),
            *[""] * 6,
        ]
    )
    head = (
        "seed",
        "val_bpb",
        "val_loss",
        "float, in chunks",
        "artifact, in chunks",
        "steps",
        "artifact bytes",
        "training, s",
        "scoring, s",
    )
    return (
        f"{table(head, rows)}\n\n"
        "val_bpb: bits per byte of the validation text under the artifact, less is better; "
        "val_loss: the same in nats a token; in chunks: without sliding windows, of the float "
        "weights and of the artifact, so that their difference is what quantisation costs; std: "
        "how far the seeds scatter.\n"
    )


def sizes_of(claims: dict) -> str:
    """Bytes of code and artifact, counted work, and the text that was scored."""
    data, limit = claims["data"], TRACKS[claims["track"]].max_bytes
    packed = f" (packed; {claims['bytes_text']:,} as text)" if "bytes_text" in claims else ""
    lines = [
        f"Code {claims['bytes_code']:,} bytes{packed}; code and largest artifact "
        f"{claims['bytes_total']:,} of {limit:,} bytes.",
        f"Validation text: {data['val_tokens']:,} tokens, {data['val_bytes']:,} bytes, split "
        f"{data['fingerprint'][:12]}.",
        f"{claims['hardware']}, torch {claims['pytorch_version']}.",
    ]
    if "tflops" in claims:
        lines.insert(1, f"Counted training: {claims['tflops']:,.4g} TFLOP, the mean of the seeds.")
    return "\n".join(lines)


def against_base(claims: dict) -> str:
    """What changed against the entry this one builds on."""
    if not (base := claims["base"]):
        return ""
    luck = ""
    if base["p"] is not None:
        luck = f"; if it were no better, chance would make it look so with probability {base['p']}"
    settings = "The settings are the base's."
    if base["changes"]:
        settings = table(("setting", base["name"], "here"), base["changes"])
    source = "The script is the base's."
    if base["added"] or base["removed"]:
        source = f"Source, [line by line](source.diff): +{base['added']} -{base['removed']} lines."
    return (
        f"Against {base['name']} (val_bpb {base['val_bpb']:.6f}): "
        f"{claims['val_bpb'] - base['val_bpb']:+.6f} bits per byte{luck}.\n\n"
        f"{settings}\n\n{source}\n\n"
    )


def rules_of(claims: dict) -> str:
    """What compliance.py found, condition by condition."""
    answers = {True: "yes", False: "NO", None: "not tried with this script"}
    rows = [
        (CONDITION_WORDS.get(name, name), answers[holds])
        for name, holds in claims["compliance"].items()
    ]
    return table(("condition", "holds"), rows)


def command_of(claims: dict, by_hand: dict[str, str]) -> str:
    """The command that trains an entry's seeds again. by_hand: settings beyond those of PRESET."""
    own = {"PRESET": claims["settings"].get("PRESET", "")} | by_hand
    given = " ".join(f"{name}={shlex.quote(value)}" for name, value in own.items() if value)
    # The command of a track may name settings, which the entry's own follow and replace.
    words = TRACKS[claims["track"]].command.split()
    start = " ".join(word for word in words if word.partition("=")[0] not in own)
    seeds = " ".join(map(str, claims["seeds"]))
    return " ".join(f"for SEED in {seeds}; do SEED=$SEED {given} {start}; done".split())


def entry_page(claims: dict, settings: dict, pictures: Sequence[tuple[str, str]]) -> str:
    """README.md of an entry: nothing in it but the blurb is written by hand."""
    changed = "\n".join(f"    {name}={value}" for name, value in claims["settings"].items())
    shape = [("parameters", f"{claims['params']:,}")]
    shape += [(words, settings[name]) for words, name in SHAPE if name in settings]
    images = "\n".join(f"![{words}]({name})" for name, words in pictures)
    text_of_script = ""
    if "bytes_text" in claims:
        text_of_script = " (packed: `python records/pack.py --text train_gpt.py` prints it)"
    return f"""# {claims["name"]}

{claims["blurb"]}

{claims["author"]} (GitHub: {claims["github_id"]}), {claims["date"]}, \
{TRACKS[claims["track"]].title}.

## Results

{results_of(claims)}
{sizes_of(claims)}

{images}

## What it is

{against_base(claims)}Settings that differ from the defaults of this script:

{changed}

{table(("", ""), shape)}

## Rules

{rules_of(claims)}

## Again

    {claims["command"]}

with this folder's `train_gpt.py`{text_of_script} in place of the repository's. Then
`python records/record.py check` looks at this folder, and with `--rescore` scores the artifact that
it keeps once more.
"""


# =================================================================================================
# The board and the pages of the tracks
# =================================================================================================


def limits_of(track: str) -> str:
    """A track's limits in one sentence."""
    rules = TRACKS[track]
    limits = [
        f"at most {limit:,} {words}"
        for name, _, _, words in tracks.MEASURES
        if not math.isinf(limit := getattr(rules, name))
    ]
    data = f"{rules.dataset}*" if rules.dataset else "any"
    return (
        f"{'; '.join(limits)}; {rules.min_seeds} or more seeds; machine: {rules.machine_words}; "
        f"data: {data}."
    )


def track_page(track: str) -> str:
    """README.md of a track: its rules, and the commands of an entry."""
    rules = TRACKS[track]
    lines = [f"# {rules.title}", "", f"Rules: {limits_of(track)}", ""]
    if rules.state == tracks.CLOSED:
        lines += [
            "This track is closed: its entries stay, and it takes no new ones. A limit in seconds",
            "says as much about the machine as about the recipe.",
            "",
            f"An entry's seeds were trained by `{rules.command}`.",
            "",
        ]
    else:
        lines += [
            "At the root of the repository:",
            "",
            f"    for SEED in 1 2 3; do SEED=$SEED RUN_ID=mine_$SEED {rules.command}; done",
            "    python records/record.py new runs/mine_* --name Name --author You "
            "--github-id you \\",
            f'        --blurb "What is new." --track {track} [--base ENTRY_IT_BUILDS_ON]',
            "    python records/record.py board",
            "",
            "`python records/pack.py train_gpt.py packed/train_gpt.py` makes a smaller file that "
            "runs the",
            "same (`python packed/train_gpt.py`, settings as above); its size counts where it is "
            "the file that ran.",
            "",
        ]
    if rules.reasons:
        lines += ["## Reasons", "", rules.reasons]
    return "\n".join([*lines, "[All entries](../README.md)", ""])


def mean_of(claims: dict, key: str) -> float:
    """A fact of an entry, the mean of its seeds."""
    return statistics.fmean(seed[key] for seed in claims["seed_results"].values())


def board_row(rank: int, folder: Path, root: Path, claims: dict, with_work: bool) -> list[object]:
    """One line of the board."""
    several = len(claims["seeds"]) > 1
    work = f"{claims['tflops']:,.4g}" if "tflops" in claims else "-"
    return [
        rank,
        f"[{claims['name']}]({folder.relative_to(root)})",
        f"{claims['val_bpb']:.5f}",
        f"{claims['val_bpb_std']:.5f}" if several else "-",
        len(claims["seeds"]),
        f"{mean_of(claims, 'steps'):,.0f}",
        *([work] if with_work else []),
        f"{claims['bytes_total']:,}",
        f"{claims['params']:,}",
        claims["data"]["dataset"],
        claims["hardware"],
        claims["author"],
        claims["date"],
    ]


def board_table(root: Path, found: Found) -> str:
    """The entries of one track and one text, best first."""
    with_work = any("tflops" in claims for _, claims in found)
    head = [
        "",
        "entry",
        "val_bpb",
        "std",
        "seeds",
        "steps",
        *(["TFLOP"] if with_work else []),
        "bytes",
        "parameters",
        "data",
        "machine",
        "author",
        "date",
    ]
    rows = [
        board_row(rank, folder, root, claims, with_work)
        for rank, (folder, claims) in enumerate(found, start=1)
    ]
    return table(head, rows)


BOARD_HEAD = """# Records

Written by `python records/record.py board`. val_bpb: bits per byte of the validation text, mean of the seeds, less is better; std: how far the seeds scatter (standard deviation); steps: mean of the seeds; TFLOP: counted work of training; bytes: code and the largest artifact. Where time is limited, a slow machine makes few steps in it: only entries of one machine say which recipe is better. Different validation text is never ranked together. `python records/record.py check FOLDER` checks a folder.
"""  # noqa: E501


def board_page(root: Path, found: Found, unranked: Sequence[tuple[Path, str]]) -> str:
    """records/README.md: one table a track and validation text."""
    lines = [BOARD_HEAD]
    for track, rules in TRACKS.items():
        mine = [pair for pair in found if pair[1]["track"] == track]
        left_out = [pair for pair in unranked if pair[0].parent.name == track]
        state = ""
        if rules.state == tracks.CLOSED:
            state = " This track is closed: it takes no new entries."
        lines += [
            f"## {rules.title}",
            "",
            f"[Rules, how to make an entry]({track}/README.md) (`{track}`).{state}",
            "",
        ]
        for folder, reason in left_out:
            lines += [f"Not ranked: [{folder.name}]({folder.relative_to(root)}): {reason}.", ""]
        if not mine:
            lines += ["Nobody has run it yet.", ""]
        for name in sorted({tracks.text_of(claims["data"]["fingerprint"]) for _, claims in mine}):
            same = [p for p in mine if tracks.text_of(p[1]["data"]["fingerprint"]) == name]
            val_bytes = same[0][1]["data"]["val_bytes"]
            lines += [
                f"Text: {name[:12]}, {val_bytes:,} validation bytes.",
                "",
                board_table(root, same),
                "",
            ]
    if found:
        lines += ["![Score against bytes and against counted work](board.png)", ""]
    return "\n".join([*lines, "[SYSTEMS.md](SYSTEMS.md) says what each preset is.", ""])
