"""The tables of the catalog, and the steps that bring an older catalog up to date.

Knows SQL; does not know what a version is used for. Migrations are numbered from 1 and never edited once
released: a change of the schema is a new entry at the end.
"""

import apsw

from inhouse.core.errors import UnsupportedError

MIGRATIONS = (
    """
    CREATE TABLE models (
        id          INTEGER PRIMARY KEY,
        name        TEXT NOT NULL UNIQUE,
        last_number INTEGER NOT NULL DEFAULT 0 CHECK (last_number >= 0)  -- numbers are never given twice
    ) STRICT;
    CREATE TABLE versions (
        id            INTEGER PRIMARY KEY,
        model         INTEGER NOT NULL REFERENCES models(id) ON DELETE CASCADE,
        number        INTEGER NOT NULL CHECK (number > 0),
        digest        TEXT NOT NULL,      -- sha256 of the list of files
        format        TEXT NOT NULL,      -- safetensors | gguf | torch
        summary       TEXT NOT NULL,      -- JSON of version.Summary
        origin        TEXT NOT NULL,      -- where it came from, as the user named it
        parent        INTEGER REFERENCES versions(id) ON DELETE SET NULL,
        parent_ref    TEXT,               -- the parent's name when the child was made; outlives the parent
        parent_digest TEXT,
        how           TEXT,               -- how the child was made of the parent
        created       TEXT NOT NULL,      -- UTC, ISO 8601
        UNIQUE (model, number)
    ) STRICT;
    CREATE INDEX versions_by_digest ON versions(digest);
    CREATE INDEX versions_by_parent ON versions(parent);
    CREATE TABLE files (
        version INTEGER NOT NULL REFERENCES versions(id) ON DELETE CASCADE,
        path    TEXT NOT NULL,
        blob    TEXT NOT NULL,
        size    INTEGER NOT NULL CHECK (size >= 0),
        PRIMARY KEY (version, path)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX files_by_blob ON files(blob);
    CREATE TABLE aliases (
        model   INTEGER REFERENCES models(id) ON DELETE CASCADE,  -- NULL: an alias that is a name of its own
        alias   TEXT NOT NULL,
        version INTEGER NOT NULL REFERENCES versions(id) ON DELETE CASCADE,
        updated TEXT NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX aliases_by_name ON aliases(ifnull(model, 0), alias);
    CREATE INDEX aliases_by_version ON aliases(version);
    """,
)


def migrate(db: apsw.Connection) -> None:
    """Brings the catalog to the newest schema, in one transaction; several processes may try at once.

    Raises UnsupportedError if a newer Inhouse wrote it.
    """
    if _level(db) == len(MIGRATIONS):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        level = _level(db)
        if level > len(MIGRATIONS):
            raise UnsupportedError(
                f"the catalog has schema {level}, this Inhouse knows {len(MIGRATIONS)}",
                remedy="Use the newer Inhouse that wrote it.",
            )
        db.execute("CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, applied TEXT NOT NULL) STRICT")
        for number, script in enumerate(MIGRATIONS[level:], level + 1):
            db.execute(script)
            db.execute("INSERT INTO migrations VALUES (?, strftime('%Y-%m-%dT%H:%M:%SZ'))", (number,))
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


def _level(db: apsw.Connection) -> int:
    return int(db.execute("PRAGMA user_version").get)
