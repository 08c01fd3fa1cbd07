"""onnxruntime-genai, static batches: `onnxruntime_engine.py FOLDER` of `python -m onnxruntime_genai.models.builder`."""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import common
import numpy as np
import onnxruntime_genai as genai


def main() -> None:
    given = common.arguments().parse_args()
    path = os.path.join(given.model, "genai_config.json")
    with open(path) as file:
        config = json.load(file)
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = given.threads
    with open(path, "w") as file:
        json.dump(config, file, indent=1)
    model = genai.Model(given.model)

    def generate(prompts: common.Prompts, new: int) -> common.Answered:
        began, first = common.clock(), 0.0
        wish = genai.GeneratorParams(model)
        length = len(prompts[0]) + new
        wish.set_search_options(
            max_length=length, min_length=length, do_sample=False, batch_size=len(prompts), num_beams=1
        )
        generator = genai.Generator(model, wish)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(new):
            generator.generate_next_token()
            first = first or common.clock() - began
        return common.Answered(first, common.clock() - began, len(prompts))  # all first tokens come in one step

    if "cold" in given.cells.split(","):
        generate([common.ids(32, given.seed)], 1)
        common.tell("cold", common.process_age(), "s")
    common.run_cells(given.cells, generate, given.seed)


main()
