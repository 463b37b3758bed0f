"""`mezzotint certs` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mezzotint.cli.main import main


def test_certificates_are_made_shown_and_renewed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "certs")]
    assert main(["certs", "show", *out]) == 2
    assert "mezzotint certs init" in capsys.readouterr().err
    assert main(["certs", "init", *out, "--name", "Acme", "--days", "30", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["root"] == "Acme root" and first["pictures"].startswith("Acme pictures, until 20")
    assert Path(first["give to checkers"]).read_text().startswith("-----BEGIN CERTIFICATE-----")
    assert main(["certs", "init", *out]) == 2
    assert "holds certificates already" in capsys.readouterr().err
    assert main(["certs", "renew", *out, "--days", "400", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] > first["pictures"]
    assert main(["certs", "show", *out]) == 0
    assert "Acme models" in capsys.readouterr().out


def test_wrong_numbers_make_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certs", "init", "--out", str(tmp_path / "certs"), "--days", "0"]) == 2
    assert "--days must be 1 to 3650" in capsys.readouterr().err and not (tmp_path / "certs").exists()
