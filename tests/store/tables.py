"""What a store's catalog holds, as text, for comparing two states of it."""

import apsw

from inhouse.store.store import Store


def dump(store: Store) -> str:
    """All tables, row by row, read by a connection of its own."""
    tables = ("models", "versions", "files", "aliases")
    db = apsw.Connection(str(store.home.catalog), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return "\n".join(f"{t} {row}" for t in tables for row in db.execute(f"SELECT * FROM {t} ORDER BY 1, 2"))
    finally:
        db.close()
