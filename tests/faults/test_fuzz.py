"""Random environments: either settings that would start, or one line that names what is wrong."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import TinyData
from jobs import BARE_ENVIRONMENT, TINY, TRAINER

import plan
from train_gpt import (
    ALIASES,
    GPT,
    PARTS,
    PRESETS,
    RETIRED,
    Config,
    Refusal,
    Schedule,
    knob_of,
    route_parameters,
    sdpa_attention,
    show_setting,
)

SEED, MANY, FEW = 7, 5000, 400
OURS = [f.name.upper() for f in fields(Config)]
FIELDS = {f.name.upper(): f for f in fields(Config)}
PATHS = {"RUN_ID", "RUNS_DIR", "DATA_PATH", "TOKENIZER_PATH"}
ODD = [
    "",
    " ",
    "\t",
    "nan",
    "NaN",
    "inf",
    "-inf",
    "-0",
    "-1",
    "0",
    "1",
    "2",
    "1e3",
    "0x10",
    "1_000",
    "9" * 30,
    "9" * 5000,
    "-" + "9" * 400,
    "1e999",
    "True",
    "False",
    "yes",
    "None",
    "null",
    "1.0",
    "0.0",
    "1,2",
    "[1]",
    "\u0661\u0662",
    "\uff11",
    "\u00b2",
    "\U0001f600",
    "a\nb",
    "1\n",
    " 1 ",
    "\x01",
    "{x}",
    "{",
    "%s",
    "../..",
    "/",
    "mlp:6",
    "off",
    "auto",
    "\x1b[31m",
    "0,0",
    "1,,2",
    "-1,2",
    "blocks.0.attn.c_q:fp16",
    "mini",
    "mini,pr569",
    "pr569,",
]

OWNED_PREFIXES = tuple(prefix for part in PARTS for prefix in part.prefixes)


def misspelled(name: str, rng: random.Random) -> str:
    """A name one edit away."""
    at = rng.randrange(len(name) - 1)
    return rng.choice(
        [
            name[:at] + name[at + 1 :],
            name[:at] + name[at] + name[at:],
            name[:at] + name[at + 1] + name[at] + name[at + 2 :],
            name[:at] + rng.choice("ABCXYZ_") + name[at + 1 :],
            name.lower(),
            name + "S",
            name.replace("_", "", 1),
            name.replace("_", "-", 1),
        ]
    )


def a_value(name: str, rng: random.Random) -> str:
    """A value that may be right, at a limit, just beyond one, or nonsense."""
    if rng.random() < 0.25 or name not in FIELDS:
        return rng.choice(ODD)
    f = FIELDS[name]
    accepts = knob_of(f).accepts
    if isinstance(f.default, bool):
        return rng.choice(["0", "1"])
    if not accepts:
        return rng.choice([f.default, *ODD]) if rng.random() < 0.3 else show_setting(f.default)
    if isinstance(accepts[0], str):
        return rng.choice(accepts)
    low, high = accepts
    high = min(high, 10**7)
    if isinstance(f.default, int):
        return str(
            rng.choice(
                [
                    low,
                    high,
                    low - 1,
                    high + 1,
                    f.default,
                    rng.randint(low, high),
                    rng.randint(low, min(low + 20, high)),
                ]
            )
        )
    return repr(rng.choice([low, high, low - 1e-9, f.default, rng.uniform(low, high)]))


def an_environment(rng: random.Random) -> dict[str, str]:
    """A few of our names, aliases, retired and misspelled ones, and other programs' names."""
    env = {"PATH": "/bin", "HOME": "/root", "LANG": "C", "SPEED": "9", "TERM": "xterm"}
    if rng.random() < 0.4:
        env["PRESET"] = rng.choice([*PRESETS, "pr569,mini", "pr334,pr295,mini", "mini,pr334"])
    for _ in range(rng.choice([0, 1, 1, 2, 3, 8])):
        kind = rng.random()
        if kind < 0.65:
            env[name] = a_value(name := rng.choice(OURS), rng)
        elif kind < 0.8:
            name = rng.choice([*ALIASES, *RETIRED])
            values = ALIASES[name][1] if name in ALIASES else RETIRED[name]
            env[name] = rng.choice([*(values or ["0", "1", "16"]), rng.choice(ODD)])
        elif kind < 0.95:
            env[misspelled(rng.choice([*OURS, *ALIASES]), rng)] = rng.choice(["0", "1", "x"])
        else:
            env[rng.choice(OWNED_PREFIXES) + rng.choice(["X", "MODE_2", "\u00c4"])] = "1"
    return env


def complaint(env: dict[str, str]) -> tuple[Config | None, list[str], str]:
    """Settings and notes, or the words of a refusal."""
    try:
        return *Config.from_env(env), ""
    except Refusal as refusal:
        return None, [], str(refusal)


def check_environment(env: dict[str, str]) -> Config | None:
    """Assert what any environment gets; returns the settings, if it gave any."""
    cfg, notes, said = complaint(env)
    if cfg is None:
        assert len(said.splitlines()) == 1, said
        assert said.isprintable(), repr(said)
        assert len(said) < 400 + 2 * max(map(len, env.values())), said[:200]
        named = set(re.findall(r"[A-Za-z_0-9\u00c4-]{2,}", said))
        # It names what was given, or what a preset gave (a contradiction with a default).
        assert named & {*env, *OURS}, said
        given = set(env) - {"PATH", "HOME", "LANG", "SPEED", "TERM"}
        given |= {ALIASES[name][0] for name in given & set(ALIASES)}
        # Of several presets, one may contradict another: then their settings are named.
        assert named & given or "PRESET" in given, f"names nothing of {given}: {said}"
        return None
    assert all(note.isprintable() for note in notes), notes
    for name, text in env.items():
        if name in FIELDS:  # what was given is what the run has
            value = getattr(cfg, name.lower())
            assert type(value) is type(FIELDS[name].default)
            assert str(value) == text or value == type(value)(
                int(text) if isinstance(value, bool) else text
            ), name
        elif name in ALIASES or name in RETIRED:
            assert any(note.startswith(f"{name}=") for note in notes), name
        else:
            noted = any(note.startswith(f"{name}=") for note in notes)
            assert noted or not name.startswith(OWNED_PREFIXES), f"{name} was silently ignored"
    return cfg


def would_start(cfg: Config) -> None:
    """Routes, schedules and the plan of settings that were accepted."""
    import torch

    with torch.device("meta"):
        model = GPT(cfg, sdpa_attention, torch.float32)
    routed = sum(len(group["params"]) for group in route_parameters(cfg, model))
    assert routed == len(list(model.parameters()))
    schedule = Schedule(cfg, 1.0)
    for step, seconds in ((0, 0.0), (1, 0.5), (cfg.iterations, 1e6)):
        assert schedule.at(step, seconds).lr_scale >= 0.0
    assert all(line.isprintable() for line in plan.lines(cfg, 150_000))


def fuzz(count: int, plans: int) -> None:
    """Random environments; some of those accepted are looked at further."""
    rng, accepted, refused = random.Random(SEED), 0, 0
    for number in range(count):
        env = an_environment(rng)
        try:
            cfg = check_environment(env)
            accepted += cfg is not None
            refused += cfg is None
            if cfg is not None and accepted <= plans and cfg.num_layers * cfg.model_dim < 50_000:
                would_start(cfg)
        except Exception as error:
            raise AssertionError(f"environment {number}: {env!r}") from error
    print(f"{count} environments: {accepted} accepted, {refused} refused in one line")
    assert min(accepted, refused) > count // 8  # the fuzz reaches both ends


def test_a_few_hundred_environments() -> None:
    fuzz(FEW, plans=3)


@pytest.mark.slow
def test_five_thousand_environments() -> None:
    fuzz(MANY, plans=40)


def check_by_command(env: dict[str, str], data: TinyData, cwd: Path) -> int:
    """--check of an environment in a process of its own."""
    job = {**{name: value for name, value in TINY.items() if name != "PRESET"}, **data.env, **env}
    done = subprocess.run(
        [sys.executable, str(TRAINER), "--check"],
        capture_output=True,
        text=True,
        env={**BARE_ENVIRONMENT, **job},
        cwd=cwd,
        timeout=120,
    )
    if done.returncode == 0:
        assert done.stderr == "" and "ok: " in done.stdout
    else:
        assert done.returncode == 2, (env, done.stderr)
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stdout == ""
    assert not list(cwd.iterdir())
    return done.returncode


def by_command(count: int, data: TinyData, cwd: Path) -> None:
    rng, codes = random.Random(SEED + 1), []
    for _ in range(count):
        env = {k: v for k, v in an_environment(rng).items() if k not in os.environ}
        codes.append(check_by_command(env, data, cwd))
    print(f"{count} commands: {codes.count(0)} accepted, {codes.count(2)} refused")


def test_an_environment_by_command(tiny_data: TinyData, tmp_path: Path) -> None:
    by_command(2, tiny_data, tmp_path)


@pytest.mark.slow
def test_fifty_environments_by_command(tiny_data: TinyData, tmp_path: Path) -> None:
    by_command(50, tiny_data, tmp_path)
