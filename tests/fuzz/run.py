"""`python -m tests.fuzz.run --inputs 100000 --seed 1 --json`: fuzzes the readers of files.

Each batch runs in a process of its own, so that a crash or a hang is a verdict like any other. Input number i of a
target depends on the seed, the target and i alone; `--reproduce gguf:1234` runs one again and shows it.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .harness import Outcome, run_input, run_range
from .targets import make_input, targets

BATCH = 1000
# No batch comes near this: each input has its own limit, and this one is for code that no signal reaches.
HANG_SECONDS = 300
Work = Callable[[Connection, Any, str, int, int, int], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if the promise held for every input, 1 if not."""
    options = _parser().parse_args(arguments)
    if options.reproduce:
        return _reproduce(options.reproduce, options.seed)
    began = time.monotonic()
    names = options.target or list(targets())
    report: dict[str, Any] = {"seed": options.seed, "targets": {}}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failures]} failures"),
        console=Console(stderr=True),
    )
    with progress:
        bar = progress.add_task("fuzzing", total=options.inputs, failures=0)
        failures = 0
        for number, name in enumerate(names):
            share = options.inputs * (number + 1) // len(names) - options.inputs * number // len(names)
            outcome = Outcome()
            for begin in range(0, share, BATCH):
                end = min(begin + BATCH, share)
                outcome.add(run_batch(name, options.seed, begin, end))
                progress.update(bar, advance=end - begin, description=name, failures=failures + len(outcome.failures))
            failures += len(outcome.failures)
            report["targets"][name] = _summary(outcome)
    report |= {"inputs": options.inputs, "failures": failures, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(report, indent=2) if options.json else _table(report))
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000, help="inputs in all, shared evenly by the targets")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", action="append", choices=list(targets()), help="only this one; may be repeated")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--reproduce", metavar="TARGET:INDEX", help="run one input and print its verdict")
    return parser


def _summary(outcome: Outcome) -> dict[str, Any]:
    return {
        "inputs": outcome.inputs,
        "verdicts": dict(sorted(outcome.verdicts.items())),
        "slowest_ms": round(outcome.slowest_s * 1000, 1),
        "slowest_index": outcome.slowest_index,
        "failures": [{"index": index, "what": what} for index, what in outcome.failures],
    }


def _table(report: dict[str, Any]) -> str:
    lines = [f"{report['inputs']} inputs, seed {report['seed']}, {report['seconds']} s, {report['failures']} failures"]
    for name, part in report["targets"].items():
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in part["verdicts"].items())
        lines.append(f"  {name}: {verdicts}; slowest {part['slowest_ms']} ms")
        lines += [f"    {name}:{failure['index']} {failure['what']}" for failure in part["failures"][:10]]
    return "\n".join(lines)


def run_batch(name: str, seed: int, begin: int, end: int, work: Work | None = None) -> Outcome:
    """Runs inputs begin..end-1 in processes of their own, going on behind any input that kills one."""
    outcome = Outcome()
    context = multiprocessing.get_context("spawn")
    while begin < end:
        current = context.Value("q", begin)
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=work or _work, args=(sender, current, name, seed, begin, end))
        worker.start()
        sender.close()
        finished = receiver.poll(HANG_SECONDS)
        part = _received(receiver) if finished else None
        if part is not None:
            worker.join()
            outcome.add(part)
            return outcome
        worker.kill()
        worker.join()
        what = "hung" if not finished else f"the process ended with status {worker.exitcode}"
        # Inputs before the killer passed, or their failures went down with the process: run them again.
        if current.value > begin:
            outcome.add(run_batch(name, seed, begin, current.value, work))
        outcome.add(Outcome(failures=[(current.value, what)]))
        outcome.verdicts["failed"] += 1
        begin = current.value + 1
    return outcome


def _received(receiver: Connection) -> Outcome | None:
    try:
        outcome = receiver.recv()
    except EOFError:
        return None
    return outcome if isinstance(outcome, Outcome) else None


def _work(sender: Connection, current: Any, name: str, seed: int, begin: int, end: int) -> None:
    def started(index: int) -> None:
        current.value = index

    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        sender.send(run_range(targets()[name], seed, begin, end, Path(folder), started))


def _reproduce(wanted: str, seed: int) -> int:
    name, _, index = wanted.rpartition(":")
    target = targets()[name]
    data = make_input(target, target.seeds(), seed, int(index))
    with tempfile.TemporaryDirectory() as folder:
        for beside, content in target.beside().items():
            Path(folder, beside).write_bytes(content)
        verdict, failure = run_input(target, data, Path(folder))
    print(f"{len(data)} bytes, beginning {data[:200]!r}\n{verdict} {failure}")
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
