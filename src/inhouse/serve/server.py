"""Runs the application on uvicorn: listens, announces itself, drains on SIGTERM, leaves nothing behind.

A running server is known to `inhouse ps` and `inhouse stop` by a small file in the model home.
"""

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from inhouse.core.errors import ConflictError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.core.settings import Settings
from inhouse.serve.app import create_app
from inhouse.serve.pool import Pool

_log = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _Server(uvicorn.Server):
    """uvicorn's server that refuses new requests, also on kept-alive connections, from the first SIGTERM on, and ends
    with status 0 once it has drained (uvicorn would raise the signal again and be killed by it)."""

    def __init__(self, config: uvicorn.Config, pool: Pool) -> None:
        super().__init__(config)
        self._pool = pool

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._pool.draining = True
        self.force_exit = self.should_exit and sig == signal.SIGINT  # Ctrl-C twice: do not wait
        self.should_exit = True


def check_exposure(settings: Settings) -> None:
    """Refuses to listen beyond this machine without a key. Raises UsageError."""
    if settings.host not in LOOPBACK and not settings.api_key:
        raise UsageError(
            f"listening on {settings.host} would let anyone on the network use the server",
            remedy="Set an API key (--api-key or $INHOUSE_API_KEY), or listen on 127.0.0.1",
            param="host",
        )


def listen(settings: Settings) -> socket.socket:
    """A bound socket. Raises ConflictError when the address is in use or not ours."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
    except OSError as error:
        sock.close()
        raise ConflictError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}",
            remedy="Choose another with --port, or see what runs with `inhouse ps`",
        ) from error
    return sock


def parse_adapters(text: str) -> dict[str, str]:
    """`name=path,name=path` as a table. Raises UsageError."""
    table: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, path = entry.partition("=")
        if not (name and equals and path) or name in table:
            raise UsageError(f"{entry!r} names no adapter", remedy="Write name=path, each name once", param="adapters")
        table[name] = path
    return table


def run(models: Sequence[str], settings: Settings, run_folder: Path, progress: Progress = silent) -> None:
    """Listens, loads the models, serves until SIGTERM or Ctrl-C, then drains.

    The socket is bound before the models are loaded, so that a port in use is told at once.

    Args:
        models: references as `Session.open` takes them.
        settings: of this process.
        run_folder: where the file that announces this server is kept while it runs.
        progress: told of the loading of models.
    """
    check_exposure(settings)
    sock = listen(settings)
    pool = Pool(settings)
    announced = run_folder / f"{os.getpid()}.json"
    try:
        for model in models:
            for note in pool.load(model, progress).model.report.notes:
                _log.warning("%s: %s", model, note)
        for name, path in parse_adapters(settings.adapters).items():
            pool.load_adapter(name, path)
        port = sock.getsockname()[1]
        _announce(announced, settings.host, port, models)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        _log.info("serving %s at http://%s:%d/v1; Ctrl-C or `inhouse stop` ends it", ", ".join(models), host, port)
        config = uvicorn.Config(
            create_app(pool, settings),
            log_level=settings.log_level,
            access_log=settings.log_level == "debug",
            timeout_graceful_shutdown=settings.drain_seconds,
            server_header=False,
            lifespan="on",
        )
        _Server(config, pool).run(sockets=[sock])
    finally:
        announced.unlink(missing_ok=True)
        pool.close()
        sock.close()


def _announce(path: Path, host: str, port: int, models: Sequence[str]) -> None:
    """Writes the file by which `ps` and `stop` find this process; atomic."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    body = {"pid": os.getpid(), "host": host, "port": port, "models": list(models), "started": int(time.time())}
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(body))
    partial.replace(path)
