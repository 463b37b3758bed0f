"""What is said, against the rules: words are folded first, so that no spelling slips past."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from mezzotint.governance.plugs import plugged
from mezzotint.governance.policy import Prompts

# Cyrillic and Greek letters that look like Latin ones, and digits and signs that stand for letters.
LOOKS = ("авекмнорстухіјѕԁӏαεικνορτυχω", "abekmhopctyxijsdlaeikvoptuxw"), ("013457@$€", "oieastase")
ALIKE = {ord(a): b for theirs, ours in LOOKS for a, b in zip(theirs, ours, strict=True)}
RUNS, SPELT = re.compile(r"[\W_]+"), re.compile(r"(?<!\S)(?:\w )+\w(?!\S)")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether something may be, and by which rule not."""

    allowed: bool
    rule: str = ""
    says: str = ""


ALLOWED = Verdict(True)
PromptFilter = Callable[[str, str, str], Verdict]  # prompt, negative prompt, class name


def judge(rules: Prompts, prompt: str, negative: str = "", label: str = "") -> Verdict:
    """The first rule that a request breaks. The negative prompt names what is kept away from, and only its length
    counts; so do deny rules for the class name."""
    for text in (prompt, negative):
        if len(text) > rules.longest:
            return Verdict(
                False, "prompts.longest", f"a prompt has {len(text)} characters, {rules.longest} are allowed"
            )
    if rules.classes and label not in rules.classes:
        allowed = ", ".join(rules.classes)
        return Verdict(False, "prompts.classes", f"the class '{label or 'none'}' is not among those allowed: {allowed}")
    for text in (prompt, label):
        for folded in (fold(text), joined(fold(text))):
            if phrase := next((each for each in rules.deny if fold(each) and f" {fold(each)} " in f" {folded} "), None):
                return Verdict(False, "prompts.deny", f"the prompt says what the policy denies: '{phrase}'")
            if pattern := next((each for each in rules.deny_patterns if re.search(each, folded)), None):
                says = f"the prompt matches what the policy denies: {pattern}"
                return Verdict(False, "prompts.deny_patterns", says)
    if rules.allow and prompt.strip() and (other := _beyond(rules.allow, prompt)):
        return Verdict(False, "prompts.allow", f"the prompt says what the policy does not know: '{other}'")
    if rules.plug:
        return plugged(rules.plug, Verdict)(prompt, negative, label)
    return ALLOWED


@lru_cache(maxsize=4096)
def fold(text: str) -> str:
    """Lower-case Latin words with single spaces: NFKC, no accents or invisible characters, look-alikes as Latin."""
    text = unicodedata.normalize("NFKC", text).casefold()
    parts = unicodedata.normalize("NFD", text)
    kept = "".join(c for c in parts if unicodedata.category(c) not in ("Mn", "Me", "Cf", "Cc") or c.isspace())
    return RUNS.sub(" ", kept.translate(ALIKE)).strip()


def joined(folded: str) -> str:
    """Words spelt letter by letter as words: `n u d e` is `nude`."""
    return SPELT.sub(lambda run: run[0].replace(" ", ""), folded)


def _beyond(allow: Sequence[str], prompt: str) -> str | None:
    """The first word of a prompt that no allowed phrase has."""
    known = {word for phrase in allow for word in fold(phrase).split()}
    return next((word for word in fold(prompt).split() if word not in known), None)
