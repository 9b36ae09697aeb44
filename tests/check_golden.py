"""Compare train_gpt.py with numbers that a published system's own script produced.

    python tests/check_golden.py [FOLDER]

Without FOLDER the numbers are those of tests/golden/. FOLDER holds model_<PR>.npz for one or more
of the five systems: config_json (the script's constructor arguments), input_ids and target_ids,
every parameter as param/<name> or param_unbanked/<name>, logits, loss/<kind> and
grad/<kind>/<name> or grad_unbanked/<kind>/<name>; kind is ce, ce_qat or mile_<gamma>. Prints the
largest error of logits and losses, and of each gradient (or of its signed sums, where
golden_kit.py has no more of it) as a share of the tensor's largest element.
A folder may also hold model.npz and model.json of #1855 (tests/golden_1855.py): with and without
loops, packed by document and as rows.
Exit 0 if logits are within 2e-4, losses within 2e-4 and gradients within 1e-3, for #1855 within
2e-5, 2e-6 and 1e-4; 1 if not; 2 with one line if the folder cannot be used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import golden_kit
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import golden_1855

from train_gpt import GPT, PRESETS, Batch, Config, qat_grids, training_nats

LOGITS_WITHIN, LOSSES_WITHIN, GRADIENTS_WITHIN = 2e-4, 2e-4, 1e-3
FRONTIER_WITHIN = {"logits": 2e-5, "loss": 2e-6, "gradient": 1e-4}
FRONTIER = "model"  # the file of #1855
# Constructor arguments that change shapes or scales, which a folder may choose freely.
SIZES = (
    "vocab_size",
    "num_layers",
    "model_dim",
    "num_heads",
    "num_kv_heads",
    "mlp_mult",
    "logit_softcap",
    "rope_base",
    "bigram_vocab_size",
    "bigram_dim",
    "ve_dim",
    "ve_layers",
    "rope_dims",
    "rope_ntk_ref",
    "xsa_last_n",
    "cache_layer",
)


class Unusable(ValueError):
    """A folder that cannot be compared; the message is one line."""


def read_numbers(kit: Path, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The script's arguments and the arrays of a model_<PR>.npz; raises Unusable."""
    try:
        numbers = golden_kit.numbers(kit, name)
        config = json.loads(str(golden_kit.raw_numbers(kit, name)["config_json"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise Unusable(f"{kit}: {name}: {error}") from None
    return {**config, **config.get("constructor", {})}, numbers


def build(system: str, arguments: dict, numbers: dict[str, torch.Tensor]) -> GPT:
    """The system's preset at the folder's sizes, with its weights; raises Unusable."""
    sizes = {
        name: type(getattr(Config(), name))(arguments[name])
        for name in SIZES
        if isinstance(arguments.get(name), int | float | str)
    }
    rows = {
        "train_seq_len": 2,
        "train_batch_tokens": 2,
        "eval_seq_len": 2,
        "eval_stride": 0,
        "ttt_mode": "off",
    }
    model = GPT(Config(**{**PRESETS[system], **rows, **sizes}))
    given = {
        re.sub(r"^param(_unbanked)?/", "", name): value
        for name, value in numbers.items()
        if name.startswith("param")
    }
    expected = dict(model.named_parameters())
    if given.keys() != expected.keys():
        odd = sorted(given.keys() ^ expected.keys())
        raise Unusable(f"{system}: parameters differ, {', '.join(odd[:5])} on one side only")
    for name, p in expected.items():
        if p.numel() != given[name].numel() or (p.numel() > 1 and p.shape != given[name].shape):
            raise Unusable(
                f"{system}: {name} has shape {tuple(given[name].shape)}, expected {tuple(p.shape)}"
            )
        p.data.copy_(given[name].view_as(p))
    return model


def loss_of(model: GPT, numbers: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """The mean loss of the batch, of kind ce, ce_qat or mile_<gamma>."""
    gamma = torch.tensor(float(kind.removeprefix("mile_"))) if kind.startswith("mile_") else None
    nats, weights = training_nats(
        model,
        Batch(numbers["input_ids"].long(), numbers["target_ids"].long()),
        qat_grids(model) if kind == "ce_qat" else None,
        gamma,
    )
    return (weights * nats).sum() / weights.sum()


def compare(system: str, model: GPT, numbers: dict[str, torch.Tensor]) -> list[tuple]:
    """Rows (what, error, bound) of all that the folder states."""
    with torch.no_grad():
        logits = model.logits(model.hidden(numbers["input_ids"].long()))
    rows = [(f"{system} logits", float((logits - numbers["logits"]).abs().max()), LOGITS_WITHIN)]
    for key in [key for key in numbers if key.startswith("loss/")]:
        kind = key.removeprefix("loss/")
        model.zero_grad()
        loss = loss_of(model, numbers, kind)
        rows.append((f"{system} {key}", abs(loss.item() - numbers[key].item()), LOSSES_WITHIN))
        loss.backward()
        for name, (published, is_sums) in golden_kit.gradients(numbers, kind).items():
            ours = model.get_parameter(name).grad
            error = golden_kit.gradient_error(ours, published, is_sums)
            what = "sums of the gradient" if is_sums else "gradient"
            rows.append((f"{system} {kind} {what} {name}", error, GRADIENTS_WITHIN))
    return rows


def compare_frontier(folder: Path) -> list[tuple]:
    """Rows (what, error, bound) of #1855; raises Unusable."""
    try:
        numbers, facts = golden_kit.numbers(folder, FRONTIER), golden_kit.facts(folder, FRONTIER)
        model = golden_1855.build(numbers, facts)
        return list(frontier_rows(model, numbers, facts))
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise Unusable(f"{folder}: {FRONTIER}: {type(error).__name__} {error}") from None


def frontier_rows(model: GPT, numbers: dict[str, torch.Tensor], facts: dict) -> Iterator[tuple]:
    """What compare_frontier() compares."""
    within = FRONTIER_WITHIN
    for mode, form in itertools.product(("off", "on"), ("packed", "rows")):
        label = f"pr1855 {mode}/{form}"
        model.zero_grad()
        loss, nats, logits = golden_1855.loss_and_logits(model, numbers, facts, mode, form)
        error = (logits - numbers[f"logits/{mode}/{form}"]).abs().max()
        yield f"{label} logits", float(error), within["logits"]
        error = (nats - numbers[f"nll/{mode}/{form}"]).abs().max()
        yield f"{label} nats", float(error), within["logits"]
        published = facts["losses"][f"{mode}/{form}"]
        yield f"{label} loss", abs(loss.item() - published), within["loss"]
        loss.backward()
        if form == "packed":
            for name, ours, given, is_sums in golden_1855.gradients_of(model, numbers, facts, mode):
                error = golden_kit.gradient_error(ours, given, is_sums)
                yield f"{label} gradient {name}", error, within["gradient"]

    for mode in ("off", "on"):
        yield f"pr1855 {mode}/packed leak", golden_1855.leak(model, numbers, mode), 0.0


def compare_folder(folder: Path) -> list[tuple]:
    """Rows (what, error, bound) of every system in a folder; raises Unusable."""
    found = {name.replace("model_", "pr"): name for name in golden_kit.names(folder, "model_.*")}
    known = {system: name for system, name in found.items() if system in PRESETS}
    is_frontier = bool(golden_kit.names(folder, FRONTIER))
    if not known and not is_frontier:
        raise Unusable(f"{folder}: no model_<PR>.npz of {', '.join(PRESETS)[:-6]}, no model.npz")
    rows = compare_frontier(folder) if is_frontier else []
    for system, name in known.items():
        constructor, numbers = read_numbers(folder, name)
        rows += compare(system, build(system, constructor, numbers), numbers)
    return rows


def main(arguments: list[str]) -> int:
    """Compare every system of the folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    folder = parser.parse_args(arguments).folder
    folders = [golden_kit.SYSTEMS, golden_kit.PR1855] if folder is None else [folder]
    try:
        rows = [row for folder in folders for row in compare_folder(folder)]
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for what, error, bound in rows:
        print(f"{what:<64} {error:.2e}  {'ok' if error <= bound else f'above {bound:g}'}")
    bad = [what for what, error, bound in rows if not (math.isfinite(error) and error <= bound)]
    print(f"{len(rows)} compared, {len(bad)} outside")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
