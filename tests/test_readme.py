"""The README's Python runs as it stands, block after block, with a small model where it names one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run_in_order(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    shutil.copytree(tiny_folder, tmp_path / "models" / "solar-cells")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert (tmp_path / "cell.png").is_file() and (tmp_path / "cracked.png").is_file()
    assert "clean" in capsys.readouterr().out


def test_every_verb_it_names_exists_and_no_verb_is_left_out() -> None:
    from mezzotint.cli.main import VERBS

    text = README.read_text()
    rows = set(re.findall(r"^\| `mezzotint (\w+)` \|", text, re.MULTILINE))
    assert rows == set(VERBS)
    assert set(re.findall(r"bin/mezzotint (\w+)", text)) <= set(VERBS)


def test_links_lead_to_files() -> None:
    pages = [README, *(README.parent / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name} links {link}"


def test_every_recipe_reads(tmp_path: Path) -> None:
    """Those in the documents and those of the repository: no unknown key, no table missing."""
    from mezzotint.training import recipe

    root = README.parent
    blocks = [
        block
        for page in (README, *(root / "docs").glob("*.md"))
        for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    assert len(blocks) >= 2
    for block in blocks:
        (tmp_path / "block.toml").write_text(block)
        recipe.read(tmp_path / "block.toml")
    own = [path for path in (root / "recipes").rglob("*.toml") if "method" in path.read_text()]
    assert len(own) >= 10
    for path in own:
        recipe.read(path)


def test_the_guide_names_every_method() -> None:
    from mezzotint.training.methods import METHODS

    text = (README.parent / "docs" / "fine-tuning.md").read_text()
    assert all(f"`{name}`" in text for name in METHODS)
