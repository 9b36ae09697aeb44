"""The artifact keeps every bit, and a reader survives whatever it is given instead."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from conftest import ROOT, TinyData
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import environment

import train_gpt
from train_gpt import (
    ARTIFACT_MAGIC,
    CODECS,
    GPT,
    PRELUDE,
    Config,
    Refusal,
    Run,
    Stored,
    Validation,
    artifact_header,
    compress,
    decode_artifact,
    decompress,
    encode_artifact,
    main,
    read_artifact,
    rebuild_model,
)

MEBIBYTE, FUZZ = 1 << 20, ROOT / "tests/fuzz_artifact.py"
RECORD = ROOT / "records/track_cpu_5min/2026-11-25_Defaults-mini/artifact.bin"
SPLIT = Validation(
    np.zeros(2, np.uint16),
    np.zeros(1, np.int16),
    fingerprint="the split",
    tokenizer_sha256="the tokenizer",
    documents=1,
    recorded_bytes=0,
)
SMALL = Config(
    vocab_size=16,
    num_layers=1,
    xsa_last_n=1,
    ve_layers="0",
    model_dim=8,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=4,
    bigram_vocab_size=8,
    bigram_dim=4,
    ve_dim=4,
)


def stored_tensor(shape: list[int], quantized: bool, rng: np.random.Generator) -> Stored:
    """Any bits an artifact may hold: int8 of the whole range, fp16 of any finite value."""
    halves = rng.integers(0, 1 << 16, shape[:1] if quantized else shape).astype(np.uint16)
    floats = np.where((halves & 0x7C00) == 0x7C00, np.uint16(0x8000), halves).view(np.float16)
    if not quantized:
        return Stored(torch.from_numpy(floats))
    integers = rng.integers(-128, 128, shape).astype(np.int8)
    integers[::2] = 0
    return Stored(torch.from_numpy(integers), torch.from_numpy(floats))


TENSORS = st.dictionaries(
    st.from_regex(r"[a-z]{1,3}(\.[0-9]{1,2}\.[a-z]{1,3})?", fullmatch=True),
    st.one_of(
        st.tuples(st.lists(st.integers(0, 9), min_size=2, max_size=2), st.just(True)),
        st.tuples(st.lists(st.integers(0, 9), max_size=2), st.just(False)),
    ),
    max_size=6,
)


def bits_of_tensors(stored: dict[str, Stored]) -> dict[str, tuple]:
    """Shapes and bytes of every tensor."""
    return {
        name: (
            s.kind,
            s.numbers(),
            *((a.shape, a.dtype, a.numpy().tobytes()) for a in s.arrays()),
        )
        for name, s in stored.items()
    }


# What is written


@settings(max_examples=40, deadline=None)
@given(TENSORS, st.integers(0, 99))
def test_every_bit_comes_back(shapes: dict, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stored = {name: stored_tensor(*shape, rng) for name, shape in shapes.items()}
    header = artifact_header(SMALL, SPLIT)
    packed = encode_artifact(header, stored, "range")
    assert bits_of_tensors(decode_artifact(packed)[1]) == bits_of_tensors(stored)
    blob = encode_artifact(header, stored)
    read_header, read = decode_artifact(blob)
    assert bits_of_tensors(read) == bits_of_tensors(stored)
    assert {name: read_header[name] for name in header} == header
    assert encode_artifact(header, dict(reversed(stored.items()))) == blob


def test_rows_are_restored_with_their_own_scale() -> None:
    stored = Stored(
        torch.tensor([[1, -2], [127, 0]], dtype=torch.int8), torch.tensor([0.5, 2.0]).half()
    )
    assert stored.restore().tolist() == [[0.5, -1.0], [254.0, 0.0]]
    assert Stored(torch.tensor(0.5).half()).restore().tolist() == 0.5


@pytest.mark.parametrize(
    "cfg",
    [
        Config(),
        SMALL,
        Config(
            logit_softcap=0.1 + 17,
            rope_base=1e9,
            tie_embeddings=False,
            mlp_mult=1 / 3,
            bits="mlp:fp16,attn:2,emb:8,aux:4",
            eval_stride=0,
            eval_truncate=True,
            ve_layers="10,9",
        ),
        Config(ve_layers="", bits="mlp:6,\tattn:6, emb:8,aux:8"),
    ],
    ids=["defaults", "small", "odd", "texts that are not printed as they are"],
)
def test_the_header_rebuilds_model_and_evaluation_settings(cfg: Config) -> None:
    header, _ = decode_artifact(encode_artifact(artifact_header(cfg, SPLIT), {}))
    read, notes = Config.from_env(header["settings"])
    assert notes == []
    for f in fields(Config):
        if f.name in train_gpt.settings_of_reach("model", "scoring"):
            assert getattr(read, f.name) == getattr(cfg, f.name), f.name
    assert (header["validation"], header["tokenizer"]) == ("the split", "the tokenizer")


def small_tensors() -> dict[str, Stored]:
    """The tensors of a small model, the larger matrices in integers."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    return {
        name: stored_tensor(list(p.shape), p.ndim == 2 and p.numel() > 64, rng)
        for name, p in GPT(SMALL).named_parameters()
    }


def test_the_rebuilt_model_holds_the_stored_values() -> None:
    stored = small_tensors()
    run = Run(SMALL, 0, 1, torch.device("cpu"))
    model = rebuild_model(
        SMALL, decode_artifact(encode_artifact({**artifact_header(SMALL, SPLIT)}, stored))[1], run
    )
    for name, p in model.named_parameters():
        assert torch.equal(p.data, stored[name].restore())
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert model(train_gpt.Batch(ids, ids + 1))[0].shape == (1, 4)


# What is refused


def refused(call: Callable[[], object]) -> str:
    """The one line a call is refused with."""
    with pytest.raises(Refusal) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def sealed(packed: bytes, body_bytes: int) -> bytes:
    """A prelude with a right checksum, whatever follows it."""
    return PRELUDE.pack(ARTIFACT_MAGIC, 1, 1, body_bytes, hashlib.sha256(packed).digest()) + packed


def forged(header: object, payload: bytes = b"", header_bytes: int | None = None) -> bytes:
    """An artifact with a right checksum around any header and payload."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = struct.pack("<I", len(text) if header_bytes is None else header_bytes) + text + payload
    return sealed(zstandard.compress(body), len(body))


def with_tensors(*tensors: list) -> dict:
    """A header that is right but for its tensors."""
    return {"settings": {}, "tokenizer": "", "validation": "", "tensors": list(tensors)}


def test_every_truncation_and_every_flipped_bit_is_refused() -> None:
    blob = encode_artifact(with_tensors(), {"w": Stored(torch.ones(3).half())})
    assert "w" in decode_artifact(blob)[1]
    for end in range(len(blob)):
        refused(lambda end=end: decode_artifact(blob[:end]))
    refused(lambda: decode_artifact(blob + b"\0"))
    for bit in range(8 * len(blob)):
        flipped = bytearray(blob)
        flipped[bit // 8] ^= 1 << bit % 8
        if flipped[8:10] == bytes([2, 0]):  # the version before, in which these tensors read alike
            (values,) = decode_artifact(bytes(flipped))[1]["w"].arrays()
            assert torch.equal(values, torch.ones(3).half())
            continue
        refused(lambda flipped=flipped: decode_artifact(bytes(flipped)))


ONE = struct.pack("<e", 1.0)
NAN, INF = struct.pack("<e", np.nan), struct.pack("<e", np.inf)


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        (with_tensors(["w", 0, 2]), ONE),
        (with_tensors(["w", 0, 1]), ONE * 2),
        (with_tensors(["w", 1, 1, 1]), ONE),
        (with_tensors(["w", 1, 2]), b"\1\1" + ONE * 2),
        (with_tensors(["w", 1]), b"\1" + ONE),
        (with_tensors(["w", 1, 1, 1, 1]), b"\1" + ONE),
        (with_tensors(["w", 0, 1, 1, 1]), ONE),
        (with_tensors(["w", 0, True]), ONE),
        (with_tensors([5, 0, 1]), ONE),
        (with_tensors(["w", 0, 1 << 40]), ONE),
        (with_tensors(["w", 0, 1 << 40, 1 << 40]), ONE),
        (with_tensors(["w", 0, -1]), ONE),
        (with_tensors(["w", 0, -1, -1]), ONE),
        (with_tensors(["w", 0, -1], ["v", 0, 2]), ONE),
        (with_tensors(["w", 1, -1, 0], ["v", 0, 1]), b""),
        (with_tensors(["w", 0, 0, 10**30]), b""),
        (with_tensors(["w", 0, 0, 1 << 62]), b""),
        (with_tensors(["w", 1, 0, 10**30]), b""),
        (with_tensors(*([f"w{n}", 1, 1 << 28, 1 << 28] for n in range(128))), b""),
        (with_tensors(["w", 0, 1], ["w", 0, 1]), ONE * 2),
        (with_tensors(["w", 0, 1]), NAN),
        (with_tensors(["w", 0, 1]), INF),
        (with_tensors(["w", 1, 1, 1]), b"\1" + NAN),
        (with_tensors(["w", 1, 1, 1]), b"\1" + INF),
        (with_tensors(["w", 0, float("inf")]), ONE),
        (with_tensors(["w", 0, float("nan")]), ONE),
        (with_tensors(["w", 0, None]), ONE),
        (with_tensors(["w", 0, [1]]), ONE),
        (with_tensors(["w", 0, 1e300]), ONE),
        (with_tensors(["w", 0, "one"]), ONE),
        (with_tensors(["w"]), b""),
        (with_tensors([]), b""),
        (with_tensors(5), b""),
        (with_tensors(None), b""),
        ({**with_tensors(), "tensors": 5}, b""),
        ({**with_tensors(), "tensors": "w"}, b""),
        ({**with_tensors(), "settings": []}, b""),
        ({**with_tensors(), "settings": {"SEED": 1}}, b""),
        ({**with_tensors(), "tokenizer": 5}, b""),
        ({**with_tensors(), "settings": None}, b""),
        ({"tensors": []}, b""),
        ([], b""),
        (5, b""),
        (with_tensors(["w", 2, 1, 1]), b"\0\0\0"),
        (with_tensors(["w", True, 1, 1]), b"\0\0\0"),
        (with_tensors(["w", "1", 1, 1]), b"\0\0\0"),
        (with_tensors(["w", 0, 1, 1, 1]), b"\0\0"),
        (json.dumps(with_tensors()).encode("utf-16"), b""),
        (json.dumps(with_tensors()).encode("utf-8-sig"), b""),
        (b"", b""),
        (b"{", b""),
        (b"\xff", b""),
        (b"[" * 100_000, b""),
        (b'{"a":' * 50_000, b""),
        *(
            ({name: fact for name, fact in with_tensors().items() if name != left_out}, b"")
            for left_out in with_tensors()
        ),
    ],
)
def test_a_header_that_lies_is_refused(header: object, payload: bytes) -> None:
    refused(lambda: decode_artifact(forged(header, payload)))


@pytest.mark.parametrize("header_bytes", [0, 1, 10_000, (1 << 20) + 1, (1 << 32) - 1])
def test_a_header_length_that_lies_is_refused(header_bytes: int) -> None:
    refused(lambda: decode_artifact(forged(with_tensors(), header_bytes=header_bytes)))


def body_of(stored: dict[str, Stored]) -> bytes:
    """The body of these tensors under no codec."""
    blob = encode_artifact(artifact_header(SMALL, SPLIT), stored)
    return zstandard.ZstdDecompressor().decompress(blob[PRELUDE.size :])


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_gives_back_what_it_was_given(codec: str) -> None:
    rng = np.random.default_rng(0)
    bodies = [rng.integers(0, 9, size).astype(np.uint8).tobytes() for size in (1, 1000, 100_000)]
    if codec == "range":  # it packs tensors, not just any bytes
        bodies = [body_of({}), body_of(small_tensors())]
    for body in bodies:
        size = len(body)
        packed = compress(body, codec)
        assert compress(body, codec) == packed
        assert decompress(packed, codec, size) == body
        for damaged, claimed in (
            (packed, size + 1),
            (packed, size - 1),
            (packed[:-1], size),
            (packed + b"\0", size),
            (b"", size),
            (packed[::-1], size),
        ):
            with pytest.raises(ValueError, match="."):
                decompress(damaged, codec, claimed)
    if codec != "range":
        assert decompress(compress(b"", codec), codec, 0) == b""
    stored = small_tensors()
    blob = encode_artifact(artifact_header(SMALL, SPLIT), stored, codec)
    assert bits_of_tensors(decode_artifact(blob)[1]) == bits_of_tensors(stored)


@pytest.mark.parametrize("kind", ["noise", "repeated", "text", "record", "coarser record"])
def test_zstd_packs_no_worse_than_its_level_as_it_comes(kind: str) -> None:
    rng = np.random.default_rng(0)
    noise = np.rint(rng.normal(0, 2.4, 300_000)).astype(np.int8).tobytes()
    text = json.dumps(artifact_header(Config(), SPLIT)).encode()
    header, stored = train_gpt.read_artifact(RECORD)
    header.pop("tensors")
    coarser = {
        name: s if s.scale is None else Stored((s.values / 2).round().to(s.values), s.scale)
        for name, s in stored.items()
    }
    record, coarser = (
        zstandard.ZstdDecompressor().decompress(encode_artifact(header, tensors)[PRELUDE.size :])
        for tensors in (stored, coarser)
    )
    body = {
        "noise": text + noise,
        "repeated": noise[:999] * 99,
        "text": text * 3,
        "record": record,
        "coarser record": coarser,
    }[kind]
    plain, packed = zstandard.ZstdCompressor(level=22).compress(body), compress(body, "zstd")
    assert len(packed) <= len(plain)
    assert kind != "record" or len(packed) < len(plain)
    assert kind != "coarser record" or len(packed) < 0.97 * len(plain)
    assert zstandard.ZstdDecompressor().decompress(packed) == body


def test_best_is_the_smallest_of_the_runtime_codecs() -> None:
    header, rng, won = artifact_header(SMALL, SPLIT), np.random.default_rng(0), set()
    repeated = np.tile(rng.normal(0, 9, 512), (9, 1))
    repeated_apart = np.tile(rng.normal(0, 9, (40, 512)), (9, 1))
    for values in (rng.normal(0, 2.4, (512, 512)), repeated, repeated_apart):
        stored = {
            "w": Stored(
                torch.from_numpy(np.rint(values).astype(np.int8)), torch.ones(len(values)).half()
            )
        }
        packed = {codec: encode_artifact(header, stored, codec) for codec in train_gpt.BEST_OF}
        best = encode_artifact(header, stored, "best")
        winner = min(packed, key=lambda codec: len(packed[codec]))
        assert best == packed[winner]
        won.add(winner)
        assert bits_of_tensors(decode_artifact(best)[1]) == bits_of_tensors(stored)
    assert len(won) > 1 and "range" in won


@pytest.mark.parametrize("codec", CODECS)
def test_a_bomb_of_any_codec_allocates_little(codec: str) -> None:
    zeros = Stored(torch.zeros(4096, 4096, dtype=torch.int8), torch.ones(4096).half())
    body = body_of({"w": zeros}) if codec == "range" else bytes(1 << 25)
    packed = compress(body, codec)
    blob = (
        PRELUDE.pack(ARTIFACT_MAGIC, 2, CODECS[codec], 1 << 16, hashlib.sha256(packed).digest())
        + packed
    )
    tracemalloc.start()
    try:
        refused(lambda: decode_artifact(blob))
        # Of 32 MiB: LZMA holds a dictionary of 8.
        assert tracemalloc.get_traced_memory()[1] < 16 * MEBIBYTE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["BITS", "CLIP_SIGMAS"])
def test_a_layer_of_thousands_of_digits_is_refused(name: str) -> None:
    """Python would not turn it into a number."""
    text = f"mlp:6,attn:6,emb:8,aux:8,blocks.{'9' * 5000}.mlp.fc:8"
    assert name in refused(lambda: Config.from_env({name: text}))


@pytest.mark.parametrize("codec", CODECS)
def test_version_2_is_read(codec: str) -> None:
    """It differs by the number alone, where the range coder predicts no matrix."""
    stored = {"w": stored_tensor([30, 20], True, np.random.default_rng(0))}
    header = {"settings": {}, "tokenizer": "", "validation": ""}
    blob = bytearray(encode_artifact(header, stored, codec))
    assert blob[8:10] == b"\3\0"
    blob[8] = 2
    assert torch.equal(decode_artifact(bytes(blob))[1]["w"].values, stored["w"].values)


def test_an_unknown_codec_is_refused() -> None:
    for version, number in (
        (3, 0),
        (2, 5),
        (1, 4),
        (3, 65535),
        (4, 1),
    ):  # range is younger than version 1
        blob = PRELUDE.pack(ARTIFACT_MAGIC, version, number, 0, hashlib.sha256(b"").digest())
        assert f"codec {number}" in refused(lambda blob=blob: decode_artifact(blob))


BODY = struct.pack("<I", 2) + b"{}" + bytes(994)
FRAME = zstandard.compress(BODY)
FRAME_OF_500 = FRAME.replace(struct.pack("<H", 1000 - 256), struct.pack("<H", 500 - 256), 1)


@pytest.mark.parametrize(
    ("packed", "body_bytes"),
    [
        (b"", 0),
        (b"no frame at all", 15),
        (zstandard.compress(b""), 0),
        (zstandard.compress(b"abc"), 3),
        (FRAME, 999),
        (FRAME, 1001),
        (FRAME, (1 << 30) + 1),
        (FRAME, (1 << 64) - 1),
        (FRAME, 0),
        (FRAME_OF_500, 500),
        (FRAME[:-1], 1000),
        (FRAME + b"\0", 1000),
        (FRAME + FRAME, 1000),
        (zstandard.ZstdCompressor(write_content_size=False).compress(BODY), 1000),
        (b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"skip", 0),
    ],
    ids=[
        "nothing",
        "no frame",
        "empty body",
        "short body",
        "one less",
        "one more",
        "above bound",
        "huge",
        "zero",
        "frame lies",
        "cut",
        "trailing byte",
        "two frames",
        "no size",
        "skippable",
    ],
)
def test_a_body_that_is_not_what_its_length_says_is_refused(packed: bytes, body_bytes: int) -> None:
    assert FRAME_OF_500 != FRAME
    refused(lambda: decode_artifact(sealed(packed, body_bytes)))


def test_random_damage_under_a_right_checksum_is_read_or_refused() -> None:
    header = {**with_tensors(["a.0.w", 1, 2, 3], ["b", 0, 2], ["c", 0]), "settings": {"SEED": "1"}}
    text = json.dumps(header).encode()
    body = struct.pack("<I", len(text)) + text + bytes(range(1, 7)) + ONE * 5
    assert set(decode_artifact(sealed(zstandard.compress(body), len(body)))[1]) == {
        "a.0.w",
        "b",
        "c",
    }
    rng, read = random.Random(0), 0
    for _ in range(2000):
        damaged = bytearray(body)
        for _ in range(rng.randint(1, 3)):
            # Of the bytes that JSON is made of, so that much of the damage still parses.
            damaged[rng.randrange(len(damaged))] = rng.choice(b'0123456789-.e[]{}",: nIN\x00\xff')
        try:
            decode_artifact(sealed(zstandard.compress(bytes(damaged)), len(damaged)))
            read += 1
        except Refusal as refusal:
            assert len(str(refusal).splitlines()) == 1
    assert 0 < read < 2000


def test_hostile_artifacts_are_read_or_refused_within_bounds() -> None:
    done = subprocess.run(
        [sys.executable, FUZZ, "3000", "--seed", "7"],
        text=True,
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3,000 inputs of up to 4,095 bytes" in done.stdout


# By what the fuzzer says of them.
PLANTED_FAULTS = {
    "ZeroDivisionError": "train_gpt.tensors_in_body = lambda body, start, rows: 1 / 0",
    "TimeoutError": "fuzz_artifact.SECONDS = 0",
    "MemoryError": "decode = train_gpt.decode_artifact; train_gpt.decode_artifact = "
    "lambda blob: [bytearray(2 << 30), decode(blob)][1]",
    "no short line": "train_gpt.Refusal.__str__ = lambda self: 'x' * 2000",
}
FUZZ_IN_FORKS = """
import os
import sys
import fuzz_artifact, train_gpt
for fault in sys.argv[1:]:
    if not os.fork():  # each fault in a process that has imported torch already
        exec(fault)
        print(fuzz_artifact.fuzz(2000, 0), end="\\n---\\n", flush=True)
        os._exit(0)
    os.wait()
"""


def test_the_fuzzer_finds_planted_faults() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FUZZ_IN_FORKS, *PLANTED_FAULTS.values()],
        text=True,
        capture_output=True,
        check=True,
        timeout=300,
        cwd=FUZZ.parent,
    )
    outputs = done.stdout.removesuffix("\n---\n").split("\n---\n")
    for said, output in zip(PLANTED_FAULTS, outputs, strict=True):
        assert said in output
        assert output.endswith("\n1")


@pytest.mark.parametrize(
    "blob",
    [
        lambda: sealed(FRAME, 1 << 29),
        lambda: sealed(FRAME, (1 << 30) + 1),
        lambda: forged(with_tensors(["w", 1, 1 << 15, 1 << 14]), ONE),
        lambda: forged(with_tensors(["w", 0, 1 << 28], ["v", 0, 1 << 28])),
        lambda: sealed(zstandard.compress(bytes(1 << 28)), 1 << 20),
    ],
    ids=["length", "bound", "integers", "floats", "bomb"],
)
def test_a_lie_about_size_allocates_nothing(blob: Callable[[], bytes]) -> None:
    content = blob()
    tracemalloc.start()
    try:
        refused(lambda: decode_artifact(content))
        assert tracemalloc.get_traced_memory()[1] < 4 * MEBIBYTE
    finally:
        tracemalloc.stop()


def test_files_that_cannot_be_artifacts_are_refused(tmp_path: Path) -> None:
    assert "no such artifact" in refused(lambda: read_artifact(tmp_path / "none.bin"))
    assert str(tmp_path) in refused(lambda: read_artifact(tmp_path))
    (tmp_path / "empty.bin").touch()
    assert "empty.bin" in refused(lambda: read_artifact(tmp_path / "empty.bin"))
    with open(tmp_path / "huge.bin", "wb") as huge:
        huge.truncate(1 << 40)
    assert "1,099,511,627,776 bytes" in refused(lambda: read_artifact(tmp_path / "huge.bin"))


def changed(edit: Callable[[dict], object]) -> dict[str, Stored]:
    """The small model's tensors, edited."""
    stored = small_tensors()
    edit(stored)
    return stored


@pytest.mark.parametrize(
    "edit",
    [
        lambda stored: stored.pop("tok_emb.weight"),
        lambda stored: stored.update(more=Stored(torch.ones(1).half())),
        lambda stored: stored.update({"lm_head.weight": stored["tok_emb.weight"]}),
        lambda stored: stored.update({"smear.gate": Stored(torch.ones(8, 1).half())}),
        lambda stored: stored.update({"smear.gate": Stored(torch.ones(9).half())}),
        lambda stored: stored.update({"bigram.scale": Stored(torch.ones(1).half())}),
    ],
    ids=["missing", "more", "untied", "dimensions", "length", "scalar"],
)
def test_tensors_of_another_model_are_refused(edit: Callable[[dict], object]) -> None:
    run = Run(SMALL, 0, 1, torch.device("cpu"))
    assert "tensors" in refused(lambda: rebuild_model(SMALL, changed(edit), run))


# --eval


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"NUM_LAYERS": "65"}, "NUM_LAYERS=65"),
        ({"NUM_LAYERS": "nine"}, "NUM_LAYERS=nine"),
        ({"NUM_LAYERS": "99\n"}, "NUM_LAYERS="),
        ({"MODEL_DIM": "9"}, "MODEL_DIM=9"),
        ({"LOGIT_SOFTCAP": "nan"}, "LOGIT_SOFTCAP=nan"),
        ({"TWO\nLINES": "1"}, "TWO"),
        ({"EVAL_STRIDE": "9999"}, "EVAL_STRIDE=9999"),
        ({"NEW_TECHNIQUE": "1"}, "NEW_TECHNIQUE"),
        ({"MATRIX_LR": "0.1"}, "MATRIX_LR"),
        ({"DATA_PATH": "/"}, "DATA_PATH"),
        ({"PRESET": "mini"}, "PRESET"),
        ({"LATE_QAT": "0"}, "LATE_QAT"),
        ({"LOGIT_SOFTCAP": None}, "LOGIT_SOFTCAP"),
        ({"EVAL_STRIDE": None}, "EVAL_STRIDE"),
    ],
)
def test_an_artifact_with_wrong_settings_exits_2(
    wrong: dict, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    header = artifact_header(SMALL, SPLIT)
    changed = {**header["settings"], **wrong}
    header["settings"] = {name: text for name, text in changed.items() if text is not None}
    (tmp_path / "artifact.bin").write_bytes(encode_artifact(header, small_tensors()))
    with environment():
        assert main(["--eval", str(tmp_path / "artifact.bin")]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")
    assert said in err.replace("'", "")


def test_a_name_of_two_lines_is_refused_as_another_model(
    tiny_data: TinyData, tmp_path: Path, capfd
) -> None:
    val = train_gpt.load_validation(train_gpt.Config.from_env(tiny_data.env)[0])
    cfg = Config(**{**vars(SMALL), "vocab_size": int(tiny_data.env["VOCAB_SIZE"])})
    stored = {**small_tensors(), "blocks\n0": Stored(torch.ones(3).half())}
    (tmp_path / "a.bin").write_bytes(encode_artifact(artifact_header(cfg, val), stored))
    paths = {name: tiny_data.env[name] for name in ("DATA_PATH", "TOKENIZER_PATH")}
    with environment(**paths):
        assert main(["--eval", str(tmp_path / "a.bin")]) == 2
    assert "not those of the model" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"TTT_ENABLED": "0"}, "no validation split"),
        ({"TTT_MODE": "off"}, "no validation split"),
        ({"VRL": "0"}, "VRL_MODE is set, but the artifact says"),
        ({"NUM_LAYERS": "3"}, "NUM_LAYERS is set, but the artifact says"),
    ],
)
def test_what_is_given_is_seen_apart_from_what_the_header_says(
    given: dict, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An old name of an evaluation setting overrides it; one of a model setting cannot."""
    cfg = replace(SMALL, ttt_mode="score_first", ttt_freeze_blocks=0)
    (tmp_path / "a.bin").write_bytes(encode_artifact(artifact_header(cfg, SPLIT), small_tensors()))
    with environment(**given):
        assert main(["--eval", str(tmp_path / "a.bin")]) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("wrong", [b"", b"text"])
def test_a_brotli_artifact_without_brotli_says_what_is_missing(
    wrong: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "brotli", None)
    assert "needs the Python package brotli" in refused(lambda: decompress(wrong, "brotli", 4))


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ((), "no validation split with fingerprint"),
        (("validation",), "no tokenizer with sha256"),
        (("validation", "tokenizer"), "not those of the model"),
    ],
)
def test_an_artifact_of_other_data_or_another_model_exits_2(
    known: tuple[str, ...],
    said: str,
    tiny_data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = Config(**{**vars(SMALL), "vocab_size": int(tiny_data.env["VOCAB_SIZE"])})
    val = train_gpt.load_validation(
        Config(
            data_path=str(tiny_data.data_path),
            tokenizer_path=str(tiny_data.tokenizer_path),
            vocab_size=cfg.vocab_size,
        )
    )
    facts = artifact_header(cfg, val)
    header = {**artifact_header(cfg, SPLIT), **{name: facts[name] for name in known}}
    Path("artifact.bin").write_bytes(encode_artifact(header, small_tensors()))
    with environment(
        DATA_PATH=str(tiny_data.data_path), TOKENIZER_PATH=str(tiny_data.tokenizer_path)
    ):
        assert main(["--eval", "artifact.bin"]) == 2
    err = capfd.readouterr().err
    assert (err.count("\n"), err[:7]) == (1, "error: ")
    assert said in err


def test_a_damaged_side_file_elsewhere_does_not_hide_the_data(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for i, content in enumerate(("{", '{"tokenizer": {"sha256": "x"}, "val_shards": {"a": 5}}')):
        (tmp_path / f"data/datasets/{i}").mkdir(parents=True)
        (tmp_path / f"data/datasets/{i}/fineweb_val.json").write_text(content)
    (tmp_path / "data/datasets/tiny").symlink_to(tiny_data.data_path)
    (tmp_path / "data/tokenizers").symlink_to(tiny_data.tokenizer_path.parent)
    val = train_gpt.load_validation(
        Config(
            data_path=str(tiny_data.data_path),
            tokenizer_path=str(tiny_data.tokenizer_path),
            vocab_size=int(tiny_data.env["VOCAB_SIZE"]),
        )
    )
    found = train_gpt.locate_validation(Config(), artifact_header(SMALL, val))
    assert (found.data_path, found.tokenizer_path) == (
        "data/datasets/tiny",
        f"data/tokenizers/{tiny_data.tokenizer_path.name}",
    )
