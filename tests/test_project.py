"""The shape of the project: who may import whom, and what must not be imported early."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mezzotint"

# Plain data and plain helpers: they import nothing of ours but each other, and everyone may import them.
PLAIN = {"errors", "extras", "files", "digests", "images", "conditioning", "request"}

# A part imports the plain modules and parts of lower levels.
LEVELS = {
    "process": 0, "layers": 0, "cluster": 0,
    "sampling": 1, "guidance": 1, "backbones": 1, "codec": 1, "text": 1, "governance": 1, "data": 1,
    "checkpoints": 2, "adapters": 2, "contract": 2,
    "families": 3,
    "generate": 4, "batching": 4,
    "pipeline": 5,
    "training": 6, "synthesis": 6, "evaluate": 6, "plan": 6, "doctor": 6,
    "serve": 7,
    "cli": 8,
}  # fmt: skip

# On levels 0 and 1 parts see only their own column's lower level.
COLUMNS = ({"process", "sampling", "guidance"}, {"layers", "backbones", "codec", "text"}, {"governance", "data"})

# A framework is known to one part each, so that it can be replaced there.
HOMES = {
    "accelerate": {"training"},
    "tensorboard": {"training"},
    "transformers": {"text"},
    "tokenizers": {"text"},
    "peft": {"adapters", "training"},
    "tyro": {"cli"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
    "sqlalchemy": {"serve"},
    "alembic": {"serve"},
    "limits": {"serve"},
    "prometheus_client": {"serve"},
    "c2pa": {"governance"},
    "cryptography": {"governance"},
    "cyclonedx": {"governance"},
    "model_signing": {"governance"},
    "openlineage": {"governance"},
    "onnxruntime": {"governance"},
    "ray": {"cluster"},
    "mlflow": {"governance"},
    "torchvision": set[str](),
    "diffusers": set[str](),  # the oracle of the tests, never a part of the program
}


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module, packages as their own name."""
    for file in sorted(package.rglob("*.py")):
        parts = (package.name, *file.relative_to(package).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imports(name: str, file: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, inside functions and for type checking too."""
    home = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(home.split(".")[: len(home.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            yield from (f"{source}.{alias.name}" for alias in node.names)


def allowed(part: str, other: str) -> bool:
    """Whether `part` may import `other`, two different names directly under the package."""
    if part in PLAIN or other in PLAIN:
        return other in PLAIN
    low, high = LEVELS[other], LEVELS[part]
    if high <= 1:
        return low < high and any({part, other} <= column for column in COLUMNS)
    return low < high


def violations(package: Path) -> list[str]:
    """Every import that breaks the law, as `module imports module: why`."""
    found: list[str] = []
    for name, file in modules(package):
        part = [*name.split("."), ""][1]
        if part not in {*PLAIN, *LEVELS, "", "__main__"}:
            found.append(f"{name}: '{part}' has no place in the architecture")
            continue
        for target in imports(name, file):
            root, *rest = target.split(".")
            if root in HOMES and part not in HOMES[root]:
                found.append(f"{name} imports {target}: only {sorted(HOMES[root]) or 'nobody'} may")
            if root != package.name or not rest or part in ("", "__main__", rest[0]) or rest[0] == "__version__":
                continue
            if rest[0] not in {*PLAIN, *LEVELS}:
                found.append(f"{name} imports {target}: '{rest[0]}' has no place in the architecture")
            elif not allowed(part, rest[0]):
                found.append(f"{name} imports {target}: {part} may not know {rest[0]}")
    return found


def test_imports_keep_the_dependency_law() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "why"),
    [
        ("process/level.py", "from mezzotint.sampling import sample", "process may not know sampling"),
        ("sampling/loop.py", "import mezzotint.backbones.unet", "sampling may not know backbones"),
        ("sampling/loop.py", "from mezzotint import guidance", "sampling may not know guidance"),
        ("sampling/deep/er.py", "from ...codec import Codec", "sampling may not know codec"),
        ("data/folder.py", "from mezzotint.process import Process", "data may not know process"),
        ("training/loop.py", "def f():\n    from mezzotint.evaluate import distance", "training may not know evaluate"),
        ("images.py", "from mezzotint.codec import Codec", "images may not know codec"),
        ("helpers.py", "", "'helpers' has no place"),
        ("codec/x.py", "from mezzotint import helpers", "'helpers' has no place"),
        ("training/loop.py", "from diffusers import UNet2DModel", "nobody may"),
        ("synthesis/paint.py", "import accelerate", "only ['training'] may"),
        ("serve/workers.py", "def f():\n    import ray", "only ['cluster'] may"),
    ],
)
def test_the_law_is_seen_broken(tmp_path: Path, file: str, line: str, why: str) -> None:
    seeded = tmp_path / "mezzotint" / file
    seeded.parent.mkdir(parents=True)
    seeded.write_text(line)
    (found,) = violations(tmp_path / "mezzotint")
    assert why in found


def test_the_law_allows_what_it_should(tmp_path: Path) -> None:
    seeded = tmp_path / "mezzotint" / "sampling" / "loop.py"
    seeded.parent.mkdir(parents=True)
    lines = ("import torch", "from mezzotint.process import Level", "from mezzotint.errors import InputError")
    seeded.write_text("\n".join([*lines, "from . import path", "from .path import Path"]))
    (tmp_path / "mezzotint" / "__init__.py").write_text("from mezzotint.families import load\n")
    assert violations(tmp_path / "mezzotint") == []


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(
            line
            for extra in ("train", "text", "demo", "govern", "lineage", "mlflow", "serve", "ray")
            for line in extras[extra]
        ),
    ]
    declared = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in wanted}
    homes = metadata.packages_distributions()
    for name, file in modules(PACKAGE):
        for root in {target.partition(".")[0] for target in imports(name, file)}:
            if root not in {PACKAGE.name, "_typeshed", *sys.stdlib_module_names}:
                distributions = {each.lower().replace("_", "-") for each in homes.get(root, [root])}
                assert distributions & declared, f"{name} imports {root}, which pyproject.toml does not ask for"


HEAVY = {"torch", "numpy", "transformers", "accelerate", "matplotlib", "PIL", "pydantic"}


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import mezzotint", HEAVY),
        ("from mezzotint.cli.main import main; assert main(['--help']) == 0", HEAVY | {"tyro", "rich"}),
        ("from mezzotint.cli.main import main; assert main(['--version']) == 0", HEAVY | {"tyro", "rich"}),
    ],
)
def test_imports_stay_light(code: str, heavy: set[str]) -> None:
    assert loaded_after(code) & heavy == set()


def test_help_of_every_verb_comes_without_torch_and_shows_an_example() -> None:
    from mezzotint.cli.main import VERBS

    code = "\n".join(
        [
            "import contextlib, io",
            "from mezzotint.cli.main import VERBS, main",
            "for verb in VERBS:",
            "    said = io.StringIO()",
            "    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):",
            "        main([verb, '--help'])",
            "    assert f'mezzotint {verb} ' in said.getvalue().partition('usage:')[0], verb",
            "    assert '--json' in said.getvalue(), verb",
        ]
    )
    assert VERBS
    assert loaded_after(code) & {"torch", "transformers", "accelerate", "matplotlib"} == set()


def loaded_after(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter that ran `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_demo_installs_what_its_pictures_are_signed_and_traced_with() -> None:
    extras = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "mezzotint[govern,lineage]" in extras["demo"]
    assert "-e '.[demo]'" in (PACKAGE.parent / "Makefile").read_text()
