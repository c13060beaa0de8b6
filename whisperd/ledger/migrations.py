"""migrations: how a ledger of any released version becomes one of this version.

Owns: the list of schema changes, applied by sqlite-utils. A migration that was released is never edited: add the next one.
"""

from __future__ import annotations

import re
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


@MIGRATIONS()
def schema_4(db: Database) -> None:
    """Contents and stored transcripts, renames, disposal of sources, notices; counted by triggers, indexed for a million files."""
    for statement in _statements(files("whisperd.ledger").joinpath("schema_4.sql").read_text("utf-8")):
        db.conn.execute(statement)
    (table,) = db.conn.execute("SELECT sql FROM sqlite_master WHERE type = 'table' AND name = 'job'").fetchone()
    _say_again(db, "job", spelled_out(table))


def spelled_out(sql: str) -> str:
    """The same conditions with every list of constants as comparisons: SQLite asks those in a third of the time.

    >>> spelled_out("state NOT IN ('a', 'b') OR kind IN ('c')")
    "(state <> 'a' AND state <> 'b') OR (kind = 'c')"
    """

    def spell(found: re.Match[str]) -> str:
        column, negated, values = found[1], found[2], found[3].split(",")
        comparison, joined = ("<>", " AND ") if negated else ("=", " OR ")
        return "(" + joined.join(f"{column} {comparison} {value.strip()}" for value in values) + ")"

    return re.sub(r"(\w+) (NOT )?IN \(([^)]*)\)", spell, sql)


def _say_again(db: Database, table: str, sql: str) -> None:
    """Write a table's definition anew, where what is stored stays as it is (sqlite.org/lang_altertable.html, the simpler procedure)."""
    (version,) = db.conn.execute("PRAGMA schema_version").fetchone()
    db.conn.execute("PRAGMA writable_schema = ON")
    db.conn.execute("UPDATE sqlite_master SET sql = ? WHERE type = 'table' AND name = ?", [sql, table])
    db.conn.execute(f"PRAGMA schema_version = {version + 1}")
    db.conn.execute("PRAGMA writable_schema = RESET")


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
