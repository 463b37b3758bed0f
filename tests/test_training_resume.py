"""A run killed at any moment and resumed ends with the weights of one that was never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_parts import full_recipe, image_folder, vae_recipe

from mezzotint.errors import InputError
from mezzotint.training import loop, metrics, recipe, state

# One process imports everything once and forks a fresh, real training process for each line it reads.
NURSERY = """
import json, os, resource, signal, sys, traceback
from pathlib import Path
import accelerate, matplotlib.backends.backend_agg, matplotlib.figure, torch.utils.tensorboard.writer
from mezzotint.errors import InputError
from mezzotint.training import loop, recipe, state
from mezzotint.training.methods import full, vae

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def child(plan, moment, resume, largest):
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    kind, _, value = moment.partition(":")
    if kind == "writing":  # in the middle of the checkpoint of that step, after some files of it
        write = state.write_tensors
        def dying(path, *rest):
            if f"step-{int(value):08d}" in str(path) and "optimiser" in path.name:
                Path(path).write_bytes(b"half")
                die()
            return write(path, *rest)
        state.write_tensors = dying
    if kind == "renaming":  # everything written, not yet in place
        flush = state._flush
        def dying_flush(folder):
            if f"step-{int(value):08d}" in str(folder):
                die()
            flush(folder)
        state._flush = dying_flush
    def step(done, total, loss):
        if kind == "step" and done == int(value):
            die()
        if kind == "interrupt" and done == int(value):
            for _ in range(5):  # an impatient user
                os.kill(os.getpid(), signal.SIGINT)
    try:
        outcome = loop.train(recipe.check(plan, "test"), resume, loop.Watch(step=step))
    except InputError as error:
        return f"InputError: {error}"
    return f"{'finished' if outcome.finished else 'stopped'} {outcome.step}"

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    process = os.fork()
    if process == 0:
        try:
            said = child(*order["child"])
        except BaseException:
            said = traceback.format_exc()
        try:
            descriptor = os.open(order["said"], os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, said.encode())
        finally:
            os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """run(plan, moment, resume, largest) trains in a process of its own: exit code (-9: killed) and what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    words = tmp_path_factory.mktemp("words")
    command = [sys.executable, "-c", NURSERY]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nursery:
        assert nursery.stdin is not None and nursery.stdout is not None
        stdin, stdout = nursery.stdin, nursery.stdout
        assert stdout.readline() == "ready\n"

        def train(plan: dict[str, Any], moment: str = "-", resume: bool = False, largest: int = 0) -> tuple[int, str]:
            said = words / f"{len(list(words.iterdir()))}.txt"
            stdin.write(json.dumps({"child": [plan, moment, resume, largest], "said": str(said)}) + "\n")
            stdin.flush()
            code = int(stdout.readline())
            return code, said.read_text() if said.exists() else ""

        yield train
        stdin.close()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint: weights, average, optimiser state."""
    last = state.newest(folder / loop.CHECKPOINTS)
    assert last is not None
    return {f"{path.name}/{k}": v for path in sorted(last.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_same(a: Path, b: Path) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 50
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("make", [full_recipe, vae_recipe], ids=["full", "vae"])
def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path, run: Run, make: Any) -> None:
    image_folder(tmp_path / "train", 10)
    loop.train(recipe.check(make(tmp_path, "whole"), "test"))
    broken = make(tmp_path, "broken")
    # before the first checkpoint, between two, while one is written, and after one is written but not yet named
    for moment in ("step:2", "step:5", "writing:6", "renaming:9", "step:11"):
        assert run(broken, moment, resume=True)[0] == -signal.SIGKILL
    assert run(broken, resume=True) == (0, "finished 12")
    assert_same(tmp_path / "whole", tmp_path / "broken")
    weights = sorted((tmp_path / "whole" / "model").rglob("*.safetensors"))
    assert weights
    for path in weights:
        other = tmp_path / "broken" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes()
    steps = [record["step"] for record in metrics.read(tmp_path / "broken")]
    assert steps == list(range(1, 13))  # every step once, although most were trained twice
    losses = [[record["loss"] for record in metrics.read(tmp_path / name)] for name in ("whole", "broken")]
    assert losses[0] == losses[1]
    assert not list((tmp_path / "broken" / "checkpoints").glob(".*"))  # nothing half-written is left


def test_pain_21_ctrl_c_saves_once_and_completely(tmp_path: Path, run: Run) -> None:
    image_folder(tmp_path / "train", 6)
    plan = full_recipe(tmp_path, steps=50, checkpoints={"every": 1000}, validation={"every": 1000})
    assert run(plan, "interrupt:3") == (0, "stopped 3")
    kept = state.complete(tmp_path / "run" / loop.CHECKPOINTS)
    assert [path.name for path in kept] == ["step-00000003"]
    assert state.facts(kept[0])["step"] == 3  # digests hold
    assert not (tmp_path / "run" / loop.MODEL).exists()


def test_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path: Path, run: Run) -> None:
    image_folder(tmp_path / "train", 6)
    plan = full_recipe(tmp_path, steps=6)
    loop.train(recipe.check({**plan, "out": str(tmp_path / "whole")}, "test"))
    assert run(plan, "step:4")[0] == -signal.SIGKILL
    before = {p.name: p.read_bytes() for p in (tmp_path / "run/checkpoints/step-00000003").iterdir()}
    largest = max(len(content) for content in before.values()) // 2
    _, said = run(plan, resume=True, largest=largest)
    assert said.startswith("InputError: cannot write the checkpoint"), said
    assert "step-00000003 is complete" in said
    assert said.count("\n") == 1
    after = {p.name: p.read_bytes() for p in (tmp_path / "run/checkpoints/step-00000003").iterdir()}
    assert after == before
    assert run(plan, resume=True) == (0, "finished 6")
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_resume_refuses_what_changed(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 6)
    plan = full_recipe(tmp_path, steps=3)
    loop.train(recipe.check(plan, "test"))
    with pytest.raises(InputError, match="holds a run already"):
        loop.train(recipe.check(plan, "test"))
    changed = {**plan, "optimiser": {"rate": 5e-4}}
    with pytest.raises(InputError, match=r"optimiser.rate: 0.0001 in the checkpoint, 0.0005 in the recipe"):
        loop.train(recipe.check(changed, "test"), resume=True)
    (tmp_path / "train" / "0.png").write_bytes((tmp_path / "train" / "2.png").read_bytes())
    # the cache notices the data first
    with pytest.raises(InputError, match="was made with data"):
        loop.train(recipe.check(plan, "test"), resume=True)
    for path in (tmp_path / "run" / "cache").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="its data had digest"):
        loop.train(recipe.check(plan, "test"), resume=True)


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path, run: Run) -> None:
    image_folder(tmp_path / "train", 6)
    plan = full_recipe(tmp_path, steps=2)
    inside: list[tuple[int, str]] = []
    watch = loop.Watch(step=lambda step, total, loss: inside.append(run(plan, resume=True)) if step == 1 else None)
    loop.train(recipe.check(plan, "test"), watch=watch)
    assert inside[0][1].startswith("InputError: another process is training in")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 6)
    plan = recipe.check(full_recipe(tmp_path, steps=3), "test")
    loop.train(plan)
    path = tmp_path / "run/checkpoints/step-00000003/ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"ema.safetensors is damaged"):
        loop.train(plan, resume=True)
