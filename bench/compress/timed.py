"""How many steps of learning a time allows, by the clock or of the processor, on the machine that it is asked on.
Knows a Fitter."""

import math
import sys
import time
from collections.abc import Callable

from inhouse.compress.fit import Fitter

TIMED, SLACK = 12, 0.85  # steps that are timed; share of the time left that is planned with


def planned_steps(
    make: Callable[[int], Fitter], until: float, most: int, clock: Callable[[], float] = time.monotonic
) -> int:
    """Steps that end before `until` of `clock`, at most `most`, so that a schedule over them comes to its end.

    `make(steps)` gives a fresh run, without a folder and without validation; some of its steps are done and timed.
    """
    begun = clock()
    trial = make(min(TIMED, most))
    trial.run()
    each = (clock() - begun) / max(1, trial.progress.step)
    left = until - clock()
    steps = max(1, min(most, math.floor(SLACK * left / each)))
    print(f"{each:.2f} s a step, {left:.0f} s left: {steps} steps", file=sys.stderr, flush=True)
    return steps
