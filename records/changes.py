"""What changed between two scripts: a unified diff, and how many lines in which function."""

from __future__ import annotations

import ast
import difflib
import re
from collections import Counter
from collections.abc import Iterator

MAX_DIFF_BYTES = 200_000
PLACES_SHOWN = 40
HUNK = re.compile(r"@@ -\d+(?:,\d+)? \+(\d+)(?:,\d+)? @@")


def source_diff(old: str, new: str) -> str:
    """The unified diff, empty for equal scripts; cut where it would pass the bound, and says so."""
    lines = list(
        difflib.unified_diff(
            old.splitlines(), new.splitlines(), "base/train_gpt.py", "train_gpt.py", lineterm=""
        )
    )
    size = 0
    for number, line in enumerate(lines):
        size += len(line.encode()) + 1
        if size > MAX_DIFF_BYTES - 100:
            return "\n".join(
                [
                    *lines[:number],
                    f"# cut here: {len(lines) - number} lines more; "
                    "each script stands whole in its folder",
                    "",
                ]
            )
    return "\n".join([*lines, ""]) if lines else ""


def places_of(text: str, tree: ast.Module) -> list[str]:
    """For each line of a script: its section's banner, and the function, method or class."""
    lines = text.splitlines()
    places, section = [], "head"
    for number, line in enumerate(lines):
        if (
            line.startswith("# =====")
            and lines[number + 1 : number + 2]
            and (title := re.match(r"# (\w[^.]*)", lines[number + 1]))
        ):
            section = title[1].strip()
        places.append(section)

    def name(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                for n in range(first - 1, min(node.end_lineno or 0, len(places))):
                    places[n] = f"{places[n].split(': ')[0]}: {prefix}{node.name}"
                if isinstance(node, ast.ClassDef):
                    name(node.body, f"{prefix}{node.name}.")

    name(tree.body, "")
    return places


def counted(old: str, new: str, old_tree: ast.Module, new_tree: ast.Module) -> list[list]:
    """[place, lines added, lines removed] in the order of the new script, then what is gone."""
    a, b = old.splitlines(), new.splitlines()
    old_places, new_places = places_of(old, old_tree), places_of(new, new_tree)
    added: Counter[str] = Counter()
    removed: Counter[str] = Counter()
    for _, i, j, k, m in difflib.SequenceMatcher(None, a, b).get_opcodes():
        if a[i:j] != b[k:m]:
            removed.update(old_places[i:j])
            added.update(new_places[k:m])
    order = [p for p in dict.fromkeys([*new_places, *old_places]) if p in added or p in removed]
    return [[place, added[place], removed[place]] for place in order]


def misfits(diff: str, new: str) -> Iterator[str]:
    """Lines of a diff's new side that the script does not have where the diff says."""
    lines, at = new.splitlines(), None
    for number, line in enumerate(diff.splitlines(), start=1):
        if line.startswith(("--- ", "+++ ", "# cut here: ")) and (
            number < 3 or line.startswith("#")
        ):
            continue
        if hunk := HUNK.fullmatch(line):
            at = int(hunk[1]) - 1
        elif line[:1] in (" ", "+") and at is not None:
            if lines[at : at + 1] != [line[1:]]:
                yield f"source.diff:{number}: not what train_gpt.py:{at + 1} holds"
                return
            at += 1
        elif line[:1] != "-" or at is None:
            yield f"source.diff:{number}: not a line of a unified diff"
            return
