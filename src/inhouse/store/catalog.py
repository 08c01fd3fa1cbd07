"""The catalog: which versions of which models exist, what files they are made of, what they are called.

Knows names, numbers, aliases and lineage, in SQLite (WAL, one file); does not know blobs' bytes or model formats.
Every method is one transaction: it happened whole or not at all, whatever kills the process.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import apsw

from inhouse.core.errors import CapacityError, ConflictError, FormatError, NotFoundError, UnavailableError
from inhouse.store.catalog_schema import migrate
from inhouse.store.refs import Ref, check_alias, check_name, hint, parse_ref
from inhouse.store.version import NewVersion, StoredFile, Summary, Version, files_digest

BUSY_MS = 10_000


class Catalog:
    """One catalog file; may be used by several threads and processes at once."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the catalog. Raises FormatError (damaged), UnsupportedError (newer schema)."""
        self._path = path
        self._lock = threading.RLock()
        with self._translated():
            self._db = apsw.Connection(str(path))
            self._db.set_busy_timeout(BUSY_MS)
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "trusted_schema = OFF"):
                self._db.execute(f"PRAGMA {pragma}")
            migrate(self._db)

    def close(self) -> None:
        """Closes the file; the catalog may not be used afterwards."""
        with self._lock:
            self._db.close()

    def add_version(self, new: NewVersion) -> tuple[Version, bool]:
        """Records a version under the model's next number, unless the model has one of the same content.

        Returns the version, and whether it is new. Raises ConflictError if the name is an alias,
        NotFoundError if the parent does not exist, UsageError for an ill-formed name.
        """
        name, digest = check_name(new.name), files_digest(new.files)
        with self._writing():
            known = self._first(
                "SELECT v.id FROM versions v JOIN models m ON m.id = v.model WHERE m.name = ? AND v.digest = ?"
                " ORDER BY v.number LIMIT 1",
                (name, digest),
            )
            if known is not None:
                return self._version(known), False
            if self._alias_id(None, name) is not None:
                raise ConflictError(f"{name!r} is an alias", remedy="Remove the alias or choose another name.")
            parent = self._resolve(parse_ref(new.parent)) if new.parent else None
            self._db.execute("INSERT INTO models (name) VALUES (?) ON CONFLICT DO NOTHING", (name,))
            model, number = self._row(
                "UPDATE models SET last_number = last_number + 1 WHERE name = ? RETURNING id, last_number", (name,)
            )
            parent_row: tuple[int | None, str | None, str | None] = (None, None, None)
            if parent is not None:
                found = self._version(parent)
                parent_row = (parent, found.ref, found.digest)
            (version,) = self._row(
                "INSERT INTO versions (model, number, digest, format, summary, origin, parent, parent_ref,"
                " parent_digest, how, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
                (model, number, digest, new.format, json.dumps(asdict(new.summary)), new.origin)
                + (*parent_row, new.how, _now()),
            )
            self._db.executemany(
                "INSERT INTO files VALUES (?, ?, ?, ?)", [(version, f.path, f.blob, f.size) for f in new.files]
            )
            return self._version(version), True

    def resolve(self, ref: str) -> Version:
        """The version that a reference names. Raises NotFoundError (with what may have been meant), UsageError."""
        with self._reading():
            return self._version(self._resolve(parse_ref(ref)))

    def versions(self) -> list[Version]:
        """All versions, by name and number."""
        with self._reading():
            return [
                self._version(version)
                for (version,) in self._db.execute(
                    "SELECT v.id FROM versions v JOIN models m ON m.id = v.model ORDER BY m.name, v.number"
                )
            ]

    def aliases(self) -> dict[str, str]:
        """Every alias as it is written (`name@prod`, or a name of its own) -> the version it stands for."""
        with self._reading():
            rows = self._db.execute(
                "SELECT a.alias, s.name, m.name, v.number FROM aliases a JOIN versions v ON v.id = a.version"
                " JOIN models m ON m.id = v.model LEFT JOIN models s ON s.id = a.model ORDER BY m.name, a.alias"
            )
            return {
                f"{scope}@{alias}" if scope else str(alias): f"{name}:{number}" for alias, scope, name, number in rows
            }

    def children(self, ref: str) -> list[str]:
        """The versions that were made of this one."""
        with self._reading():
            return self._children(self._resolve(parse_ref(ref)))

    def set_alias(self, alias: str, ref: str | None, *, force: bool = False) -> None:
        """Points `name@alias`, or an alias that is a name of its own, at a version; None takes the alias away.

        Raises NotFoundError (no such version, or no such alias to take away), ConflictError (a model has the
        name, the version belongs to another model than `name@`, or it failed its gate and `force` is not set),
        UsageError.
        """
        scope, _, word = alias.rpartition("@")
        check_alias(word) if scope else check_name(word)
        with self._writing():
            model = self._model(scope) if scope else None
            if ref is None:
                if self._alias_id(model, word) is None:
                    known = self.aliases()
                    remedy = hint(alias, known) if known else "There are no aliases."
                    raise NotFoundError(f"there is no alias {alias!r}", remedy=remedy)
                self._db.execute("DELETE FROM aliases WHERE ifnull(model, 0) = ? AND alias = ?", (model or 0, word))
                return
            version = self._resolve(parse_ref(ref))
            owner = self._first("SELECT model FROM versions WHERE id = ?", (version,))
            if model is not None and owner != model:
                raise ConflictError(f"{ref} is no version of {scope}", remedy="Use an alias without a model name.")
            if not force and self._version(version).summary.gate == "failed":
                raise ConflictError(
                    f"{ref} failed its quality gate",
                    remedy="Compress it less, or point at it with --force",
                    gate="failed",
                )
            if model is None and self._find_model(word) is not None:
                raise ConflictError(f"there is a model called {word!r}", remedy="Choose another alias.")
            self._db.execute(
                "INSERT INTO aliases VALUES (?, ?, ?, ?) ON CONFLICT (ifnull(model, 0), alias)"
                " DO UPDATE SET version = excluded.version, updated = excluded.updated",
                (model, word, version, _now()),
            )

    def rename(self, old: str, new: str) -> None:
        """Gives a model another name; versions, aliases and children go with it. Raises ConflictError if taken."""
        check_name(new)
        with self._writing():
            model = self._model(check_name(old))
            if new == old:
                return
            taken = self._find_model(new)
            if taken is not None or self._alias_id(None, new) is not None:
                raise ConflictError(f"the name {new!r} is taken", remedy="Choose another, or remove that one first.")
            # A model whose versions were all removed leaves its counter; the larger one goes on.
            last = self._db.execute("DELETE FROM models WHERE name = ? RETURNING last_number", (new,)).get or 0
            self._db.execute(
                "UPDATE models SET name = ?, last_number = max(last_number, ?) WHERE id = ?", (new, last, model)
            )

    def remove(self, ref: str, *, force: bool = False) -> list[Version]:
        """Forgets a version, or with a bare model name all its versions; returns what was removed.

        Raises ConflictError if an alias points at one of them or another model's version was made of it,
        unless forced: then the aliases go too and the children keep the parent's name and digest only.
        """
        parsed = parse_ref(ref)
        with self._writing():
            if parsed.number is None and parsed.alias is None and self._find_model(parsed.name) is not None:
                chosen = [v for (v,) in self._db.execute("SELECT id FROM versions WHERE model = ? ORDER BY number",
                                                         (self._model(parsed.name),))]  # fmt: skip
            else:
                chosen = [self._resolve(parsed)]
            removed = [self._version(version) for version in chosen]
            if not force:
                self._refuse_if_used(chosen, removed)
            self._db.executemany("DELETE FROM versions WHERE id = ?", [(version,) for version in chosen])
            return removed

    def live_blobs(self) -> set[str]:
        """The digests of all contents that some version names."""
        with self._reading():
            return {str(blob) for (blob,) in self._db.execute("SELECT DISTINCT blob FROM files")}

    def live_digests(self) -> set[str]:
        """The digests of all versions."""
        with self._reading():
            return {str(digest) for (digest,) in self._db.execute("SELECT DISTINCT digest FROM versions")}

    def check(self) -> list[str]:
        """What is wrong with the catalog itself, one sentence each; empty if it is whole."""
        with self._reading():
            problems = [f"sqlite: {row[0]}" for row in self._db.execute("PRAGMA integrity_check") if row[0] != "ok"]
            problems += [f"broken reference in {row[0]}" for row in self._db.execute("PRAGMA foreign_key_check")]
            late = "SELECT m.name FROM versions v JOIN models m ON m.id = v.model WHERE v.number > m.last_number"
            problems += [f"{name}: a version beyond the last number" for (name,) in self._db.execute(late)]
        for version in self.versions():
            if files_digest(version.files) != version.digest:
                problems.append(f"{version.ref}: its files do not hash to its digest")
        return problems

    def _refuse_if_used(self, chosen: Sequence[int], removed: Sequence[Version]) -> None:
        refs = {version.ref for version in removed}
        for row, version in zip(chosen, removed, strict=True):
            if version.aliases:
                raise ConflictError(
                    f"{version.ref} is what {' and '.join(version.aliases)} stands for",
                    remedy="Point the alias elsewhere, or force it (--force).",
                )
            children = [child for child in self._children(row) if child not in refs]
            if children:
                raise ConflictError(
                    f"{', '.join(children)} was made of {version.ref}",
                    remedy="Remove the child first, or force it (--force).",
                )

    def _resolve(self, ref: Ref) -> int:
        model = self._find_model(ref.name)
        if model is None:
            found = self._alias_id(None, ref.name) if ref.number is None and ref.alias is None else None
            if found is None:
                raise NotFoundError(f"there is no model {ref.name!r}", remedy=hint(ref.name, self._names()))
            return found
        if ref.alias is not None:
            found = self._alias_id(model, ref.alias)
            known = [a for (a,) in self._db.execute("SELECT alias FROM aliases WHERE model = ?", (model,))]
            remedy = hint(ref.alias, known) if known else f"{ref.name} has no aliases."
        elif ref.number is not None:
            found = self._first("SELECT id FROM versions WHERE model = ? AND number = ?", (model, ref.number))
            known = [str(n) for (n,) in self._db.execute("SELECT number FROM versions WHERE model = ?", (model,))]
            remedy = f"{ref.name} has versions {', '.join(known)}."
        else:
            # the latest that did not fail its quality gate: only a model all of whose versions did is what failed
            failed = "COALESCE(json_extract(summary, '$.gate'), '') = 'failed'"
            found = self._first(
                f"SELECT id FROM versions WHERE model = ? ORDER BY {failed}, number DESC LIMIT 1", (model,)
            )
            remedy = ""
        if found is None:
            raise NotFoundError(f"there is no {ref}", remedy=remedy)
        return found

    def _names(self) -> list[str]:
        rows = self._db.execute(
            "SELECT m.name FROM models m WHERE EXISTS (SELECT 1 FROM versions WHERE model = m.id)"
            " UNION SELECT alias FROM aliases WHERE model IS NULL"
        )
        return [str(name) for (name,) in rows]

    def _model(self, name: str) -> int:
        model = self._find_model(name)
        if model is None:
            raise NotFoundError(f"there is no model {name!r}", remedy=hint(name, self._names()))
        return model

    def _find_model(self, name: str) -> int | None:
        """A model with at least one version; one without any is only a counter."""
        return self._first(
            "SELECT id FROM models m WHERE name = ? AND EXISTS (SELECT 1 FROM versions WHERE model = m.id)", (name,)
        )

    def _alias_id(self, model: int | None, alias: str) -> int | None:
        return self._first("SELECT version FROM aliases WHERE ifnull(model, 0) = ? AND alias = ?", (model or 0, alias))

    def _children(self, version: int) -> list[str]:
        rows = self._db.execute(
            "SELECT m.name, v.number FROM versions v JOIN models m ON m.id = v.model WHERE v.parent = ?"
            " ORDER BY m.name, v.number",
            (version,),
        )
        return [f"{name}:{number}" for name, number in rows]

    def _version(self, version: int) -> Version:
        row = self._row(
            "SELECT m.name, v.number, v.digest, v.format, v.summary, v.origin, v.created, v.parent_ref,"
            " v.parent_digest, v.how FROM versions v JOIN models m ON m.id = v.model WHERE v.id = ?",
            (version,),
        )
        name, number, digest, kind, summary, origin, created, parent, parent_digest, how = row
        files = self._db.execute("SELECT path, blob, size FROM files WHERE version = ? ORDER BY path", (version,))
        aliases = self._db.execute(
            "SELECT model, alias FROM aliases WHERE version = ? ORDER BY model, alias", (version,)
        )
        return Version(
            name=name,
            number=number,
            digest=digest,
            format=kind,
            summary=Summary.from_json(summary),
            origin=origin,
            created=created,
            files=tuple(StoredFile(*file) for file in files),
            aliases=tuple(f"{name}@{alias}" if scope else str(alias) for scope, alias in aliases),
            parent=parent,
            parent_digest=parent_digest,
            how=how,
        )

    def _row(self, sql: str, values: Sequence[Any]) -> tuple[Any, ...]:
        row = self._db.execute(sql, values).fetchone()
        assert row is not None, sql
        return tuple(row)

    def _first(self, sql: str, values: Sequence[Any]) -> int | None:
        row = self._db.execute(sql, values).fetchone()
        return None if row is None else int(row[0])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock, self._translated():
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN")  # one snapshot for all queries of a method
            try:
                yield
            finally:
                self._db.execute("ROLLBACK")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock, self._translated():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except apsw.BusyError:
            raise CapacityError(
                f"the catalog was busy for {BUSY_MS / 1000:g} s", remedy="Try again when other imports are done."
            ) from None
        except apsw.FullError:
            raise CapacityError(f"the disk is full: {self._path} cannot grow", remedy="Make room.") from None
        except (apsw.CorruptError, apsw.NotADBError) as error:
            raise FormatError(
                f"the catalog {self._path} is damaged: {error}",
                remedy="Restore it from a backup, or move it away and import the models again.",
            ) from None
        except (apsw.CantOpenError, apsw.ReadOnlyError, apsw.IOError, apsw.PermissionsError) as error:
            raise UnavailableError(
                f"the catalog {self._path} cannot be used: {error}", remedy="Check the disk and its permissions."
            ) from None


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
