"""One file from a URL to disk: resumed where it broke off, whole and verified at the end, or not there at all.

Knows ranges, sizes and checksums; does not know hubs. Beside `target` lie, until it is whole, `target.partial` (the
bytes so far) and `target.stamp` (which content they belong to).
"""

import hashlib
import os
import re
from pathlib import Path
from typing import BinaryIO

from inhouse.core.errors import NetworkError
from inhouse.core.progress import Progress, silent
from inhouse.store.home import PRIVATE
from inhouse.store.http import CHUNK, Answer, Patience, Session, Transient, wrong_content
from inhouse.store.hub import RemoteFile

MAX_FILE_BYTES = 2 << 40
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def fetch(session: Session, url: str, target: Path, file: RemoteFile, progress: Progress = silent) -> None:
    """Makes `target` the content of `file`; what an earlier call fetched is kept.

    `progress` is told ("pull PATH", bytes, bytes in all).

    Raises:
        FormatError: the content is not what the hub announced (after one attempt from the beginning).
        NetworkError: the hub refused, or broke off too often; what came stays for the next call.
        NotFoundError: it is not there.
    """
    if target.is_file() and target.stat().st_size == (file.size if file.size is not None else target.stat().st_size):
        return
    target.parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    download = _Download(session, url, target, file, progress)
    download.begin()
    resumed = download.have > 0
    while not download.run() and resumed:
        resumed = False  # an old partial was bad: once more, from the beginning
    download.finish()


class _Download:
    def __init__(self, session: Session, url: str, target: Path, file: RemoteFile, progress: Progress) -> None:
        self._session, self._url, self._file, self._progress = session, url, file, progress
        self._target = target
        self._partial = target.with_name(target.name + ".partial")
        self._stamp = target.with_name(target.name + ".stamp")
        self._size = file.size
        self._etag = ""
        self._error: Exception | None = None

    @property
    def have(self) -> int:
        """Bytes that are there."""
        return self._partial.stat().st_size if self._partial.exists() else 0

    def begin(self) -> None:
        """Drops bytes that belong to another content, or to none that can be told."""
        known = self._stamp.read_text() if self._stamp.exists() else ""
        if not self._file.identity or known != self._file.identity:
            self._partial.unlink(missing_ok=True)
        self._stamp.write_text(self._file.identity)

    def run(self) -> bool:
        """Fetches all bytes and checks them; False, with nothing left, if they are the wrong ones."""
        patience = Patience(self._session.sleep)
        while self._size is None or self.have != self._size:
            before = self.have
            try:
                self._attempt()
            except Transient as error:
                if self.have > before:
                    patience.progress()
                patience.failed(error)
        self._error = self._check()
        if self._error is not None:
            self._partial.unlink(missing_ok=True)
        return self._error is None

    def finish(self) -> None:
        """Gives the file its name. Raises what `run` found wrong."""
        if self._error is not None:
            self._stamp.unlink(missing_ok=True)
            raise self._error
        os.replace(self._partial, self._target)
        self._stamp.unlink(missing_ok=True)

    def _attempt(self) -> None:
        have = self.have
        headers = {"Range": f"bytes={have}-"} if have else {}
        with self._session.stream(self._url, headers) as answer:
            start = self._start(answer, have)
            with open(self._partial, "r+b" if have else "wb") as out:
                out.truncate(start)
                out.seek(start)
                self._receive(answer, out, start)

    def _start(self, answer: Answer, have: int) -> int:
        """Where the body that now comes belongs; learns the size. Raises Transient to begin anew."""
        response = answer.response
        if response.status_code == 416:
            self._partial.unlink(missing_ok=True)
            raise Transient(f"{self._url} has no byte {have}")
        if response.status_code == 206:
            match = _RANGE.fullmatch(response.headers.get("content-range", ""))
            if match is None or int(match[1]) != have or (match[3] != "*" and not self._fits(int(match[3]))):
                self._partial.unlink(missing_ok=True)
                raise Transient(f"{self._url} answered another range than was asked for")
            return have
        length = response.headers.get("content-length", "")
        if length.isdigit() and not self._fits(int(length)):
            raise NetworkError(f"{self._url} has {length} bytes, {self._size} were announced")
        self._etag = answer.linked_etag
        return 0

    def _fits(self, size: int) -> bool:
        if self._size is None and size <= MAX_FILE_BYTES:
            self._size = size
        return size == self._size

    def _receive(self, answer: Answer, out: BinaryIO, start: int) -> None:
        done, limit = start, self._size if self._size is not None else MAX_FILE_BYTES
        # As it comes from the network: chunks of a fixed size would lose the last one when the connection breaks.
        for chunk in answer.response.iter_raw():
            done += len(chunk)
            if done > limit:
                raise NetworkError(f"{self._url} sends more than the {limit} bytes announced")
            out.write(chunk)
            self._progress(f"pull {self._file.path}", done, limit if self._size is not None else done)
        if self._size is None:
            self._size = done
        if done < self._size:
            raise Transient(f"{self._url} ended after {done} of {self._size} bytes")

    def _check(self) -> Exception | None:
        expected = self._file.sha256 or self._file.git_sha1 or _hexadecimal(self._etag)
        if not expected:
            return None
        digest = hashlib.sha256() if len(expected) == 64 else hashlib.sha1(usedforsecurity=False)
        if len(expected) == 40:
            digest.update(f"blob {self.have}\0".encode())
        with open(self._partial, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        actual = digest.hexdigest()
        return None if actual == expected else wrong_content(self._file.path, expected, actual)


def _hexadecimal(etag: str) -> str:
    """The etag, where it is a sha256 or the sha1 of a git blob; "" for other kinds."""
    return etag if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", etag) else ""
