"""The database of a server: SQLite or PostgreSQL, opened and brought up to date."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError

from mezzotint.errors import InputError
from mezzotint.extras import need

WAIT = 30.0  # seconds that SQLite waits for another writer


def engine(url: str) -> Engine:
    """A database by its URL; InputError where there is none."""
    if url.startswith("postgresql"):
        need("psycopg")
    try:
        found = create_engine(url, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise InputError(
            f"--db {url.partition(':')[0]}: no database by this URL: {error}. "
            f"Use sqlite:///FILE or postgresql+psycopg://..."
        ) from error
    if found.dialect.name == "sqlite":
        if found.url.database not in (None, "", ":memory:"):
            with suppress(OSError):  # opening it says what is wrong
                Path(str(found.url.database)).parent.mkdir(parents=True, exist_ok=True)

        @event.listens_for(found, "connect")
        def ready(connection: Any, record: object) -> None:
            connection.isolation_level = None  # transactions begin where we say so, below
            cursor = connection.cursor()
            for line in ("journal_mode=WAL", f"busy_timeout={int(1000 * WAIT)}", "foreign_keys=ON", "synchronous=FULL"):
                cursor.execute(f"PRAGMA {line}")
            cursor.close()

        @event.listens_for(found, "begin")
        def begin(connection: Any) -> None:  # one that reads and then writes would find the file locked
            reads = connection.get_execution_options().get("reads", False)
            connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return found


def migrated(engine: Engine) -> None:
    """Bring the tables up to date; InputError where the database cannot be used."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except OperationalError as error:
        where = engine.url.render_as_string(hide_password=True)
        raise InputError(f"the database {where} cannot be used: {error.orig}") from error
