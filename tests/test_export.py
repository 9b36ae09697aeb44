"""What an artifact holds, and the way out of here: safetensors that plain PyTorch loads."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TinyData
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from jobs import BARE_ENVIRONMENT, environment, snapshot, tiny_job

import train_gpt

sys.path.insert(0, str(ROOT / "records"))
import artifact
import record


@pytest.fixture(scope="module")
def run(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run."""
    folder = tmp_path_factory.mktemp("runs")
    with environment(**tiny_job(tiny_data, folder, "tiny", ITERATIONS="4")):
        assert train_gpt.main([]) == 0
    return folder / "tiny"


def read_safetensors(blob: bytes) -> dict[str, torch.Tensor]:
    """A reader of float32 made from the format's description alone."""
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    found, ends = {}, [0]
    for name, entry in header.items():
        assert entry["dtype"] == "F32"
        begin, end = entry["data_offsets"]
        assert begin == ends[-1]  # no holes
        ends.append(end)
        raw = blob[8 + size + begin : 8 + size + end]
        values = [int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)]
        bits = torch.tensor(values, dtype=torch.int64).to(torch.int32)
        found[name] = bits.view(torch.float32).reshape(entry["shape"])
    assert ends[-1] == len(blob) - 8 - size
    assert (8 + size) % 8 == 0
    return found


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one.view(torch.int32), two.view(torch.int32))


@settings(max_examples=25)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        hypothesis_numpy.arrays(
            "float32",
            hypothesis_numpy.array_shapes(min_dims=1, max_dims=2, max_side=5),
            elements=st.floats(width=32, allow_nan=False),
        ),
        max_size=4,
    )
)
def test_safetensors_hold_every_bit(arrays: dict) -> None:
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    blob = artifact.safetensors_bytes(tensors)
    found = read_safetensors(blob)
    assert list(found) == list(tensors)
    assert all(same_bits(found[name], tensors[name]) for name in tensors)
    try:
        from safetensors.torch import load
    except ImportError:
        return
    theirs = load(blob)
    assert theirs.keys() == tensors.keys()
    assert all(same_bits(theirs[name], tensors[name]) for name in tensors)


def test_an_exported_model_is_loaded_by_its_ten_lines_to_the_bit(
    run: Path, tiny_data: TinyData, tmp_path: Path
) -> None:
    """By load.py as it stands, in its own folder, without this repository."""
    out = tmp_path / "deep" / "out"
    assert artifact.main(["export", str(run / "artifact.bin"), str(out)]) == 0
    header, stored = train_gpt.read_artifact(run / "artifact.bin")
    found = read_safetensors((out / "model.safetensors").read_bytes())
    assert found.keys() == stored.keys()
    assert all(same_bits(found[name], stored[name].restore()) for name in stored)
    tokenizer = tiny_data.tokenizer_path
    assert (out / tokenizer.name).read_bytes() == tokenizer.read_bytes()
    assert json.loads((out / "config.json").read_text())["settings"] == header["settings"]
    code = (out / "load.py").read_text().partition("\nwith torch.no_grad")[0]
    said = [line for line in code.splitlines()[1:] if line.strip()]
    assert len(said) <= 12
    more = "\ntorch.save(logits, 'logits.pt')\n"
    done = subprocess.run(
        [sys.executable, "-c", (out / "load.py").read_text() + more],
        cwd=out,
        env=BARE_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    cfg = train_gpt.settings_within(header, {})[0]
    model = train_gpt.GPT(cfg)
    model.load_state_dict({name: tensor.restore() for name, tensor in stored.items()})
    with torch.no_grad():
        logits = model.logits(model.hidden(torch.tensor([[1, 2, 3]])))
    assert same_bits(torch.load(out / "logits.pt", weights_only=True), logits)
    assert "load.py" in (ROOT / "records" / "ARTIFACT.md").read_text()


def test_an_export_is_whole_or_not_at_all(run: Path, tmp_path: Path, capsys) -> None:
    sound = (run / "artifact.bin").read_bytes()
    damaged, alone = tmp_path / "damaged.bin", tmp_path / "alone.bin"
    damaged.write_bytes(sound[:-1])
    alone.write_bytes(sound)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    wrong = tmp_path / "wrong.model"
    wrong.write_bytes(b"x")
    before = snapshot(tmp_path)
    for words in (
        [str(alone), str(mine)],
        [str(damaged), str(tmp_path / "out")],
        [str(tmp_path / "nothing"), str(tmp_path / "out")],
        [str(alone), str(tmp_path / "out")],  # its tokenizer is nowhere to be found
        [str(alone), str(tmp_path / "out"), "--tokenizer", str(wrong)],
    ):
        with environment():
            assert artifact.main(["export", *words]) == 1
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == 1
        assert snapshot(tmp_path) == before


# What it holds


def test_show_adds_up_an_artifact(run: Path, tmp_path: Path, capsys) -> None:
    path, plot = run / "artifact.bin", tmp_path / "plot.png"
    assert record.main(["show", str(path), "--plot", str(plot)]) == 0
    said = capsys.readouterr().out
    _, stored = train_gpt.read_artifact(path)
    rows = {row.split()[0]: row.split()[1:] for row in said.splitlines() if row.endswith("%")}
    assert rows.keys() == stored.keys()
    for name, tensor in stored.items():
        shape, bits, raw, entropy, _ = rows[name]
        assert shape == ("x".join(map(str, tensor.values.shape)) or "1")
        values = tensor.values.flatten().tolist()
        if tensor.scale is None:
            assert (bits, raw) == ("fp16", f"{2 * len(values):,}")
            continue
        assert raw == f"{len(values) + 2 * len(tensor.scale):,}"
        largest = max(map(abs, values))
        assert int(bits) == next(width for width in range(1, 9) if 2 ** (width - 1) > largest)
        counts = [values.count(value) / len(values) for value in set(values)]
        coded = -len(values) * sum(share * math.log2(share) for share in counts) / 8
        right = coded + 2 * len(tensor.scale)
        assert float(entropy.replace(",", "")) == pytest.approx(right, abs=0.51)

    def total(words: str) -> int:
        return int(re.search(rf"^ *{words} +([0-9,]+)$", said, re.M)[1].replace(",", ""))

    assert total("artifact, compressed with zstd") == path.stat().st_size
    assert total("left of 16,000,000") == 16_000_000 - total("together")
    parts = total("integers, one byte each") + total("scales and floats, two bytes each")
    assert total("body before zstd") == parts + total(r"header \(settings, names, shapes\)")
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert record.main(["show", str(run)]) == 0
    assert "val_bpb" in capsys.readouterr().out


def test_show_of_hostile_artifacts_is_one_line(run: Path, tmp_path: Path, capsys) -> None:
    sound, path = (run / "artifact.bin").read_bytes(), tmp_path / "artifact.bin"
    header, stored = train_gpt.decode_artifact(sound)
    for blob in (b"", sound[:50], sound[:-1], b"x" + sound[1:], os.urandom(500)):
        path.write_bytes(blob)
        assert record.main(["show", str(path)]) == 1
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == 1
    odd = {f"$x^\n\x1b[2J.{n}.{name}": tensor for n, (name, tensor) in enumerate(stored.items())}
    path.write_bytes(train_gpt.encode_artifact(header, odd))
    assert record.main(["show", str(path), "--plot", str(tmp_path / "x.png")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    empty = {"a": train_gpt.Stored(torch.zeros(0, 4, dtype=torch.int8), torch.zeros(0).half())}
    path.write_bytes(train_gpt.encode_artifact(header, empty))
    assert record.main(["show", str(path), "--plot", str(tmp_path / "y.png")]) == 0
    assert artifact.anatomy(path).total("raw") == 0
