"""The artifacts of all entries under records/ are read, and give what they gave when made.

    python tests/test_kept_artifacts.py       write kept_artifacts.json anew

kept_artifacts.json holds, for each entry, the nats that its own train_gpt.py gives some rows of
ids that come from nowhere but their place; a new entry is added by the line above.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RECORDED = Path(__file__).with_name("kept_artifacts.json")
ENTRIES = sorted(path.parent for path in ROOT.glob("records/track_*/*/artifact.bin"))
ROWS, BOS_ID = 3, 1


def rows_of_ids(length: int, vocab_size: int) -> torch.Tensor:
    """Ids that look drawn, the same on every machine, with a document start here and there."""
    stream = hashlib.shake_256(b"rows of ids").digest(8 * ROWS * (length + 1))
    ids = np.frombuffer(stream, "<u8").reshape(ROWS, length + 1) % vocab_size
    ids[:, ::50] = BOS_ID
    return torch.from_numpy(ids.astype(np.int64))


def nats_of_rows(trainer, artifact: Path) -> tuple[list[float], dict, object]:
    """Mean nats of each row under the artifact's model; its header, its settings as read."""
    header, stored = trainer.read_artifact(artifact)
    cfg, _ = trainer.settings_within(header, {"COMPILE": "0"})
    run = trainer.Run(cfg, 0, 1, torch.device("cpu"))
    model = trainer.rebuild_model(cfg, stored, run)
    ids = rows_of_ids(cfg.eval_seq_len, cfg.vocab_size)
    with torch.no_grad():
        logits = model.logits(model.hidden(ids[:, :-1]))  # as every version so far can be asked
    chosen = logits.log_softmax(-1).take_along_dim(ids[:, 1:, None], -1)
    return (-chosen).double().reshape(ROWS, -1).mean(1).tolist(), header, cfg


def network_of(artifact: Path) -> str:
    """A digest of the weights that an artifact holds, without the text that it may hold too."""
    import train_gpt

    _, stored = train_gpt.read_artifact(artifact)
    digest = hashlib.sha256()
    for name, tensor in sorted(stored.items()):
        if tensor.kind != "packed":
            digest.update(name.encode() + tensor.restore().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_artifact_gives_the_nats_that_its_own_trainer_gave(entry: Path) -> None:
    import train_gpt

    recorded = json.loads(RECORDED.read_text())[entry.name]
    artifact = entry / "artifact.bin"
    assert hashlib.sha256(artifact.read_bytes()).hexdigest() == recorded["sha256"]
    nats, header, cfg = nats_of_rows(train_gpt, artifact)
    assert nats == pytest.approx(recorded["nats"], abs=2e-5)
    assert min(nats) > 1
    for name, text in header["settings"].items():  # as they were, not as the defaults are
        value = getattr(cfg, name.lower())
        assert (value if isinstance(value, str) else train_gpt.show_setting(value)) == text


def test_every_entry_is_recorded_and_each_differs() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert recorded.keys() == {entry.name for entry in ENTRIES}
    assert len({kept["sha256"] for kept in recorded.values()}) == len(ENTRIES) > 0
    # Entries may hold one network that they score in different ways; other networks differ.
    networks = {network_of(entry / "artifact.bin") for entry in ENTRIES}
    assert len({tuple(kept["nats"]) for kept in recorded.values()}) == len(networks)


def events_of(metrics: Path, kind: str) -> list[dict]:
    """The events of a kind in an entry's metrics."""
    return [event for event in map(json.loads, metrics.open()) if event["event"] == kind]


def logged_score(entry: Path) -> float:
    """val_bpb as the run that made the entry's artifact logged it."""
    digest = hashlib.sha256((entry / "artifact.bin").read_bytes()).hexdigest()
    for metrics in sorted(entry.glob("metrics_seed*.jsonl")):
        if any(event["sha256"] == digest for event in events_of(metrics, "artifact")):
            return events_of(metrics, "final")[-1]["val_bpb"]
    raise AssertionError(f"{entry}: no seed's metrics name this artifact")


def test_the_artifact_is_one_of_the_logged_seeds() -> None:
    for entry in ENTRIES:
        assert 1 < logged_score(entry) < 3


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_artifact_scores_as_its_log_says(entry: Path) -> None:
    """Over the whole validation text, by --eval. Only where that text has been prepared."""
    import train_gpt

    fingerprint = json.loads((entry / "submission.json").read_text())["data"]["fingerprint"]
    folders = [path.parent for path in ROOT.glob("data/datasets/*/fineweb_val.json")]
    if fingerprint not in [train_gpt.read_sidecar(str(f))["fingerprint"] for f in folders]:
        pytest.skip(f"no data set in data/datasets/ has fingerprint {fingerprint[:12]}")
    done = subprocess.run(
        [sys.executable, "train_gpt.py", "--eval", str(entry / "artifact.bin")],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("val_bpb:")][-1]
    score = float(said.split()[0].removeprefix("val_bpb:"))
    assert score == pytest.approx(logged_score(entry), abs=1e-5)


# Recording, each entry by its own trainer in a process of its own


def record_one(entry: Path) -> None:
    """Print the nats that the entry's own train_gpt.py gives."""
    spec = importlib.util.spec_from_file_location("train_gpt", entry / "train_gpt.py")
    assert spec is not None
    assert spec.loader is not None
    trainer = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = trainer
    spec.loader.exec_module(trainer)
    nats, _, _ = nats_of_rows(trainer, entry / "artifact.bin")
    digest = hashlib.sha256((entry / "artifact.bin").read_bytes()).hexdigest()
    print(json.dumps({"sha256": digest, "nats": nats}))


def record_all() -> None:
    """Write kept_artifacts.json."""
    recorded = {}
    for entry in ENTRIES:
        command = [sys.executable, __file__, str(entry)]
        said = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
        recorded[entry.name] = json.loads(said.splitlines()[-1])
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        record_one(Path(sys.argv[1]))
    else:
        record_all()
