"""migrations: how a ledger of any released version becomes one of this version.

Owns: the list of schema changes, applied by sqlite-utils. A migration that was released is never edited: add the next one.
"""

from __future__ import annotations

from importlib.resources import files

from sqlite_utils import Database, Migrations

MIGRATIONS = Migrations("whisperd")


@MIGRATIONS()
def schema_1(db: Database) -> None:
    """The first schema: jobs, legal moves, history."""
    for statement in _statements(files("whisperd.ledger").joinpath("schema.sql").read_text("utf-8")):
        db.conn.execute(statement)


@MIGRATIONS()
def schema_2(db: Database) -> None:
    """Quality of transcripts, checkpoints that know what made them, VRAM peaks by the whole shape of a batch."""
    for statement in _statements(files("whisperd.ledger").joinpath("schema_2.sql").read_text("utf-8")):
        db.conn.execute(statement)


@MIGRATIONS()
def schema_3(db: Database) -> None:
    """Jobs can be held, minutes of cards, plans with their reasons, what the optimiser learned."""
    for statement in _statements(files("whisperd.ledger").joinpath("schema_3.sql").read_text("utf-8")):
        db.conn.execute(statement)


def _statements(script: str) -> list[str]:
    """Split a script (executescript would commit the migration's own transaction)."""
    import sqlite3

    statements: list[str] = []
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            statements.append(pending)
            pending = ""
    return statements
