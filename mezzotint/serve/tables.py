"""What the server keeps: jobs, the pictures that go into them and come out, keys, and who is signed in."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, LargeBinary, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

QUEUED, RUNNING, DONE, FAILED, REFUSED, CANCELLED, EXPIRED = STATES = (
    "queued", "running", "done", "failed", "refused", "cancelled", "expired",
)  # fmt: skip
OPEN = (QUEUED, RUNNING)


class Table(DeclarativeBase):
    """Times are seconds since 1970, UTC."""


class Job(Table):
    """A request that was accepted, from then until its pictures are fetched."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)  # in the order of acceptance
    owner: Mapped[str] = mapped_column(String(32), index=True)  # the key that asked
    state: Mapped[str] = mapped_column(String(16))
    model: Mapped[str] = mapped_column(String(200))
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    count: Mapped[int]  # of pictures
    created: Mapped[float]
    deadline: Mapped[float | None]  # after which nobody waits for it any more
    started: Mapped[float | None]
    finished: Mapped[float | None]
    worker: Mapped[str | None] = mapped_column(String(64))  # who has it
    beat: Mapped[float | None]  # when that one was last heard of
    attempts: Mapped[int] = mapped_column(default=0)
    step: Mapped[int] = mapped_column(default=0)
    steps: Mapped[int] = mapped_column(default=0)
    error: Mapped[str | None] = mapped_column(String(2000))
    cost: Mapped[float | None]  # of all its pictures, in the currency of the server's price
    previewed: Mapped[int] = mapped_column(default=0)  # the step that its preview shows; 0: there is none
    preview: Mapped[bytes | None] = mapped_column(LargeBinary, deferred=True)  # a small JPEG, as long as it is drawn

    __table_args__ = (Index("jobs_by_state", "state", "id"),)


class Picture(Table):
    """A picture of a job: what it starts from (image, mask, reference, control), or a result."""

    __tablename__ = "pictures"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    role: Mapped[str] = mapped_column(String(16))
    place: Mapped[int]  # among those of its role
    media: Mapped[str] = mapped_column(String(32))
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    data: Mapped[bytes] = mapped_column(LargeBinary)
    facts: Mapped[dict[str, Any]] = mapped_column(JSON)  # of a result: its seed and record

    __table_args__ = (UniqueConstraint("job", "role", "place"),)


class Key(Table):
    """Who may ask, and how much; the key itself is not kept, its SHA-256 is."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(80), unique=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(16))  # user: own jobs; viewer: looks at all; admin: both
    per_minute: Mapped[int | None]  # requests
    per_day: Mapped[int | None]  # pictures
    created: Mapped[float]
    revoked: Mapped[float | None]


class SignedIn(Table):
    """A browser that somebody signed in with a key; its token is not kept, its SHA-256 is."""

    __tablename__ = "signed_in"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(ForeignKey("keys.id", ondelete="CASCADE"))
    until: Mapped[float]
