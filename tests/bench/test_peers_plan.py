"""Plans of bench/peers: what is dropped, in which order engines run, what goes on after a kill. No engine runs."""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from bench.peers import plan, run, sides
from bench.peers.plan import Bout, Entry

ENTRIES = (
    Entry(1, "qwen2.5-0.5b", "4.5", "decode32", {"openvino": 2, "llama": 1}, second=True),
    Entry(2, "qwen2.5-0.5b", "4.5", "batch8", {"llama": 2}),
)


def test_bouts_come_by_importance_and_turn_round() -> None:
    found = list(plan.bouts(ENTRIES, "f16", "int8,f16"))
    assert [(bout.cells, bout.round, bout.engines) for bout in found] == [
        ("decode32", 0, ("ours f16", "ours int8", "openvino", "llama")),
        ("batch8", 0, ("ours f16", "llama")),
        ("decode32", 1, ("openvino", "ours int8", "ours f16")),
        ("batch8", 1, ("llama", "ours f16")),
    ]


def test_the_least_important_is_dropped_first() -> None:
    found = list(plan.bouts(ENTRIES, "f16", ""))
    cost = {bout.name: 60.0 for bout in found}
    assert plan.cut(found, cost, 240.0) == (found, [])
    kept, dropped = plan.cut(found, cost, 100.0)
    assert kept == found[:1]
    assert dropped == [found[3], found[2], found[1]]


def test_seconds_by_hand() -> None:
    bout = Bout("qwen2.5-0.5b", "4.5", "prefill512,decode2048", 0, ("ours f16", "llama"), 1, "f16")
    ours = 0.7 + 1 + (2 * 512 / 680 + 2) + (2048 / 520 + 128 / 72 + 2)
    assert plan.seconds(bout, "ours f16") == pytest.approx(ours)


def test_every_plan_has_a_pace_and_a_side_for_each_engine(tmp_path: Path) -> None:
    for entries in plan.PLANS.values():
        found = list(plan.bouts(entries, "f16", "int8"))
        assert len({bout.name for bout in found}) == len(found)
        for bout in found:
            for engine in bout.engines:
                assert 1.0 < plan.seconds(bout, engine) < 300.0
                assert run.side_of(bout, engine, tmp_path).lacking()


def test_the_full_plan_covers_every_goal_on_both_models() -> None:
    for model in sides.MODELS:
        cells = {c for e in plan.FULL if e.model == model and e.bits == "4.5" for c in e.cells.split(",")}
        assert cells >= {
            "prefill512", "prefill4096", "decode32", "decode2048", "decode8192", "batch8", "batch32", "cold", "rss",
        }  # fmt: skip
    assert all(max(e.peers.values()) > 1 for e in plan.FULL if e.bits.endswith(sides.AVX2))


def test_what_is_not_installed_is_told_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run.Report(tmp_path / "peers.json", tmp_path, fresh=False)
    found = run.present(list(plan.bouts(ENTRIES, "f16", "")), report, None)
    assert found == []
    assert (
        "left out: llama on qwen2.5-0.5b at 4.5 bits: no KITS/models/qwen2.5-0.5b-Q4_0.gguf" in capsys.readouterr().out
    )
    assert any("openvino" in line for line in json.loads(report.path.read_text())["left_out"])


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []

    def fake(side: sides.Side, bout: Bout, kits: Path, trace: Path | None) -> list[dict[str, object]]:
        ran.append((bout.name, side.key))
        if len(ran) == 5:
            raise KeyboardInterrupt
        if side.key == "llama":
            raise RuntimeError("no such thing")
        return [{"bout": bout.name, "engine": side.engine, "cell": bout.cells, "value": 1.0}]

    monkeypatch.setattr(run, "run_side", fake)
    found = list(plan.bouts(ENTRIES, "f16", ""))
    with pytest.raises(KeyboardInterrupt):
        run.run(found, run.Report(tmp_path / "out.json", tmp_path, fresh=False), 0, None)
    first = list(ran)
    again = run.Report(tmp_path / "out.json", tmp_path, fresh=False)
    assert again.done() == {found[0].name}  # the second bout was not whole
    assert again.kept["left_out"] == [f"llama in {found[0].name}: no such thing"]
    assert again.usual(found[0], "openvino") is not None
    ran.clear()
    ran.extend([("", "")] * 5)
    run.run(found, again, 0, None)
    assert [name for name, _ in ran[5:]] == [name for bout in found[1:] for name in [bout.name] * len(bout.engines)]
    assert len(first) == 5


def test_no_bout_starts_that_would_end_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def slow(side: sides.Side, bout: Bout, kits: Path, trace: Path | None) -> list[dict[str, object]]:
        now[0] += 100.0
        return [{"bout": bout.name, "engine": side.engine, "cell": bout.cells, "value": 1.0}]

    monkeypatch.setattr(run, "run_side", slow)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    report = run.Report(tmp_path / "out.json", tmp_path, fresh=False)
    run.run(list(plan.bouts(ENTRIES, "f16", "")), report, 3.0, None)
    assert len(report.done()) == 1


def test_another_kv_type_of_ours_is_another_bout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with rounds in bf16 does not hold those in f16, and one with int8 beside is a bout of its own."""

    def ran(side: sides.Side, bout: Bout, kits: Path, trace: Path | None) -> list[dict[str, object]]:
        return [{"bout": bout.name, "engine": side.engine, "kv": side.kv, "ours": side.ours, "value": 1.0,
                 "cell": bout.cells}]  # fmt: skip

    monkeypatch.setattr(run, "run_side", ran)
    report = run.Report(tmp_path / "out.json", tmp_path, fresh=False)
    for kv, second in (("bf16", ""), ("f16", ""), ("bf16", "int8")):
        run.run(list(plan.bouts(ENTRIES[:1], kv, second)), report, 0, None)
    names = [f"qwen2.5-0.5b 4.5 decode32 round 0 kv {kv}" for kv in ("bf16", "f16", "bf16,int8")]
    assert {n for n in report.done() if "round 0" in n} == set(names)
    own = {n: [f["kv"] for f in report.kept["figures"] if f["bout"] == n and f["ours"]] for n in names}
    assert list(own.values()) == [["bf16"], ["f16"], ["bf16", "int8"]]


def test_a_kept_figure_says_where_when_and_by_what(tmp_path: Path) -> None:
    report = run.Report(tmp_path / "out.json", tmp_path, fresh=False)
    report.begin({"processor": "P", "cores": 2, "system": "S"}, {"inhouse": "1 at abc", "llama.cpp": "2"}, "c")
    engines = ("inhouse", "llama.cpp (AVX2)", "another")
    report.add([{"engine": engine, "date": "d"} for engine in engines], [])
    kept = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert [f["version"] for f in kept] == ["1 at abc", "2", "unknown"]
    assert {(f["machine"], f["date"]) for f in kept} == {("P, 2 cores, S", "d")}
    assert run.versions(tmp_path)["inhouse"].endswith(f"CPython {platform.python_version()}")


def test_a_figure_is_dated_and_tells_what_others_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([run.Used(100.0, 3.0, 50.0), run.Used(112.0, 4.0, 60.0)])
    monkeypatch.setattr(run, "busy", lambda: next(moments))
    monkeypatch.setattr(run, "probe", lambda side: {"read_bytes": 1.0})
    monkeypatch.setattr(run, "run_cells", lambda side, bout: [{"cell": "decode32", "value": 1.0}])
    bout = next(plan.bouts(ENTRIES, "bf16", ""))
    found = run.run_side(run.side_of(bout, "llama", tmp_path), bout, tmp_path, None)[0]
    assert (found["foreign"], found["stolen"]) == (1.2, 0.1)
    assert abs(datetime.fromisoformat(found["date"]) - datetime.now(UTC)).total_seconds() < 120


def test_a_runner_that_is_ended_leaves_no_engine_behind(tmp_path: Path) -> None:
    """As by a time limit: else the engine would run beside whatever is measured next."""
    told = tmp_path / "pid"
    engine = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import signal, sys; from bench.peers import run, sides; signal.signal(signal.SIGTERM, run._stop); "
        f"sides.output_of([sys.executable, '-c', {engine!r}], None, 60)"
    )
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}) as runner:
        until = time.monotonic() + 30
        while not (told.exists() and told.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        runner.terminate()
        assert runner.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


def test_cpu_of_others_counts_what_a_hypervisor_took() -> None:
    """proc(5): user nice system idle iowait irq softirq steal guest guest_nice; guests are in user already."""
    text = "cpu  1000 20 300 90000 700 4 5 600 77 8\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert run.cpu_seconds(text, 100) == (19.29, 6.0)
    before, after = run.Used(0.0, 0.0, 0.0), run.Used(*run.cpu_seconds(text, 100), 10.0)
    assert run.others(before, after, 9.29) == {"foreign": 1.0, "stolen": 0.6}


def test_a_round_more_counts_as_an_entry_six_ranks_below() -> None:
    beside = (
        Entry(7, "llama-3.2-1b", "16", "decode32", {"llama": 1}),
        Entry(8, "llama-3.2-1b", "16", "batch8", {"llama": 1}),
    )
    entries = (*ENTRIES, *beside)
    found = [(bout.model, bout.cells, bout.round) for bout in plan.bouts(entries, "f16", "")]
    assert found[2:4] == [("qwen2.5-0.5b", "decode32", 1), ("llama-3.2-1b", "decode32", 0)]
    assert found[-1] == ("llama-3.2-1b", "batch8", 0)


def test_a_results_file_names_every_command_that_it_is_of() -> None:
    given = argparse.Namespace(plan="full", kv="bf16", second_kv="", minutes=26.0, only=".", trace=Path("/x/trace.gz"))
    first = run.command_of(given)
    assert first.endswith("--plan full --kv bf16 --second-kv '' --minutes 26 --trace trace.gz")
    given.only, given.minutes = "batch8 .*", 0
    second = run.command_of(given)
    assert run.joined("", first) == first
    assert run.joined(run.joined(first, second), second) == f"{first}; then {second}"
