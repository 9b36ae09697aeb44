"""Make an entry from runs, check anybody's, compare, draw, and write the board.

    python records/record.py new runs/A runs/B runs/C --name Wide --author Ann --github-id ann \\
        --blurb "What is new in a sentence or two." --track track_non_record_16mb
    python records/record.py check records/track_cpu_5min/*/ [--rescore] [--details]
    python records/record.py compare A B            entries or run folders
    python records/record.py compare runs/*         runs that differ in SEED alone are one side
    python records/record.py plot runs/A runs/B     finished or live
    python records/record.py show ENTRY | RUN | ARTIFACT
    python records/record.py repeat ENTRY [--seed N]        train a seed again, compare the score
    python records/record.py board

An entry is trusted as far as its files go: `check` looks whether no file was exchanged, whether
the numbers that the trainer wrote add up to what is claimed, and whether the rules of the track
are kept. That the score is real is proved by `--rescore`, which runs the entry's own train_gpt.py
on its artifact. Only that and `repeat` run anything that a folder holds.
"""

from __future__ import annotations

import argparse
import difflib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import comparison
import pack
import pages
import repeating
import tracks
from checking import (
    MALFORMED,
    RECORDS,
    ROOT,
    ask_script,
    best_of,
    check_about,
    check_folder,
    check_runs,
    entry_facts,
    settings_between,
)
from reading import (
    Run,
    Wrong,
    common_settings,
    content,
    end_quietly,
    is_entry,
    one_line,
    portable,
    read_any,
    read_entry,
    read_json,
    read_run,
    seed_facts,
    sha256,
    shown,
)
from tracks import TRACKS

PICTURES = (("runs.png", "Loss, rate, scores and bytes"), ("bytes.png", "Bytes of the artifact"))
SMALL_ARTIFACT = 2_000_000  # bytes; kept on every track, so that its score can be proved
INSTALL_PICTURES = "pictures need matplotlib: pip install matplotlib (requirements-dev.txt has it)"


# =================================================================================================
# Making an entry
# =================================================================================================


def against(base: Path, claims: dict, runs: Sequence[Run], script: bytes) -> tuple[dict, str]:
    """What changed against another entry: score, settings, lines of the script; and the diff."""
    theirs = read_json(base / "submission.json")
    fingerprints = [part["data"]["fingerprint"] for part in (theirs, claims)]
    if tracks.text_of(fingerprints[0]) != tracks.text_of(fingerprints[1]):
        raise Wrong(f"--base {base.name}: it was scored on another validation text")
    sides = comparison.side_of(base.name, read_entry(base)), comparison.side_of("here", runs)
    chance = comparison.difference(*comparison.scores_of(*sides, "val_loss")).p_better
    old, new = (
        pack.text_of(source).decode().splitlines()
        for source in (content(base / "train_gpt.py"), script)
    )
    names = ("base/train_gpt.py", "train_gpt.py")
    diff = list(difflib.unified_diff(old, new, *names, lineterm=""))
    return {
        "folder": base.resolve().name,
        "name": theirs["name"],
        "val_bpb": theirs["val_bpb"],
        # Three digits: beyond them versions of scipy may differ.
        "p": None if chance is None else float(f"{chance:.3g}"),
        "changes": settings_between(theirs, claims),
        "added": sum(line[0] == "+" for line in diff[2:]),
        "removed": sum(line[0] == "-" for line in diff[2:]),
    }, "".join(f"{line}\n" for line in diff)


def read_runs_of(folders: Sequence[Path]) -> tuple[list[tuple[Path, Run]], bytes]:
    """Run folders by seed, and the one script that ran; raises Wrong if it was not one."""
    scripts = {content(folder / "train_gpt.py") for folder in folders}
    if len(scripts) != 1:
        raise Wrong(f"{len(scripts)} different train_gpt.py in the run folders, expected one")
    read = [(folder, read_run(folder)) for folder in folders]
    return sorted(read, key=lambda pair: pair[1].seed), scripts.pop()


def describe(claims: dict, said: dict, settings: dict) -> None:
    """Add the settings that differ from the script's defaults, and the command that repeats it."""
    ours = {name: shown(value) for name, value in portable(common_settings(settings)).items()}
    for key in ("defaults", "preset"):
        base = {name: shown(value) for name, value in portable(said[key]).items()}
        changed = {
            name.upper(): value for name, value in ours.items() if base.get(name, value) != value
        }
        if key == "defaults":
            claims["settings"] = changed
    changed.pop("PRESET", None)
    claims["command"] = pages.command_of(claims, changed)


def make_entry(folders: Sequence[Path], about: dict, base: Path | None, root: Path) -> Path:
    """Build an entry's folder from run folders alone; raises Wrong, leaving nothing behind."""
    rules = TRACKS[about["track"]]
    if rules.state != tracks.OPEN:
        raise Wrong(f"--track {about['track']}: {rules.state}; it takes no entries")
    if base and base.resolve().parent.name != about["track"]:
        raise Wrong(f"--base {base}: expected an entry of {about['track']}, where it is beside")
    target = root / about["track"] / f"{about['date']}_{about['name']}"
    if target.exists():
        raise Wrong(f"{target} exists already; nothing in it was touched")
    refuse([f"--{finding}" for finding in check_about(about)])
    pairs, script = read_runs_of(folders)
    runs = [run for _, run in pairs]
    findings = list(check_runs(runs, script, about["track"]))
    for folder, run in pairs:
        if sha256(folder / "artifact.bin") != run.one("artifact")["sha256"]:
            findings.append(f"{folder}: artifact.bin is not the one that its metrics name")
    refuse(findings)
    best = next(folder for folder, run in pairs if run is best_of(runs))
    said = ask_script(best / "train_gpt.py", best / "artifact.bin", best / "settings.json")
    about["compliance"] = said["compliance"]
    if broken := [name for name, holds in said["compliance"].items() if holds is False]:
        raise Wrong(f"the artifact of {best} breaks the rules: {', '.join(broken)}")
    claims = entry_facts(runs, script, about)
    describe(claims, said, runs[0].settings)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
        made = Path(scratch, target.name)
        made.mkdir()
        if base:
            claims["base"], diff = against(base, claims, runs, script)
            (made / "source.diff").write_text(diff, encoding="utf-8")
        if rules.keeps_artifact or (best / "artifact.bin").stat().st_size <= SMALL_ARTIFACT:
            shutil.copyfile(best / "artifact.bin", made / "artifact.bin")
        write_entry(made, pairs, script, claims)
        made.rename(target)
    return target


def refuse(findings: list[str]) -> None:
    """Raise Wrong with the first of the findings, and how many there are."""
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise Wrong(findings[0] + more)


def write_entry(
    folder: Path, pairs: Sequence[tuple[Path, Run]], script: bytes, claims: dict
) -> None:
    """The files of an entry."""
    runs = [run for _, run in pairs]
    settings = common_settings(runs[0].settings)
    (folder / "train_gpt.py").write_bytes(script)
    for source, run in pairs:
        shutil.copyfile(source / "log.txt", folder / f"train_seed{run.seed}.log")
        shutil.copyfile(run.path, folder / f"metrics_seed{run.seed}.jsonl")
    (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(ROOT / "requirements.txt", folder / "requirements.txt")
    drawn: tuple[tuple[str, str], ...] = ()
    try:
        import pictures
    except ImportError:
        print(f"warning: no pictures in the entry: {INSTALL_PICTURES}", file=sys.stderr)
    else:
        drawn = PICTURES
        named = [(f"seed {run.seed}", run) for run in runs]
        pictures.draw_runs(folder / "runs.png", named, "steps")
        pictures.draw_bytes(folder / "bytes.png", best_of(runs))
    page = pages.entry_page(claims, settings, drawn)
    (folder / "README.md").write_text(page, encoding="utf-8")
    claims["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    submission = json.dumps(claims, indent=1) + "\n"
    (folder / "submission.json").write_text(submission, encoding="utf-8")


# =================================================================================================
# Verbs
# =================================================================================================


def verb_new(args: argparse.Namespace) -> int:
    """Build an entry's folder from run folders."""
    try:
        track = tracks.named(args.track)
    except KeyError as error:
        raise Wrong(f"--track: {error.args[0]}") from None
    about = {
        "author": args.author,
        "github_id": args.github_id,
        "name": args.name,
        "date": args.date,
        "track": track,
        "blurb": args.blurb.strip(),
    }
    print(make_entry(args.runs, about, args.base, args.root))
    return 0


def verb_check(args: argparse.Namespace) -> int:
    """Say whether folders pass: the verdict, then a line a folder, then details if asked for."""
    results = [check_folder(folder, args.rescore) for folder in args.folders]
    failed = [result for result in results if result.findings]
    print(f"{'FAIL' if failed else 'PASS'}: {len(results) - len(failed)} of {len(results)} pass")
    for result in results:
        words, first = result.about, result.findings[:1]
        if first:
            more = len(result.findings) - 1
            words = first[0] + (f" (and {more} more: --details)" if more else "")
        print(f"{'FAIL' if first else 'pass'}  {one_line(str(result.folder))}: {words}")
        if args.details:
            for finding in result.findings:
                print(f"      wrong: {finding}")
            for doubt in result.not_verified:
                print(f"      not verified: {one_line(doubt)}")
    return int(bool(failed))


def verb_compare(args: argparse.Namespace) -> int:
    """Say which of two recipes is better, or that nobody can tell."""
    if len(args.folders) < 2:
        raise Wrong("compare: expected two folders or more")
    for folder in args.folders:
        if folder.is_dir() and is_entry(folder) and (found := check_folder(folder).findings):
            print(f"warning: {folder} does not pass check: {found[0]}")
    said = comparison.words(*comparison.sides(args.folders))
    print("\n".join(one_line(line, 2000) for line in said.split("\n")))
    return 0


def verb_plot(args: argparse.Namespace) -> int:
    """Draw runs and entries into one picture, and say where each run stands."""
    import pictures

    runs = []
    for folder in args.folders:
        found = read_any(folder)
        several = len(found) > 1
        runs += [
            (f"{folder.name} seed {run.seed}" if several else folder.name, run) for run in found
        ]
    pictures.draw_runs(args.out, runs, args.by)
    for name, run in runs:
        print(f"{one_line(name)}: {progress_of(run)}")
    print(args.out)
    return 0


def progress_of(run: Run) -> str:
    """Where a run stands, in words."""
    steps, final = run.all("step"), run.all("final")
    if not steps:
        return "no step yet"
    at = f"{steps[-1]['step']:,} steps, {steps[-1]['ms'] / 1e3:,.1f} s"
    if final:
        return f"{at}, {final[-1]['val_bpb']:.6f} bits per byte"
    return f"{at}, loss {steps[-1]['train_loss']:.4f}, not ended"


def verb_show(args: argparse.Namespace) -> int:
    """Say what an entry, a run or an artifact holds."""
    if not args.what.is_dir():
        return show_artifact(args.what, args.plot)
    if args.plot:
        raise Wrong("--plot: expected an artifact; `plot` draws runs and entries")
    for run in read_any(args.what):
        print(f"seed {run.seed}: {progress_of(run)}")
        if run.all("final"):
            for name, value in seed_facts(run).items():
                print(f"  {name:<20} {value:,}" if tracks.is_number(value) else f"  {name:<20} -")
        for name, value in portable(common_settings(run.settings)).items() if args.details else ():
            print(one_line(f"  {name.upper()}={shown(value)}"))
    return 0


def show_artifact(path: Path, plot: Path | None) -> int:
    """Say what an artifact holds; its code is the train_gpt.py beside it, else ours."""
    import artifact  # torch: only where it is needed

    scripts = (path.parent / "train_gpt.py", ROOT / "train_gpt.py")
    script = next(place for place in scripts if place.is_file())
    limit = next(iter(TRACKS.values())).max_bytes
    try:
        found = artifact.anatomy(path)
    except artifact.Refusal as refusal:
        raise Wrong(str(refusal)) from None
    print(f"{path}, with the code of {script}", end="\n\n")
    print(*artifact.lines(found, script.stat().st_size, limit), sep="\n")
    if plot:
        import pictures

        pictures.draw_artifact(found, plot, limit, script.stat().st_size)
        print(f"\n{plot}")
    return 0


def verb_repeat(args: argparse.Namespace) -> int:
    """Train a seed of an entry again, and say whether its score came out again."""
    same, words = repeating.repeat(args.folder, args.seed, args.runs)
    print(words)
    return int(not same)


def verb_board(args: argparse.Namespace) -> int:
    """Write records/README.md, the tracks' pages and board.png from the entries that pass."""
    root = args.root
    if not root.is_dir():
        raise Wrong(f"{root}: no such folder; it is the one that holds the tracks")
    found, unranked = ranked_entries(root)
    (root / "README.md").write_text(pages.board_page(root, found, unranked), encoding="utf-8")
    for track in TRACKS:
        (root / track).mkdir(exist_ok=True)
        page = pages.track_page(track)
        (root / track / "README.md").write_text(page, encoding="utf-8")
    print(root / "README.md", *(f"{f}: not ranked: {reason}" for f, reason in unranked), sep="\n")
    if found:
        import pictures

        pictures.draw_board(root / "board.png", [claims for _, claims in found])
        print(root / "board.png")
    return 0


def ranked_entries(root: Path) -> tuple[list[tuple[Path, dict]], list[tuple[Path, str]]]:
    """Entries under the tracks, best first; and what cannot be ranked, with the reason."""
    ranked, rest = [], []
    folders = [path for track in TRACKS for path in (root / track).glob("[!.]*") if path.is_dir()]
    for folder in sorted(folders):
        result = check_folder(folder)
        if result.findings:
            rest.append((folder, f"`check` has {len(result.findings)} findings"))
        else:
            ranked.append((folder, read_json(folder / "submission.json")))
    return sorted(ranked, key=lambda pair: pair[1]["val_bpb"]), rest


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    new = verbs.add_parser("new", help="build an entry's folder from run folders")
    new.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs/<RUN_ID>, one a seed")
    new.add_argument("--name", required=True, help="short; becomes the folder's name")
    new.add_argument("--author", required=True, help="who ran it")
    new.add_argument("--github-id", required=True, help="account of the author")
    new.add_argument("--blurb", required=True, help="what is new")
    open_tracks = [name for name, rules in TRACKS.items() if rules.state == tracks.OPEN]
    new.add_argument("--track", required=True, help=" or ".join(open_tracks))
    new.add_argument("--base", type=Path, help="entry it builds on: what changed is listed")
    today = time.strftime("%Y-%m-%d", time.gmtime())
    new.add_argument("--date", default=today, help="of the entry (default: today, %(default)s)")
    check = verbs.add_parser("check", help="do files, sums and rules of folders hold?")
    check.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    check.add_argument(
        "--rescore",
        action="store_true",
        help="score the artifact again with the folder's own script, which is run (minutes)",
    )
    one = verbs.add_parser("show", help="what an entry, a run or an artifact holds")
    one.add_argument("what", type=Path, metavar="ENTRY|RUN|ARTIFACT")
    one.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of the artifact")
    for verb in (check, one):
        verb.add_argument("-v", "--details", action="store_true", help="all that there is to say")
    two = verbs.add_parser("compare", help="is B better than A, or is it chance?")
    two.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="entries or runs")
    plot = verbs.add_parser("plot", help="loss, rate, scores and bytes of runs, live ones too")
    plot.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="runs or entries")
    plot.add_argument("--by", choices=("steps", "seconds", "tflops"), default="steps")
    plot.add_argument("--out", type=Path, default=Path("plot.png"), help="default: %(default)s")
    again = verbs.add_parser("repeat", help="train a seed of an entry again, compare the score")
    again.add_argument("folder", type=Path, metavar="ENTRY")
    again.add_argument("--seed", type=int, help="default: the entry's first")
    again.add_argument("--runs", type=Path, default=ROOT / "runs", help="default: runs")
    board = verbs.add_parser("board", help="write records/README.md and board.png")
    for verb in (new, board):
        verb.add_argument("--root", type=Path, default=RECORDS, help=argparse.SUPPRESS)
    for verb, function in (
        (new, verb_new),
        (check, verb_check),
        (one, verb_show),
        (two, verb_compare),
        (plot, verb_plot),
        (again, verb_repeat),
        (board, verb_board),
    ):
        verb.set_defaults(do=function)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Do what the command line asks; returns the exit code."""
    args = parse(arguments)
    try:
        return args.do(args)
    except ImportError as error:
        missing = str(error.name).partition(".")[0]
        hint = INSTALL_PICTURES if missing == "matplotlib" else f"pip install {missing}"
        print(f"error: {hint}", file=sys.stderr)
    except (Wrong, *MALFORMED, ValueError) as error:
        kind = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
        print(f"error: {kind}{one_line(str(error))}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    end_quietly()
    sys.exit(main(sys.argv[1:]))
