"""Times of the ops of a step."""

import numpy as np
import pytest

from inhouse.core.errors import UsageError
from tests.runtime_native.making import decoder, steps, tokens

pytestmark = pytest.mark.native


def test_every_op_that_runs_takes_time_and_is_counted_once() -> None:
    executor = decoder().native(threads=1)
    step = steps(executor.programs, [(tokens(1, 40), 0)], blocks_each=4)
    plain = executor.run("step", step)["logits"].copy()
    assert not executor.op_seconds("step").any()  # the first call begins
    assert np.array_equal(executor.run("step", step)["logits"], plain)
    ops = executor.programs.programs["step"].ops
    seconds = executor.op_seconds("step")
    assert len(seconds) == len(ops)
    assert all(t > 0 for op, t in zip(ops, seconds, strict=True) if op.kind in ("linears", "attention", "embed"))
    assert seconds.sum() < 60
    assert not executor.op_seconds("step").any()  # nothing ran since


def test_an_unknown_program_is_refused() -> None:
    with pytest.raises(UsageError):
        decoder().native().op_seconds("no such program")
