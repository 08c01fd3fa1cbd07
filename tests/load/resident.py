"""Opens models one after the other in this process, keeps all of them, lets each answer, and prints what each added to
the resident memory. Run by test_resident: `python -m tests.load.resident FOLDER...`."""

import ctypes
import gc
import json
import sys
from pathlib import Path

from inhouse.core.settings import Settings
from inhouse.engine.session import Session
from inhouse.plan.memory import activation_bytes, weight_bytes, workspace_bytes

KV = 4 << 20


def resident() -> int:
    """Resident bytes of this process, after giving back what was freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) << 10


def settings() -> Settings:
    return Settings(threads=1, context=256, step_tokens=64, kv_memory=KV, prefix_cache=False)


def answer(session: Session) -> None:
    ids = session.prompt_ids("Once upon a time there was a")
    for _ in session.stream(ids, session.defaults, 24, ()):
        continue


def main(paths: list[str]) -> None:
    """The first model warms up what all share (library, tokenizer code, thread pool) and is not reported."""
    kept = []
    report = []
    for path in paths:
        before = resident()
        session = Session.open(path, settings())
        answer(session)
        kept.append(session)
        added = resident() - before
        programs = session.model.programs
        report.append({
            "path": path, "added": added, "weights": weight_bytes(session.model.weights),
            "kv": session.engine.state_bytes, "formats": session.model.report.formats,
            "step": activation_bytes(programs, 64, 64) + workspace_bytes(64, 1),
        })  # fmt: skip
    print(json.dumps(report[1:]))
    for session in kept:
        session.close()


if __name__ == "__main__":
    main(sys.argv[1:])
