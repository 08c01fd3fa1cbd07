"""Inhouse, in process, through its library: `inhouse_engine.py MODEL [--quantize q4] [--kv f16]`."""

import os
import queue
import sys
import time
import uuid
from dataclasses import asdict

sys.path.insert(0, os.path.dirname(__file__))
import common

from inhouse.core.settings import load_settings
from inhouse.engine.request import Failed, Finished, SamplingParams, TokenEvent, make_request
from inhouse.engine.session import Session
from inhouse.plan.memory import weight_bytes
from inhouse.runtime.executor import KV_DTYPES
from inhouse.runtime.kv_codes import element_type
from inhouse.tune.limits import fresh_peaks
from inhouse.tune.measure import CELLS, begun, least_work


def main() -> None:
    parser = common.arguments()
    parser.add_argument("--quantize", default=None)
    parser.add_argument("--kv", default="f16")
    parser.add_argument("--kv-memory", default="1GiB")
    given = parser.parse_args()
    settings = load_settings(
        {"quantize": given.quantize, "threads": given.threads, "kv_dtype": given.kv, "kv_memory": given.kv_memory,
         "prefix_cache": False}
    )  # fmt: skip
    with Session.open(given.model, settings) as session:

        def generate(prompts: common.Prompts, new: int) -> common.Answered:
            events: queue.SimpleQueue = queue.SimpleQueue()
            began, left, tokens = time.monotonic(), len(prompts), []  # the clock of TokenEvent.time
            params = SamplingParams(temperature=0.0, ignore_eos=True)
            for prompt in prompts:
                request = make_request(f"bench-{uuid.uuid4().hex}", prompt, params, new)
                session.engine.submit(request, events.put)
            while left:
                for event in events.get():
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, TokenEvent):
                        tokens += [(event.request_id, event.time)] * len(event.tokens)
                    left -= isinstance(event, Finished)
            total = time.monotonic() - began
            start = begun(sorted(tokens, key=lambda token: token[1]), len(prompts))
            return common.Answered(start.time - began, total, start.tokens)

        if "cold" in given.cells.split(","):
            generate([common.ids(32, given.seed)], 1)
            common.tell("cold", common.process_age(), "s")

        common.run_cells(given.cells, generate, given.seed, lambda cell: beside(session, cell, given.threads))


def beside(session: Session, key: str, threads: int) -> common.Beside:
    """What a cell must do at least, and the machine's peaks before and after it, probed in another process; for `rss`
    what the model and the positions that were filled must take."""
    executor = session.model.executor
    if key == "rss":
        elements = KV_DTYPES[element_type(executor.kv_dtype)]
        a_position = sum(group.bytes_per_token(elements) for group in executor.programs.groups)
        weights = weight_bytes(session.model.weights)
        return lambda: {"weights_bytes": weights, "kv_bytes": a_position * sum(common.RSS)}
    tokens, least = least_work(session, next(cell for cell in CELLS if cell.key == key))
    peaks = asdict(fresh_peaks(threads))
    return lambda: {
        "work_tokens": tokens, "work": asdict(least), "peaks": peaks, "peaks_after": asdict(fresh_peaks(threads)),
    }  # fmt: skip


main()
