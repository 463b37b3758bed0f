"""The command as a whole: finding verbs, exit codes, and what is said when something outside us fails."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from mezzotint.cli import console
from mezzotint.cli.main import VERBS, main
from mezzotint.cli.options import condense, parse
from mezzotint.errors import InputError

COMMAND = [sys.executable, "-m", "mezzotint"]


def test_help_lists_every_verb_and_every_verb_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main([]) == 0
    said = capsys.readouterr().out
    for verb, summary in VERBS.items():
        assert f"  {verb} " in said and summary in said
        module = importlib.import_module(f"mezzotint.cli.{verb}")
        assert module.Options.__doc__ and callable(module.run)


def test_version_is_the_installed_one() -> None:
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"mezzotint {importlib.metadata.version('mezzotint')}\n"


@dataclass(frozen=True)
class Options:
    """A verb of the tests."""

    path: Path
    """A path."""
    steps: int = 3
    """A number."""
    json: bool = False
    """JSON."""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--path", "a", "--stpes", "4"], "probe has no option --stpes (did you mean '--steps'?)."),
        (["--path=a", "--zzzzzzzz=4"], "probe has no option --zzzzzzzz. `mezzotint probe --help` lists them."),
        (["--path", "a", "--steps", "many"], "probe: error parsing --steps: invalid literal"),
        (["--path"], "probe: missing value for argument '--path'"),
        ([], "probe: missing --path PATH. `mezzotint probe --help` says more."),
        (["--path", "a", "left", "over"], "left"),
    ],
)
def test_wrong_options_are_named_in_one_line(args: list[str], said: str) -> None:
    with pytest.raises(InputError) as raised:
        parse(Options, "probe", args)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value) and "│" not in str(raised.value)


def test_right_options_are_read() -> None:
    assert parse(Options, "probe", ["--path", "a/b", "--steps", "7", "--json"]) == Options(Path("a/b"), 7, True)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_complaints_come_out_of_their_frames(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    args = [*COMMAND, "generate", "--out", "x"]
    done = subprocess.run(args, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == "mezzotint: generate: missing --model PATH. `mezzotint generate --help` says more.\n"


def test_a_complaint_without_a_frame_is_kept() -> None:
    assert condense("Something new.\n") == "something new"


def failing(error: BaseException) -> Callable[[Options], int]:
    def run(options: Options) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("the sky is low: look up"), 2, "mezzotint: the sky is low: look up\n"),
        (KeyboardInterrupt(), 130, "mezzotint: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "big.bin"), 2, "mezzotint: the disk is full: big.bin."),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "mezzotint: Permission denied: /x/y\n"),
        (MemoryError(), 2, "mezzotint: not enough memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), 2, "not enough memory"),
    ],
)
def test_what_a_user_can_mend_is_said_without_a_traceback(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MEZZOTINT_DEBUG", raising=False)
    add_verb(monkeypatch, failing(error))
    assert main(["probe", "--path", "a"]) == code
    captured = capsys.readouterr().err
    assert said in captured and len(captured.splitlines()) <= 2 and "Traceback" not in captured


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    add_verb(monkeypatch, failing(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        main(["probe", "--path", "a"])


def test_debug_shows_where_an_input_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_DEBUG", "1")
    add_verb(monkeypatch, failing(InputError("wrong")))
    with pytest.raises(InputError):
        main(["probe", "--path", "a"])


@pytest.mark.parametrize("answer", [0, 1])
def test_a_verbs_answer_is_the_exit_code(answer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    add_verb(monkeypatch, lambda options: answer)
    assert main(["probe", "--path", "a"]) == answer


def add_verb(monkeypatch: pytest.MonkeyPatch, run: Callable[[Options], int]) -> None:
    module = ModuleType("mezzotint.cli.probe")
    module.__dict__.update(Options=Options, run=run)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(VERBS, "probe", "a verb of the tests")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")
def test_a_full_disk_under_stdout() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mezzotint: the disk is full") and len(done.stderr.splitlines()) == 1


def test_a_reader_that_goes_away() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as gone:
        done = subprocess.run([*COMMAND, "--help"], stdout=gone, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_facts_are_aligned_and_empty_ones_left_out() -> None:
    content = {"name": "x", "empty": None, "parts": {"backbone": {"parameters": 3}, "z": []}, "sizes": (1, 2)}
    assert console.facts(content).splitlines() == [
        "name   x",
        "parts",
        "  backbone",
        "    parameters  3",
        "sizes  1, 2",
    ]
