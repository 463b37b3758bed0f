"""Real training processes for tests: one process imports everything once and forks a fresh one for each run.

Also a method small enough to be repeated by hand: a frozen network with a low-rank addition, a head and word rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.checkpoints import write_tensors
from mezzotint.errors import InputError
from mezzotint.training import draws, loop, recipe, state, weights
from mezzotint.training.methods import Batch, Place

WIDTH = 6
PATIENCE = 60  # seconds a process may take


class Network(nn.Module):
    """y = head(norm(base x + up down dropout(x) + rows[word])); `spare` trains and is not used, `base` is frozen."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, 5).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.rows, self.norm = nn.Embedding(3, 5), nn.LayerNorm(5)
        self.head, self.spare = nn.Linear(5, 3), nn.Linear(4, 4)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("statistic", torch.ones(2))

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        return self.head(self.norm(self.base(x) + self.up(self.down(self.dropout(x))) + self.rows(word)))


class Regression:
    """Squared error against a fixed map, of pieces of a batch; follows the protocol of a method."""

    averaged = "network"

    def __init__(self, plan: recipe.Recipe, place: Place) -> None:
        self.plan, self.place = plan, place
        dropout = 0.25 if plan.accumulation > 1 else 0.0  # what it drops depends on the pieces
        self.trained: dict[str, nn.Module] = {"network": Network(dropout)}
        self.rates = {"network": 1.0, "network.head": 0.25, "network.head.bias": 3.0}
        self.decay = {"network.rows": 0.0}
        self.digests = {"data": "none"}
        self.followed: list[nn.Module] = []

    def averaging(self, network: nn.Module) -> None:
        self.followed.append(network)

    def draw(self, step: int) -> Batch:
        rng = draws.generator(self.plan.seed, step, "image")
        x = torch.randn(self.plan.batch, WIDTH, generator=rng)
        broken = Path(self.plan.data.folder) / f"broken-{step}"  # what this image becomes
        if broken.exists():
            x[int(broken.read_text())] = torch.inf
        word = torch.randint(3, (self.plan.batch,), generator=rng)
        return {"index": torch.arange(self.plan.batch), "x": x, "word": word, "y": x[:, :3].sin()}

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        error = (self.trained["network"](batch["x"], batch["word"]) - batch["y"]).square()
        return error.mean(), {"loss/first": error[:, 0].mean()}

    def names(self, batch: Batch) -> list[str]:
        return [f"image {i}" for i in batch["index"].tolist()]

    def validate(self, network: nn.Module) -> dict[str, float]:
        x = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)
        with torch.no_grad():
            return {"validation": float((network(x, torch.tensor([0, 1, 2, 0])) - x[:, :3].sin()).square().mean())}

    def preview(self, network: nn.Module, step: int) -> list[Any]:
        return []

    def save(self, network: nn.Module, folder: Path) -> None:
        assert not network.training
        folder.mkdir()
        write_tensors(folder / "network.safetensors", network.state_dict())


def regression_recipe(root: Path, out: str = "run", **changes: Any) -> dict[str, Any]:
    """A recipe of the small method; the tables of the full method satisfy the check and are not used."""
    (root / "train").mkdir(exist_ok=True)
    base: dict[str, Any] = {
        "method": "full", "out": str(root / out), "steps": 6, "batch": 4, "threads": 1, "log_every": 1,
        "data": {"folder": str(root / "train"), "size": [16, 16]}, "backbone": {"name": "unet"},
        "process": {"prediction": "flow", "schedule": {"kind": "rectified_flow"}},
        "optimiser": {"rate": 0.02, "decay": 0.1, "clip": 0.5, "warmup": 2},
        "ema": {"decay": 0.9}, "checkpoints": {"every": 2, "keep": 9}, "validation": {"every": 3},
    }  # fmt: skip
    return {**base, **changes}


class Nursery:
    """Trains in processes of its own."""

    def __init__(self, words: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        self.words = words
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(
        self, plan: dict[str, Any], moment: str = "-", *, where: int = 0, resume: bool = False, processes: int = 1,
        regression: bool = False,
    ) -> list[tuple[int, str]]:  # fmt: skip
        """Exit code (-9: killed) and last words of every process; at `moment` something happens to process `where`."""
        said = [self.words / f"{len(list(self.words.iterdir()))}-{rank}.txt" for rank in range(processes)]
        order = {"plan": plan, "moment": moment, "where": where, "resume": resume, "regression": regression}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({**order, "said": [str(path) for path in said]}) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self._read())
        return [(code, path.read_text() if path.exists() else "") for code, path in zip(codes, said, strict=True)]

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def nursery(words: Path) -> Iterator[Nursery]:
    """A nursery for a while."""
    found = Nursery(words)
    try:
        yield found
    finally:
        found.close()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _limit(largest: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))


def _child(order: dict[str, Any], rank: int) -> str:
    kind, _, value = order["moment"].partition(":") if rank == order["where"] else ("-", "", "")
    if kind == "largest":  # of any file: a disk that is too small
        _limit(int(value))
    if kind == "writing":  # in the middle of the checkpoint of that step, after some files of it
        write = state.write_tensors

        def dying(path: Path, tensors: Any) -> Path:
            if f"step-{int(value):08d}" in str(path) and "optimiser" in path.name:
                Path(path).write_bytes(b"half")
                _die()
            return write(path, tensors)

        state.write_tensors = dying
    if kind in ("renaming", "impatient"):  # everything written, not yet in place
        flush = state._flush

        def dying_flush(folder: Path) -> None:
            if f"step-{int(value):08d}" in str(folder):
                for _ in range(5):
                    os.kill(os.getpid(), signal.SIGKILL if kind == "renaming" else signal.SIGINT)
            flush(folder)

        state._flush = dying_flush

    advance = weights.advance

    def advancing(found: weights.Weights, plan: recipe.Recipe, step: int, rate: float) -> None:
        advance(found, plan, step, rate)
        if step + 1 != int(value or -1):
            return
        if kind == "step":
            _die()
        if kind == "full":  # from now on nothing can be written
            _limit(10)
        if kind == "interrupt":
            for _ in range(5):  # an impatient user
                os.kill(os.getpid(), signal.SIGINT)

    weights.advance = advancing
    if order["regression"]:
        loop.method = Regression
    try:
        outcome = loop.train(recipe.check(order["plan"], "test"), order["resume"])
    except InputError as error:
        return f"InputError: {error}"
    return f"{'finished' if outcome.finished else 'stopped'} {outcome.step}"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _serve() -> None:
    import accelerate  # noqa: F401 (now, not in every child)
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch.distributed.fsdp
    import torch.utils.tensorboard.writer  # noqa: F401

    from mezzotint.training.methods import full, vae  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["plan"]["method"] == "lora":
            import peft  # noqa: F401 (many seconds, once)
        world, port = len(order["said"]), _free_port()
        children: list[int] = []
        for rank, said in enumerate(order["said"]):
            process = os.fork()
            if process == 0:
                _live(order, rank, world, port, said)
            children.append(process)
        print(json.dumps([_wait(child, time.monotonic() + PATIENCE) for child in children]), flush=True)


def _wait(process: int, until: float) -> int:
    """Its exit code; -15 where it hung."""
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return -signal.SIGTERM


def _live(order: dict[str, Any], rank: int, world: int, port: int, said: str) -> None:
    words = ""
    try:
        if world > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            numbers |= {"MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in numbers.items()}, MASTER_ADDR="127.0.0.1")
        words = _child(order, rank)
    except BaseException:
        words = traceback.format_exc()
    finally:
        _limit(resource.RLIM_INFINITY)
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, words.encode())
        os._exit(0)


if __name__ == "__main__":
    _serve()
