"""The policy file, and what prompts it lets pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from mezzotint.errors import InputError
from mezzotint.governance import policy
from mezzotint.governance.policy import OFF, Prompts, read_policy
from mezzotint.governance.prompts import ALLOWED, Verdict, fold, judge

DEFAULT = read_policy()


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_default_is_safe_and_off_is_off() -> None:
    assert (DEFAULT.name, DEFAULT.signature.mode, DEFAULT.watermark.mode) == ("default", "always", "where possible")
    assert DEFAULT.pictures.unsafe == 0.8 and DEFAULT.prompts.deny and not DEFAULT.off
    assert read_policy("off") is OFF and OFF.off
    assert judge(OFF.prompts, "porn") == ALLOWED and OFF.pictures.unsafe is False and OFF.audit.file is False


def test_every_rule_changes_the_digest(tmp_path: Path) -> None:
    base = DEFAULT.model_dump(mode="json")
    digests = {DEFAULT.digest}
    for table, key, value in (
        ("prompts", "longest", 100), ("pictures", "copies", False), ("watermark", "mode", "off"),
        ("signature", "authority", "http://x"), ("licence", "use", "commercial"), ("audit", "file", False),
    ):  # fmt: skip
        digests.add(policy.Policy.model_validate({**base, table: {**base[table], key: value}}).digest)
    assert len(digests) == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "name: Field required"),
        ('name = "off"', "the name 'off' is taken"),
        ('name = "x"\n[promts]', "unknown key, nearest valid name: prompts"),
        ('name = "x"\n[prompts]\ndenny = ["a"]', "unknown key, nearest valid name: deny"),
        ('name = "x"\n[prompts]\ndeny_patterns = ["("]', "'(' is no regular expression"),
        ('name = "x"\n[watermark]\nmode = "sometimes"', "watermark.mode"),
        ('name = "x"\n[pictures]\nunsafe = nan', "pictures.unsafe"),
        ("name = ", "is not valid TOML"),
    ],
)
def test_wrong_files_are_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        read_policy(written(tmp_path / "policy.toml", text))
    assert said in str(raised.value) and "policy.toml" in str(raised.value)
    with pytest.raises(InputError, match="no such policy"):
        read_policy(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "prompt",
    [
        "a cracked solar cell", "", "visible to the naked eye", "nude lipstick on a white table", "oilseed rape",
        "classic brass fittings, Scunthorpe works", "cumin and sextant", "a button for kids", "Middlesex soil",
        "mono crack, 1300 px, grade A", "übergroße Risse in Glas", "裂纹的太阳能电池", "трещина на солнечном элементе",
    ],
)  # fmt: skip
def test_what_users_ask_for_passes(prompt: str) -> None:
    assert judge(DEFAULT.prompts, prompt) == ALLOWED


@pytest.mark.parametrize(
    "prompt",
    [
        "porn", "PORN", "p.o.r.n", "p o r n of cells", "p0rn", "ｐｏｒｎ", "p\u200born", "pórn", "роrn",
        "a naked woman",        "topless  models", "nude, sitting: man",
        "a child, entirely naked", "sexy photo of a teen", "n a k e d girl",
        "<porn>", "porn!", "a cell\nwith hentai",
    ],
)  # fmt: skip
def test_what_the_default_denies_is_denied_in_any_spelling(prompt: str) -> None:
    found = judge(DEFAULT.prompts, prompt)
    assert not found.allowed and found.rule in ("prompts.deny", "prompts.deny_patterns")
    assert prompt not in found.says or prompt == "porn"  # what was said is not said back


def test_a_negative_prompt_may_name_what_is_kept_away_from() -> None:
    assert judge(DEFAULT.prompts, "a woman", "nude, porn") == ALLOWED
    assert judge(Prompts(longest=10), "a", "b" * 11).rule == "prompts.longest"


def test_narrow_models_draw_what_they_may() -> None:
    rules = Prompts(classes=("mono crack", "poly crack"))
    assert judge(rules, "", label="mono crack") == ALLOWED
    found = judge(rules, "", label="mono inactive")
    assert (found.rule, "mono crack, poly crack" in found.says) == ("prompts.classes", True)
    assert judge(rules, "").rule == "prompts.classes"
    words = Prompts(allow=("a cracked solar cell", "dark"))
    assert judge(words, "A dark, cracked cell") == ALLOWED
    assert "'horse'" in judge(words, "a dark horse").says


def test_folding_is_stable_and_keeps_words_apart() -> None:
    assert fold("  A  Crack—in\tGlass ") == "a crack in glass" == fold(fold("A Crack—in Glass"))
    assert fold("Ångström") == "angstrom"


def always(prompt: str, negative: str, label: str) -> Verdict:
    return Verdict(False, "mine", "not today")


def broken(prompt: str, negative: str, label: str) -> bool:
    return True


def test_a_rule_of_ones_own_is_asked_and_must_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    name = Path(__file__).stem
    assert judge(Prompts(plug=f"{name}:always"), "a cell").says == "not today"
    with pytest.raises(InputError, match="must give a Verdict, not a bool"):
        judge(Prompts(plug=f"{name}:broken"), "a cell")
    with pytest.raises(InputError, match="which is not there"):
        judge(Prompts(plug="nothing.here:at_all"), "a cell")
