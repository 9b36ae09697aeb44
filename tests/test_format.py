"""The artifact's format by its page: a reader made from records/ARTIFACT.md and nothing else."""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import struct
import subprocess
import sys
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
import zstandard
from conftest import ROOT, TinyData
from jobs import BARE_ENVIRONMENT, TRAINER, tiny_job

import train_gpt
from train_gpt import CODECS, GPT, Config, Run, Stored

RECORD = ROOT / "records/track_cpu_5min/2026-11-25_Defaults-mini/artifact.bin"
LARGEST, LONGEST_HEADER = 268_435_456, 1_048_576


# A reader by the page


def need(holds: object, what: str) -> None:
    """Refuse the artifact unless it holds."""
    if not holds:
        raise ValueError(what)


def unpacked(codec: int, packed: bytes, size: int) -> bytes:
    """The body; raises ValueError or the codec's error."""
    if codec == 1:
        need(zstandard.frame_content_size(packed) == size, "size of the frame")
        body = zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    elif codec == 2:
        reader = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 26)
        body = reader.decompress(packed, size + 1)
        need(reader.eof and not reader.unused_data, "end of the stream")
    else:
        reader = brotli.Decompressor()
        body = reader.process(packed, output_buffer_limit=size + 1)
        need(reader.is_finished(), "end of the stream")
    need(len(body) == size, "size of the body")
    return body


def tensors_of(blob: bytes) -> tuple[dict, dict[str, tuple[np.ndarray, np.ndarray | None]]]:
    """Header, and by name values and scales, or an error."""
    need(52 <= len(blob) <= LARGEST, "size of the file")
    magic, version, codec, size = struct.unpack("<8sHHQ", blob[:20])
    need(magic == b"TINYGPT\n" and version in (1, 2) and codec in (1, 2, 3), "kind of file")
    need(hashlib.sha256(blob[52:]).digest() == blob[20:52], "sha256")
    need(size <= LARGEST, "bound of the body")
    body = unpacked(codec, blob[52:], size)
    (length,) = struct.unpack("<I", body[:4])
    need(length <= min(LONGEST_HEADER, size - 4), "length of the header")
    header = json.loads(body[4 : 4 + length].decode())
    texts = [header["tokenizer"], header["validation"], *header["settings"].values()]
    need(all(type(text) is str for text in texts), "texts")
    entries = header["tensors"]
    if version == 2:
        kinds = {"float": 0, "grid": 1}
        entries = [[name, kinds[kind], *sizes] for name, kind, *sizes in entries]
    for name, integer, *sizes in entries:
        need(integer in (0, 1) and type(integer) is int, "kind")
        need(type(name) is str and len(sizes) <= 2 and len(sizes) == 2 or not integer, "entry")
        need(all(type(n) is int and 0 <= n <= LARGEST for n in sizes), "sizes")
    need(len({name for name, *_ in entries}) == len(entries), "names")
    integers = sum(math.prod(sizes) for _, integer, *sizes in entries if integer)
    halves = [sizes[0] if integer else math.prod(sizes) for _, integer, *sizes in entries]
    need(4 + length + integers + 2 * sum(halves) == size, "payload")
    q, x = body[4 + length :], body[4 + length + integers :]
    found = {}
    for (name, integer, *sizes), count in zip(entries, halves, strict=True):
        floats, x = np.frombuffer(x[: 2 * count], "<f2"), x[2 * count :]
        need(np.isfinite(floats).all(), "finite")
        if integer:
            n = math.prod(sizes)
            found[name], q = (np.frombuffer(q[:n], "i1").reshape(sizes), floats), q[n:]
        else:
            found[name] = (floats.reshape(sizes), None)
    return header, found


# It reads what was written


def same(stored: dict[str, Stored], found: dict) -> bool:
    """Whether both are the same tensors, bit by bit."""
    return stored.keys() == found.keys() and all(
        np.array_equal(s.values.numpy(), found[name][0])
        and s.values.numpy().tobytes() == found[name][0].tobytes()
        and (s.scale is None) == (found[name][1] is None)
        and (s.scale is None or s.scale.numpy().tobytes() == found[name][1].tobytes())
        for name, s in stored.items()
    )


def quantized(seed: int, **settings: object) -> tuple[dict, dict[str, Stored]]:
    """A header and the tensors of a small model with random weights."""
    cfg = Config(
        vocab_size=64,
        num_layers=12,
        model_dim=16,
        num_heads=2,
        num_kv_heads=1,
        rope_dims=4,
        bigram_vocab_size=32,
        bigram_dim=4,
        ve_dim=4,
        int8_keep_float_max_numel=100,
        **settings,
    )
    torch.manual_seed(seed)
    run = Run(cfg, 0, 1, torch.device("cpu"))
    run.folder.log = run.folder.progress = lambda *rest, iterable=None, **more: iterable
    split = train_gpt.Validation(
        np.zeros(2, np.uint16),
        np.zeros(1, np.int16),
        "split",
        "pieces",
        documents=1,
        recorded_bytes=0,
    )
    model = GPT(cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return train_gpt.artifact_header(cfg, split), train_gpt.quantize(model, {}, run)


@pytest.mark.parametrize("codec", [*CODECS, "best"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"quant_clip": "std"}, {"tie_embeddings": False}],
    ids=["percentile", "std", "untied"],
)
def test_a_reader_made_from_the_page_reads_the_same_tensors(codec: str, settings: dict) -> None:
    header, stored = quantized(0, **settings)
    found_header, found = tensors_of(train_gpt.encode_artifact(header, stored, codec))
    assert same(stored, found)
    assert {**found_header, "tensors": 0} == {**header, "tensors": 0}
    name = "blocks.11.mlp.fc.weight"
    q, scale = found[name]
    restored = q.astype(np.float32) * scale.astype(np.float32)[:, None]
    assert restored.tobytes() == stored[name].restore().numpy().tobytes()


def test_it_reads_the_record_as_the_trainer_does() -> None:
    header, found = tensors_of(RECORD.read_bytes())
    read_header, stored = train_gpt.read_artifact(RECORD)
    assert header == read_header
    assert len(found) > 100
    assert same(stored, found)


def test_both_readers_refuse_the_same_files() -> None:
    header, stored = quantized(1)
    whole = train_gpt.encode_artifact(header, stored)
    body = zstandard.ZstdDecompressor().decompress(whole[52:])
    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(body)
        at = int(rng.choice((rng.integers(4), rng.integers(len(body)), len(body) - 9)))
        damaged[at] = rng.choice(np.frombuffer(b'09[]{},":\x00\x7c\xfe', np.uint8))
        packed = zstandard.compress(bytes(damaged[: len(body) - int(rng.integers(2))]))
        size = zstandard.frame_content_size(packed)
        blob = (
            struct.pack("<8sHHQ", b"TINYGPT\n", 2, 1, size)
            + hashlib.sha256(packed).digest()
            + packed
        )
        outcomes = []
        for reader in (tensors_of, train_gpt.decode_artifact):
            try:
                outcomes.append(reader(blob)[0])
            except (ValueError, KeyError, TypeError, struct.error, AttributeError):
                outcomes.append(None)
        assert outcomes[0] == outcomes[1]
        refused += outcomes[0] is None
    assert 100 < refused < 300


def test_the_page_states_the_bounds_and_numbers_of_the_file() -> None:
    page = (ROOT / "records/ARTIFACT.md").read_text()
    for number in (
        train_gpt.MAX_ARTIFACT_BYTES,
        train_gpt.MAX_BODY_BYTES,
        train_gpt.MAX_HEADER_BYTES,
    ):
        assert f"{number:,}" in page
    assert train_gpt.PRELUDE.size == 52
    assert "unsigned: 1 zstd, 2 xz (LZMA), 3 brotli" in page
    assert CODECS == {"zstd": 1, "lzma": 2, "brotli": 3}
    assert train_gpt.ARTIFACT_VERSION == 2
    assert "version 2." in page


# The same bytes


ENCODE = """
import hashlib, sys, torch, train_gpt
from pathlib import Path
header, stored = train_gpt.read_artifact(Path(sys.argv[1]))
torch.set_num_threads(int(sys.argv[2]))
for codec in (*train_gpt.CODECS, "best"):
    print(hashlib.sha256(train_gpt.encode_artifact(header, stored, codec)).hexdigest())
"""


def test_the_same_tensors_are_the_same_bytes_with_any_number_of_threads() -> None:
    found = []
    for threads in "124":
        env = BARE_ENVIRONMENT | dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads
        )
        done = subprocess.run(
            [sys.executable, "-c", ENCODE, RECORD, threads],
            text=True,
            env=env,
            cwd=ROOT,
            capture_output=True,
            check=True,
            timeout=300,
        )
        found.append(done.stdout.split())
    assert len(found[0]) == 4
    assert len(set(found[0])) == 3  # best is one of the others
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("threads", ["1", "2"])
def test_exporting_the_same_weights_twice_gives_the_same_bytes(
    threads: str, tiny_data: TinyData, tmp_path: Path
) -> None:
    env = {
        **BARE_ENVIRONMENT,
        **tiny_job(tiny_data, tmp_path, "run", ITERATIONS="3"),
        "OMP_NUM_THREADS": threads,
    }
    trained = subprocess.run(
        [sys.executable, TRAINER], env=env, text=True, capture_output=True, timeout=300
    )
    assert trained.returncode == 0, trained.stderr
    run, written = tmp_path / "run", []
    for _ in range(2):
        subprocess.run(
            [
                sys.executable,
                ROOT / "benchmarks/export.py",
                run,
                "CODEC=zstd",
                "QUANT_CLIP=std CODEC=best",
            ],
            env=env,
            cwd=ROOT,
            check=True,
            capture_output=True,
            timeout=300,
        )
        written.append([(run / f"artifact_{n}.bin").read_bytes() for n in (1, 2)])
    assert written[0] == written[1]
    assert written[0][0] == (run / "artifact.bin").read_bytes()  # as the run itself exported it
    assert written[0][1] != written[0][0]
