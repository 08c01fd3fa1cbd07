"""stories260K in logarithmic codes or dynamic fixed point, all matrices, scored by the native engine.

python -m bench.compress.stories_codes --method log|fixed [--record]
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from bench.compress.results import record
from bench.compress.scoring import score
from bench.compress.teacher_text import model_folder

from inhouse.compress.methods.fixed import FixedOptions, fixed
from inhouse.compress.methods.logcodes import LogOptions, logcodes
from inhouse.compress.work import Work
from inhouse.load.stored import stored_config, stored_sides
from inhouse.runtime.form import Form
from inhouse.store.stored_model import write_stored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("log", "fixed"), required=True)
    parser.add_argument("--record", action="store_true", help="put the figure into docs/compression-results.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="codes-") as scratch, Work.open(str(model_folder()), Path(scratch) / "work") as work:
        matrices = work.matrices()

        def form(name: str) -> Form:
            if given.method == "log":
                return logcodes(work.value(name), None, LogOptions())
            return fixed(work.value(name), None, FixedOptions())[0]

        stored = write_stored(
            Path(scratch) / "model", stored_config(work.described), ((name, form(name)) for name in matrices),
            ((name, work.value(name).numpy()) for name in work.names() if name not in matrices), {},
            stored_sides(work.described),
        )  # fmt: skip
        found = score(stored.folder)
    print(json.dumps({"bytes": stored.nbytes, **found.to_dict()}, indent=1))
    if given.record:
        what = {"log": "four-bit logarithmic codes", "fixed": "dynamic fixed point, 8-bit mantissas"}[given.method]
        record(
            {
                "id": f"codes-{given.method}", "what": f"stories260K, {what}, perplexity of stories 0-39",
                "value": round(found.perplexity, 4), "bytes": stored.nbytes,
                "command": f"python -m bench.compress.stories_codes --method {given.method}",
                "note": f"without data; native engine; {8 * stored.nbytes / 260032:.2f} bits a weight; KL "
                f"{found.kld_mean:.4g} nats a token",
            }
        )  # fmt: skip


if __name__ == "__main__":
    main()
