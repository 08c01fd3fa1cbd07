"""Beam search against transformers' own: ids and scores, on an encoder-decoder and on a decoder; then the engine's
care for its groups over the fake."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inhouse.core.errors import ContextLengthError, ExecutorError, UnsupportedError, UsageError
from inhouse.engine.engine import Engine
from inhouse.engine.request import Beams, EngineConfig, FinishReason, SamplingParams, make_request
from inhouse.runtime.sampling import ReferenceSampler
from tests.engine.driving import EOS, Result, drive, make_engine, run_all
from tests.engine.fakes import VOCAB, FakeExecutor, encoder_programs, logits_after, programs
from tests.families.parity import open_tiny, transformers_oracle
from tests.families.seq2seq import save_tiny
from tests.families.shapes import SHAPE

SOURCE = [5, 44, 17, 3, 80, 9, 33, 21, 1]


def searched(engine: Engine, params: SamplingParams, prompt: list[int], count: int, source: Any = None) -> Result:
    (result,) = run_all(engine, [make_request("beams", prompt, params, count, encoder=source)])
    return result


def compare(result: Result, out: Any, skip: int, ends: set[int]) -> None:
    """Ids up to the stop, and scores, of every returned output."""
    for choice, (row, score) in enumerate(zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True)):
        theirs = row[skip:]
        stop = next((i for i, token in enumerate(theirs) if token in ends), len(theirs))
        finished = result.finished[choice]
        assert result.tokens.get(choice, []) == theirs[:stop]
        assert finished.score == pytest.approx(score, rel=1e-5, abs=2e-5)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "early", "penalty"),
    [("t5", True, 1.0), ("t5", False, 2.0), ("bart", "never", 1.0), ("marian", False, 1.0), ("marian", True, 0.0)],
)
def test_encoder_decoders_as_transformers(name: str, penalty: float, early: Any, tmp_path: Path) -> None:
    layers = {"num_decoder_layers": 2} if name == "t5" else {"decoder_layers": 2}
    pair = save_tiny(name, tmp_path, scale=0.35, **layers)
    config = pair.original.config
    tiny = open_tiny(tmp_path)
    executor = tiny.executor("torch")
    end, start = config.eos_token_id, config.decoder_start_token_id
    last = None if name == "t5" else end
    engine = Engine(
        executor, EngineConfig(blocks={g.name: 64 for g in tiny.programs.groups}), {end}, sampler=ReferenceSampler(),
        start=False,
    )  # fmt: skip
    params = SamplingParams(n=3, beams=Beams(4, penalty, early), last_token=last)
    out = pair.original.generate(
        torch.tensor([SOURCE]), num_beams=4, num_return_sequences=3, max_new_tokens=14, length_penalty=penalty,
        early_stopping=early, do_sample=False, output_scores=True, return_dict_in_generate=True, eos_token_id=end,
        forced_eos_token_id=last, bad_words_ids=None,
    )  # fmt: skip
    compare(searched(engine, params, [start], 14, SOURCE), out, 1, {end})
    engine.close()


@pytest.mark.torch
@pytest.mark.parametrize(("early", "penalty"), [(True, 1.0), (False, 0.5), ("never", 1.5), (False, -1.0)])
def test_a_decoder_as_transformers(early: Any, penalty: float, tmp_path: Path) -> None:
    oracle = transformers_oracle("LlamaForCausalLM", "LlamaConfig", SHAPE)
    oracle.save(tmp_path)
    tiny = open_tiny(tmp_path)
    prompt, ends = [3, 14, 15, 22, 65, 35], {2, 7}
    config = EngineConfig(blocks={g.name: 64 for g in tiny.programs.groups}, step_tokens=3)
    engine = Engine(tiny.executor("torch"), config, ends, sampler=ReferenceSampler(), start=False)
    params = SamplingParams(n=4, beams=Beams(4, penalty, early), bad_words=((9,), (3, 4)), no_repeat_ngram=3)
    out = oracle.model.generate(
        torch.tensor([prompt]), num_beams=4, num_return_sequences=4, max_new_tokens=20, length_penalty=penalty,
        early_stopping=early, do_sample=False, output_scores=True, return_dict_in_generate=True,
        eos_token_id=sorted(ends), pad_token_id=0, bad_words_ids=[[9], [3, 4]], no_repeat_ngram_size=3,
    )  # fmt: skip
    compare(searched(engine, params, prompt, 20), out, len(prompt), ends)
    engine.close()


def plain_search(prompt: list[int], beams: Beams, count: int, encoder: Any = None) -> list[tuple[float, list[int]]]:
    """The rules once more, over whole histories and with no engine: [(score, output)], best first."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    for length in range(1, count + 1):
        offers = []
        for i, (score, output) in enumerate(live):
            row = logits_after(prompt + output, encoder).astype(np.float64)
            logs = (row - row.max() - math.log(np.exp(row - row.max()).sum())).astype(np.float32)
            offers += [(float(np.float32(score) + logs[t]), i, t) for t in range(VOCAB)]
        offers.sort(key=lambda o: (-o[0], o[1], o[2]))
        going = []
        for rank, (score, i, token) in enumerate(offers[: 2 * beams.width]):
            if token == EOS or length == count:
                if rank < beams.width:
                    done.append((score / length**beams.length_penalty, [*live[i][1], token]))
            else:
                going.append((score, [*live[i][1], token]))
        done = sorted(done, key=lambda d: -d[0])[: beams.width]
        live = going[: beams.width]
        if not live or len(done) == beams.width and live[0][0] / length**beams.length_penalty <= done[-1][0]:
            break
    return done


@pytest.mark.null
@settings(max_examples=12, deadline=None)
@given(
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=4), blocks=st.integers(12, 30), budget=st.integers(1, 30),
    running=st.integers(4, 8), length=st.integers(1, 30), count=st.integers(1, 20), reads=st.booleans(),
)  # fmt: skip
def test_groups_survive_whatever_else_runs(
    widths: list[int], blocks: int, budget: int, running: int, length: int, count: int, reads: bool
) -> None:
    """Groups, preempted as a whole or half admitted, beside plain sequences, find what they find alone."""
    executor = FakeExecutor(encoder_programs(context=64) if reads else programs(context=64))
    pools = {group.name: blocks for group in executor.programs.groups}
    engine = make_engine(executor, blocks=pools, step_tokens=budget, max_running=running)
    requests = []
    for i, width in enumerate(widths):
        prompt = [8 + (i * 13 + j * 5) % 40 for j in range(length)]
        source = [9, 10 + i, 11] if reads else None
        params = SamplingParams(temperature=0, beams=Beams(width), n=width) if i % 3 else SamplingParams(temperature=0)
        made = make_request(str(i), prompt, params, count, encoder=source)
        try:
            engine.submit(made, (result := Result()).feed)
        except ContextLengthError:
            continue
        requests.append((made, result))
    drive(engine)
    assert engine.stats().kv_usage == 0
    for made, result in requests:
        beams = made.params.beams or Beams(1)
        expected = plain_search(list(made.prompt), beams, count, made.encoder)
        for choice in range(made.params.n):
            output = [token for token in expected[choice][1] if token != EOS]
            assert result.tokens.get(choice, []) == output
            if made.params.beams:
                assert result.finished[choice].score == pytest.approx(expected[choice][0], abs=1e-4)


@pytest.mark.null
def test_a_cancel_and_a_failure_end_the_whole_group() -> None:
    executor = FakeExecutor(programs())
    engine = make_engine(executor)
    params = SamplingParams(beams=Beams(3), n=2)
    cancelled, failed, other = Result(), Result(), Result()
    engine.submit(make_request("c", [9, 10], params, 30), cancelled.feed)
    engine.submit(make_request("o", [9, 11], SamplingParams(temperature=0), 12), other.feed)
    for _ in range(4):
        engine.step()
        engine.check()
    engine.cancel("c", 1)
    drive(engine)
    assert {r.reason for r in cancelled.finished.values()} == {FinishReason.CANCELLED}
    assert (cancelled.lasts, len(cancelled.finished), other.lasts) == (1, 2, 1)
    engine.submit(make_request("f", [9, 10], params, 30), failed.feed)
    for _ in range(3):
        engine.step()
    executor.broken = True
    engine.step()
    executor.broken = False
    drive(engine)
    assert isinstance(failed.failed[1].error, ExecutorError)
    assert (failed.lasts, engine.stats().kv_usage) == (1, 0)


@pytest.mark.null
def test_what_is_refused() -> None:
    for field, value in (("logprobs", 1), ("logit_bias", {3: 1.0}), ("presence_penalty", 1.0)):
        with pytest.raises(UnsupportedError, match=field):
            SamplingParams(beams=Beams(2), **{field: value})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"n is 3, it must be within \[1, 2\]"):
        SamplingParams(beams=Beams(2), n=3)
    with pytest.raises(UsageError, match="num_beams"):
        Beams(0)
    engine = make_engine(FakeExecutor(programs()), max_running=4)
    with pytest.raises(UsageError, match="num_beams is 5"):
        engine.submit(make_request("a", [9], SamplingParams(beams=Beams(5)), 4), Result().feed)
    engine = make_engine(FakeExecutor(programs()), blocks={"full": 8})
    with pytest.raises(ContextLengthError, match="blocks for 32"):
        engine.submit(make_request("a", [9] * 30, SamplingParams(beams=Beams(4)), 10), Result().feed)
