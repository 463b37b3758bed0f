"""Who may ask: keys with roles and quotas, and browsers that were signed in with one.

A key is shown once; its SHA-256 is kept, and of a browser's token no more."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError

from mezzotint.errors import InputError
from mezzotint.serve.store import Store, new_id
from mezzotint.serve.tables import Key, SignedIn

ROLES = ("user", "viewer", "admin")
PREFIX = "mz-"
SHIFT = 12 * 3600.0  # seconds that a browser stays signed in


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks."""

    id: str
    name: str
    role: str  # user: asks, and sees what is its own; viewer: sees everything; admin: both
    per_minute: int | None = None
    per_day: int | None = None

    @property
    def asks(self) -> bool:
        return self.role in ("user", "admin")

    @property
    def sees_all(self) -> bool:
        return self.role in ("viewer", "admin")


ANYBODY = Caller("anybody", "anybody on this machine", "admin")  # where no keys are configured, on loopback alone


def add(store: Store, name: str, role: str = "user", per_minute: int | None = None, per_day: int | None = None) -> str:
    """Make a key and return it; it cannot be shown again."""
    if not re.fullmatch(r"[\w .@-]{1,80}", name):
        raise InputError(f"the name of a key is 1 to 80 letters, digits, spaces and . @ _ -, not {name!r}")
    if role not in ROLES:
        raise InputError(f"no role {role!r}: use {', '.join(ROLES)}")
    for what, most in (("requests a minute", per_minute), ("pictures a day", per_day)):
        if most is not None and most < 1:
            raise InputError(f"{what} must be at least 1, not {most}")
    secret = PREFIX + secrets.token_urlsafe(32)
    row = Key(id=new_id(), name=name, sha256=digest(secret), role=role, per_minute=per_minute, per_day=per_day,
              created=time.time())  # fmt: skip
    try:
        with store.writing() as session:
            session.add(row)
    except IntegrityError as error:
        raise InputError(f"there is a key named {name!r} already: revoke it, or choose another name") from error
    return secret


def find(store: Store, secret: str) -> Caller | None:
    """Whose key this is, None where it is nobody's any more."""
    asked = select(Key).where(Key.sha256 == digest(secret), Key.revoked.is_(None))
    with store.reading() as session:
        row = session.scalar(asked)
    return None if row is None else _caller(row)


def sign_in(store: Store, caller: Caller) -> str:
    """A token that stands for a caller's key in a browser, for SHIFT seconds."""
    token, now = secrets.token_urlsafe(32), time.time()
    with store.writing() as session:
        session.execute(delete(SignedIn).where(SignedIn.until < now))
        session.add(SignedIn(sha256=digest(token), key=caller.id, until=now + SHIFT))
    return token


def signed_in(store: Store, token: str) -> Caller | None:
    """Whose browser this is; None where its time is over, it was signed out, or its key opens nothing any more."""
    asked = select(Key).join(SignedIn, SignedIn.key == Key.id)
    asked = asked.where(SignedIn.sha256 == digest(token), SignedIn.until > time.time(), Key.revoked.is_(None))
    with store.reading() as session:
        row = session.scalar(asked)
    return None if row is None else _caller(row)


def sign_out(store: Store, token: str) -> None:
    with store.writing() as session:
        session.execute(delete(SignedIn).where(SignedIn.sha256 == digest(token)))


def _caller(row: Key) -> Caller:
    return Caller(row.id, row.name, row.role, row.per_minute, row.per_day)


def revoke(store: Store, name: str) -> None:
    """From now on the key opens nothing; InputError where there is none by this name."""
    with store.writing() as session:
        row = session.scalar(select(Key).where(Key.name == name, Key.revoked.is_(None)))
        if row is None:
            raise InputError(f"no key named {name!r}")
        # the name becomes free again
        gone = update(Key).where(Key.id == row.id).values(revoked=time.time(), name=f"{name[:40]} {row.id}"[:80])
        session.execute(gone)


def listed(store: Store) -> Sequence[Key]:
    """The keys that open something."""
    with store.reading() as session:
        return session.scalars(select(Key).where(Key.revoked.is_(None)).order_by(Key.name)).all()


def configured(store: Store) -> bool:
    """Whether there ever was a key: then every request needs one."""
    with store.reading() as session:
        return bool(session.scalar(select(func.count()).select_from(Key)))


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
