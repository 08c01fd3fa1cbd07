"""OpenVINO GenAI's continuous batching, in process: `openvino_engine.py FOLDER` of an `optimum-cli export openvino`."""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import common
import numpy as np
import openvino as ov
import openvino_genai as genai


def main() -> None:
    parser = common.arguments()
    parser.add_argument("--trace", default="", help="replay these requests instead (written by http_load.py --plan)")
    given = parser.parse_args()
    config = genai.SchedulerConfig()
    config.cache_size, config.enable_prefix_caching = 1 if "rss" in given.cells else 3, False
    config.max_num_batched_tokens, config.max_num_seqs = 16384 if "8192" in given.cells else 4096, 64
    properties = {"INFERENCE_NUM_THREADS": given.threads}
    pipeline = genai.ContinuousBatchingPipeline(
        given.model, scheduler_config=config, device="CPU", properties=properties
    )
    count = 0

    def add(prompt: list[int], new: int) -> object:
        nonlocal count
        wish = genai.GenerationConfig()
        wish.max_new_tokens, wish.ignore_eos, wish.do_sample = new, True, False
        count += 1
        return pipeline.add_request(count, ov.Tensor(np.array([prompt], np.int64)), wish)

    def generate(prompts: common.Prompts, new: int) -> common.Answered:
        began, first, early = common.clock(), 0.0, 0
        handles = [add(list(prompt), new) for prompt in prompts]
        seen = [False] * len(handles)
        while pipeline.has_non_finished_requests():
            pipeline.step()
            if not first:
                seen = [done or handle.can_read() for done, handle in zip(seen, handles, strict=False)]
                if all(seen):
                    early = sum(tokens_out(handle) for handle in handles)
                    first = common.clock() - began
        total = common.clock() - began
        return common.Answered(first or total, total, early or None)

    if given.trace:
        import http_load

        generate([common.ids(32, given.seed)], 8)  # as http_load.py warms a server
        http_load.report(*replay(pipeline, add, http_load.read_plan(given.trace)))
        return
    if "cold" in given.cells.split(","):
        generate([common.ids(32, given.seed)], 1)
        common.tell("cold", common.process_age(), "s")
    common.run_cells(given.cells, generate, given.seed)


def tokens_out(handle: object) -> int:
    """Tokens of one request (a GenerationHandle) that are ready; each read gives one."""
    count = 0
    while handle.can_read():
        handle.read()
        count += 1
    return count


def replay(pipeline: genai.ContinuousBatchingPipeline, add: object, plan: list) -> tuple[list, float]:
    """Requests at their times, no HTTP and no server between: an upper bound for any server over this pipeline."""
    import http_load

    generate_one = add
    began, waiting, living, done = common.clock(), list(plan), [], []
    while waiting or living:
        now = common.clock() - began
        while waiting and waiting[0].at <= now:
            request = waiting.pop(0)
            living.append((request, generate_one(common.ids(request.prompt, request.seed), request.new), []))
        if not pipeline.has_non_finished_requests():
            continue
        pipeline.step()
        now = common.clock() - began
        for _, handle, times in living:
            while handle.can_read():
                handle.read()
                times.append(now)
        for entry in [e for e in living if len(e[2]) >= e[0].new]:
            living.remove(entry)
            done.append(http_load.Ended(entry[0].at, entry[2]))
    return done, common.clock() - began


main()
