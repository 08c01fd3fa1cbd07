"""Inhouse, in process, through its library: `inhouse_engine.py MODEL [--quantize q4] [--kv f16]`."""

import os
import queue
import sys
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
from inhouse.tune.measure import CELLS, least_work


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

        def generate(prompts: common.Prompts, new: int) -> tuple[float, float]:
            events: queue.SimpleQueue = queue.SimpleQueue()
            began, waiting, left, first = common.clock(), set(), len(prompts), 0.0
            params = SamplingParams(temperature=0.0, ignore_eos=True)
            for prompt in prompts:
                request = make_request(f"bench-{uuid.uuid4().hex}", prompt, params, new)
                waiting.add(request.id)
                session.engine.submit(request, events.put)
            while left:
                for event in events.get():
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, TokenEvent) and waiting:
                        waiting.discard(event.request_id)
                        if not waiting:
                            first = common.clock() - began
                    left -= isinstance(event, Finished)
            return first, common.clock() - began

        if "cold" in given.cells.split(","):
            generate([common.ids(32, given.seed)], 1)
            common.tell("cold", common.process_age(), "s")

        common.run_cells(given.cells, generate, given.seed, lambda cell: beside(session, cell, given.threads))


def beside(session: Session, key: str, threads: int) -> dict[str, object]:
    """What a cell must do at least, and the machine's peaks now, probed in another process; for `rss` what the model
    and the positions that were filled must take."""
    executor = session.model.executor
    if key == "rss":
        elements = KV_DTYPES[element_type(executor.kv_dtype)]
        a_position = sum(group.bytes_per_token(elements) for group in executor.programs.groups)
        return {"weights_bytes": weight_bytes(session.model.weights), "kv_bytes": a_position * sum(common.RSS)}
    tokens, least = least_work(session, next(cell for cell in CELLS if cell.key == key))
    return {"work_tokens": tokens, "work": asdict(least), "peaks": asdict(fresh_peaks(threads))}


main()
