"""A run of the benchmark with a fake clock: who is measured, who is named, what is written."""

import dataclasses
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_toys import TINY, entry_of, plain_gate_up, row
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import counts, markdown, plots, registry, report, results, run
from benchmarks import worker as worker_module
from benchmarks.case import Case, Model
from benchmarks.counts import Stage
from benchmarks.plan import Plan, Spot
from benchmarks.registry import Run, Shows, Unsupported
from benchmarks.results import Journal, LeftOut
from benchmarks.roofs import near
from benchmarks.routing import Skew
from benchmarks.shapes import SHAPES
from benchmarks.worker import Poisoned, Worker, prepare
from mixmoe import bench_cli
from mixmoe.timing import Flush, Timing

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def case():
    return Case.random(Model.random(TINY, "cpu"), 9, Skew.UNIFORM)


# --- registry


def test_the_rivals_of_the_issue_are_there():
    entries = registry.load()
    plugins = {e.plugin for e in entries if e.provider != registry.OURS}
    assert plugins >= {"humming", "triton_kernels", "deepgemm", "torch_grouped"}
    recipes = {(e.provider.split("_")[0], e.recipe) for e in entries}
    assert {("humming", "a8w4"), ("humming", "a16w4"), ("deepgemm", "a8w8_block")} <= recipes
    for name in ("a8w4", "a8w4_mx", "a4w4", "a16w4", "a8w8", "a16w16"):
        stages = {e.stage for e in entries if (e.provider, e.recipe) == ("mixmoe", name)}
        assert stages == set(Stage)
    assert all(e.recipe in counts.RECIPES for e in entries)


def test_choosing_rivals_and_recipes():
    entries = registry.load()
    none = registry.choose(entries, "none", ["a8w4"])
    assert none and all(e.provider == "mixmoe" and e.recipe == "a8w4" for e in none)
    some = registry.choose(entries, "humming,deepgemm", [])
    assert {e.plugin for e in some} == {"humming", "deepgemm"}
    with pytest.raises(ValueError, match="no such rival.*marlin"):
        registry.choose(entries, "marlin", ["a8w4"])


def test_two_providers_of_one_name_are_refused(monkeypatch):
    monkeypatch.setattr(registry, "ENTRIES", [])
    add = registry.provider("toy", Stage.STAGE1, recipe="a8w4")
    add(lambda case: None)
    with pytest.raises(ValueError, match="two providers"):
        add(lambda case: None)
    registry.provider("toy", Stage.STAGE2, recipe="a8w4")(lambda case: None)


def test_a_missing_module_is_named():
    assert registry.why_missing(entry_of(Stage.LAYER, needs=("json",))) is None
    reason = registry.why_missing(entry_of(Stage.LAYER, needs=("no_such_rival",)))
    assert reason is not None and "no_such_rival" in reason
    assert registry.one_line(RuntimeError("\n\n a \n b")) == "RuntimeError:"
    assert len(registry.one_line("x" * 999)) == 200


# --- the worker


class FakeClock:
    """Gives 10 us to the first provider captured, 11 to the second and so on."""

    def capture(self, call, **_):
        call()
        return call

    def compare(self, captured, rounds=7):
        return {name: Timing(10.0 + i, 0.5, rounds) for i, name in enumerate(captured)}


class FakeRoofs:
    def read_us(self, flush, nbytes):
        return 1.9 + nbytes / 4.48e6

    def tflops(self, kind):
        return 1486.0

    def reduction_us(self, flush, made, hidden):
        return 0.0

    def as_json(self):
        return {"dense_tflops": {"fp8": 1486.0}, "read_us": [], "reduction_us": []}


def right(case):
    out = plain_gate_up(case, case.model.weights("bf16")[0].codes)
    return Run(lambda: None, lambda routes: out[routes], Shows.GATE_UP)


def wrong(case):
    out = right(case)
    return dataclasses.replace(out, rows=lambda routes: out.rows(routes) * 1.5)


def refusing(case):
    raise Unsupported("H must be odd")


def varying(case):
    good, calls = right(case), []
    return dataclasses.replace(
        good, call=lambda: calls.append(1), rows=lambda r: good.rows(r) * (1 + 1e-9 * len(calls))
    )


def make_worker(tmp_path, monkeypatch, builds, *, resume=False, synchronise=lambda: None, **plan):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    fields = {"shapes": ("tiny",), "tokens": (1, 9), "stages": ("stage1",), "out": str(tmp_path)}
    made = Plan(**fields | plan)
    entries = [entry_of(Stage.STAGE1, provider=name, build=build) for name, build in builds.items()]
    journal = Journal(tmp_path / "journal.jsonl", resume=resume)
    clocks = {flush: FakeClock() for flush in Flush}
    return Worker(
        made, journal, entries, clocks, FakeRoofs(), device="cpu", synchronise=synchronise
    )


def test_every_provider_is_measured_or_named(tmp_path, monkeypatch):
    builds = {"right": right, "wrong": wrong, "refusing": refusing}
    worker = make_worker(tmp_path, monkeypatch, builds)
    worker.run()
    seen = {(r.provider, r.tokens, r.routing, r.flush) for r in worker.journal.rows}
    want = itertools.product(["right"], [1, 9], ["uniform", "zipf"], ["clean", "dirty"])
    assert seen == set(want)
    reasons = {item.provider: item.reason for item in worker.journal.left_out}
    assert "wrong result" in reasons["wrong [a16w16]"]
    assert "H must be odd" in reasons["refusing [a16w16]"]
    row = worker.journal.rows[0]
    assert row.us == 10.0 and row.spread == 0.5 and row.worst_row_error < 1e-9
    assert row.roof_us == pytest.approx(1.9 + row.nbytes / 4.48e6, abs=1e-3)


def test_rivals_may_run_at_fewer_token_counts(tmp_path, monkeypatch):
    worker = make_worker(tmp_path, monkeypatch, {"right": right}, rival_tokens=(9,))
    worker.entries.append(entry_of(Stage.STAGE1, provider="mixmoe", build=right))
    worker.run()
    seen = {(row.provider, row.tokens) for row in worker.journal.rows}
    assert seen == {("right", 9), ("mixmoe", 1), ("mixmoe", 9)}


def test_a_rival_far_behind_is_left_out_between_the_goals(tmp_path, monkeypatch):
    worker = make_worker(tmp_path, monkeypatch, {"right": right, "slow": right})
    for tokens, slow in ((1, 16.0), (8, 16.0), (64, 14.0)):
        for name, us in (("right", 10.0), ("slow", slow), ("mixmoe", 1.0)):
            made = row(name, us, tokens, shape="tiny", recipe="a16w16")
            worker.journal.add(made, f"{name} [a16w16]")
    quick, slow = worker.entries
    for tokens, skew, beaten in (
        (4, Skew.UNIFORM, True),  # 1.6 x the best at 1 and at 8
        (16, Skew.UNIFORM, False),  # 1.4 x at 64
        (8, Skew.UNIFORM, False),  # a count with a goal is always measured
        (8, Skew.ZIPF, True),
        (128, Skew.UNIFORM, False),
    ):
        spot = Spot("tiny", skew, tokens)
        assert worker._beaten(slow, spot) is beaten, spot
        assert not worker._beaten(quick, spot)
    worker.plan = dataclasses.replace(worker.plan, tokens=(4,), skews=("uniform",))
    worker.run()
    assert {r.provider for r in worker.journal.rows if r.tokens == 4} == {"right"}
    assert "1.5 x the best rival" in worker.journal.left_out[0].reason


def test_ours_must_keep_its_word_on_determinism(case):
    with pytest.raises(ArithmeticError, match="deterministic"):
        prepare(entry_of(Stage.STAGE1, provider="mixmoe", build=varying), case)
    assert prepare(entry_of(Stage.STAGE1, build=right), case).deterministic
    assert not prepare(entry_of(Stage.STAGE1, build=varying), case).deterministic


def test_a_resumed_run_measures_only_what_is_missing(tmp_path, monkeypatch):
    first = make_worker(tmp_path, monkeypatch, {"right": right}, tokens=(1,))
    first.run()
    built = []

    def counting(case):
        built.append(case.tokens)
        return right(case)

    builds = {"right": counting}
    again = make_worker(tmp_path, monkeypatch, builds, tokens=(1, 9), resume=True)
    again.run()
    assert built == [9, 9], "uniform and zipf of the new count"
    assert len(again.journal.rows) == 8


def test_a_failure_is_not_tried_again(tmp_path, monkeypatch):
    worker = make_worker(tmp_path, monkeypatch, {"refusing": refusing}, tokens=(1,))
    worker.run()
    assert len(worker.journal.left_out) == 1, "uniform failed, zipf is the same case"


def test_a_lost_context_ends_the_process_with_the_failure_noted(tmp_path, monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    worker = make_worker(tmp_path, monkeypatch, {"bad": refusing}, synchronise=lost)
    with pytest.raises(Poisoned):
        worker.run()
    noted = Journal(tmp_path / "journal.jsonl", resume=True)
    assert [item.provider for item in noted.left_out] == ["bad [a16w16]"]


def test_a_process_that_dies_names_who_was_running(tmp_path, monkeypatch):
    def dies(case):
        raise KeyboardInterrupt  # as good as a crash: nothing in the worker catches it

    worker = make_worker(tmp_path, monkeypatch, {"right": right, "deadly": dies}, tokens=(1,))
    with pytest.raises(KeyboardInterrupt):
        worker.run()
    again = make_worker(
        tmp_path, monkeypatch, {"right": right, "deadly": dies}, tokens=(1,), resume=True
    )
    again.run()
    assert [item.provider for item in again.journal.left_out] == ["deadly [a16w16]"]
    assert again.journal.left_out[0].reason == "ended the process"
    assert {row.provider for row in again.journal.rows} == {"right"}


def test_a_fault_in_a_replay_is_ours(tmp_path, monkeypatch):
    worker = make_worker(tmp_path, monkeypatch, {"right": right}, tokens=(1,), skews=("uniform",))
    worker.entries.append(entry_of(Stage.STAGE1, provider="mixmoe", build=right))
    real = FakeClock.compare

    def compare(self, captured, rounds=7):
        if any(name.startswith("mixmoe") for name in captured):
            raise RuntimeError("an illegal memory access")
        return real(self, captured, rounds)

    monkeypatch.setattr(FakeClock, "compare", compare)
    worker.run()
    assert {item.provider for item in worker.journal.left_out} == {"mixmoe [a16w16]"}
    assert "in a replay" in worker.journal.left_out[0].reason


def test_a_case_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    worker = make_worker(tmp_path, monkeypatch, {"right": right}, skews=("uniform",))
    real = Case.random

    def random(model, tokens, skew):
        if tokens == 9:
            raise MemoryError("out of memory")
        return real(model, tokens, skew)

    monkeypatch.setattr(worker_module.Case, "random", random)
    worker.run()
    assert [(item.provider, item.tokens) for item in worker.journal.left_out] == [("all", 9)]
    assert {row.tokens for row in worker.journal.rows} == {1}


def test_workers_are_started_again_while_they_get_on(tmp_path, monkeypatch):
    plans = []

    def worker(command, input, text, env):
        assert str(ROOT) in env["PYTHONPATH"].split(os.pathsep)
        plans.append(Plan.read(input))
        journal = tmp_path / "journal.jsonl"
        if len(plans) < 3:
            journal.write_text("x" * len(plans))
        return SimpleNamespace(returncode=worker_module.AGAIN)

    monkeypatch.setattr(run.subprocess, "run", worker)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(run, "collect", lambda plan, device, status: status)
    assert run.execute(Plan(out=str(tmp_path))) == worker_module.AGAIN
    assert [plan.resume for plan in plans] == [False, True, True], "the third got nowhere"


def test_a_run_out_of_time_stops(tmp_path, monkeypatch):
    worker = make_worker(tmp_path, monkeypatch, {"right": right}, seconds=0.0)
    worker.run()
    assert worker.journal.rows == []


def test_sizes_are_shared_to_half_a_per_cent():
    sizes = [17 * 1.003**i for i in range(4000)]
    assert all(abs(near(round(size)) / size - 1) < 0.0056 for size in sizes if size > 1e5)
    assert near(1) == near(0) == 16 and near(1 << 20) == 1 << 20


def test_a_warm_run_times_nothing(tmp_path, monkeypatch):
    worker = make_worker(tmp_path, monkeypatch, {"right": right, "no": refusing}, warm=True)
    worker.run()
    assert worker.journal.rows == [] and worker.journal.left_out


# --- results, report, plots


PUBLISHED = (
    "provider",
    "shape",
    "recipe",
    "tokens",
    "stage",
    "flush",
    "deterministic",
    "us",
    "spread",
    "roof_us",
    "worst_row_error",
)


def test_the_file_has_the_published_schema(tmp_path):
    path = tmp_path / "h200.json"
    results.save(path, results.meta("NVIDIA H200", "abc"), [row(), row("deepgemm", 30.0)])
    body = json.loads(path.read_text())
    assert set(body) == {"meta", "rows"}
    assert set(body["meta"]) >= {"device", "torch", "triton", "commit", "date"}
    assert body["meta"]["commit"] == "abc"
    for made in body["rows"]:
        assert tuple(made)[:11] == PUBLISHED
    about, rows = results.load(path)
    assert about["device"] == "NVIDIA H200" and rows == [row(), row("deepgemm", 30.0)]


def test_a_number_that_json_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError):
        results.save(tmp_path / "x.json", {}, [row(us=float("nan"))])
    assert not (tmp_path / "x.json").exists()


def test_the_journal_survives_being_cut(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, resume=False)
    journal.add(row(), "mixmoe [a8w4]")
    journal.add(LeftOut("x", "s", 1, "stage1", "why"))
    journal.note_roofs({"dense_tflops": {"fp8": 1.0}})
    path.write_text(path.read_text() + '["row", {"prov')
    again = Journal(path, resume=True)
    assert again.rows == [row()] and again.left_out == journal.left_out
    assert again.measured == journal.measured and again.roofs == journal.roofs
    assert Journal(path, resume=False).rows == []


def test_the_best_rival_is_a_rival_and_the_best():
    rows = [row(us=5.0), row("a", 30.0), row("b", 25.0), row("c", 1.0, flush="dirty")]
    best = results.best_rival(rows)
    assert best["dsv3_tp8", 8, "stage1", "uniform", "clean"].provider == "b"
    assert best["dsv3_tp8", 8, "stage1", "uniform", "dirty"].provider == "c"


def test_rates_and_fractions():
    assert row().rate == "2.24 TB/s" and row().of_roof == 0.5
    assert row(roof_by="dense GEMM", flops=2 * 10**10).rate == "1000 TFLOP/s"


def test_the_report_shows_ours_beside_theirs_and_names_who_is_missing():
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    rows = [row(us=20.0), row("humming_fp8", 34.4, leaves_out="activation"), row("deepgemm", 49.2)]
    left = [dataclasses.asdict(LeftOut("triton_kernels", "all", 0, "layer", "does not import"))]
    about = results.meta("NVIDIA H200", "abcdef") | {"left_out": left}
    report.print_all(about, rows, detail=True, console=console)
    text = console.export_text()
    for part in (
        "34.4 humming_fp8",
        "20.0 (50%)",
        "1.72x",
        "triton_kernels",
        "does not import",
        "leaves out: activation",
        "49.2",
        "2.0e-03",
    ):
        assert part in text, part
    slow = report.Ours(row(us=50.0), row(us=49.9))
    assert report.summary_cells(slow, row("a", 40.0))[3] == "[red]0.80x[/]"


def test_the_headline_is_the_default_and_the_fastest_stands_beside_it():
    quick = row(us=15.0, deterministic=False, accumulate="fast")
    rows = [row(us=20.0), quick, row(us=1.0, recipe="a4w4"), row("deepgemm", 2.0)]
    (ours,) = report.ours_of(rows).values()
    assert ours.default.us == 20.0 and ours.fastest.us == 15.0
    assert ours.extra == "15.0 fast atomics"
    assert "**20.0**, 1.50x (15.0 fast atomics)" in markdown.beside(ours, row("a", 30.0))
    slow = row(us=25.0, accumulate="precise")
    (both,) = report.ours_of([*rows, slow]).values()
    assert both.default.us == 20.0 and both.extra == "15.0 fast atomics, 25.0 precise"
    (old,) = report.ours_of([slow, quick]).values()  # a run from before "auto"
    assert old.default is slow and old.extra == "15.0 fast atomics"
    (alone,) = report.ours_of([quick]).values()
    assert alone.default is quick and alone.extra == ""
    (other,) = report.ours_of([row(us=1.0, recipe="a4w4")]).values()
    assert other.default.us == 1.0


def test_plots_are_drawn(tmp_path):
    rows = [
        row(name, us * tokens**0.5, tokens, stage)
        for name, us in (("mixmoe", 5.0), ("humming_fp8", 9.0))
        for tokens in (1, 8, 64)
        for stage in report.STAGES
    ]
    roofs = {"dense_tflops": {"fp8": 1486.0}, "read_us": [{"bytes": 10**8, "us": 24.0}]}
    about = results.meta("NVIDIA H200", "abc") | {"roofs": roofs}
    drawn = plots.draw_all(about, rows, tmp_path)
    assert [path.name for path in drawn] == ["time-dsv3_tp8.png", "roofline.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 9000 for path in drawn)


def test_the_tables_of_a_document_are_replaced(tmp_path):
    path = tmp_path / "measured.md"
    path.write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    left = [dataclasses.asdict(LeftOut("triton_kernels", "all", 0, "layer", "does not import"))]
    about = results.meta("NVIDIA H200", "abc") | {"left_out": left}
    rows = [row(us=20.0), row("humming_fp8", 34.4, leaves_out="activation")]
    for _ in range(2):
        markdown.update(path, about, rows)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("10.0 / 34.4 humming_fp8 / **20.0**, 1.72x") == 1
    assert "triton_kernels; layer; all shapes: does not import" in text
    assert "leaves out: activation" in text
    path.write_text("no marks")
    with pytest.raises(ValueError, match="must be a document with one line"):
        markdown.update(path, about, rows)


def test_cases_that_the_time_did_not_suffice_for_are_listed():
    plan = Plan(shapes=("dsv3_tp8",), tokens=(1, 8), skews=("uniform", "zipf"))
    assert run.not_reached(plan, [row(tokens=8)]) == [
        "dsv3_tp8, uniform routing: T 1",
        "dsv3_tp8, zipf routing: T 1, 8",
    ]


def test_the_file_is_named_after_the_device():
    assert run.file_name("NVIDIA H200") == "h200"
    assert run.file_name("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"


def test_the_command_says_what_it_needs():
    answer = CliRunner().invoke(bench_cli.app, ["--rivals", "none", "--shape", "nope"])
    assert answer.exit_code != 0 and "no such shape" in answer.output
    if not torch.cuda.is_available():
        answer = CliRunner().invoke(bench_cli.app, ["--rivals", "none"])
        assert answer.exit_code != 0 and "CUDA device" in str(answer.exception)


def test_the_command_shows_a_results_file(tmp_path):
    path = tmp_path / "h200.json"
    results.save(path, results.meta("NVIDIA H200", "abc"), [row(), row("deepgemm", 30.0)])
    answer = CliRunner().invoke(bench_cli.app, ["--show", str(path)])
    assert answer.exit_code == 0, answer.output
    assert "deepgemm" in answer.output and list(tmp_path.iterdir()) == [path], "it only prints"
    answer = CliRunner().invoke(bench_cli.app, ["--show", str(path), "--out", str(tmp_path / "p")])
    assert answer.exit_code == 0 and (tmp_path / "p" / "roofline.png").exists()


REFUSED = {
    "show nothing": (["--show", "nosuch.json"], "nosuch.json must be a results file"),
    "show text": (["--show", "text.md"], "text.md must be a results file, {meta, rows}"),
    "show other": (["--show", "other.json"], "other.json must be a results file"),
    "merge nothing": (["--merge", "a.json,b.json"], "a.json must be a results file"),
    "no document": (["--show", "h200.json", "--markdown", "no.md"], "no.md must be a document"),
    "no marks": (["--show", "h200.json", "--markdown", "text.md"], "text.md must be a document"),
    "tokens": (["--tokens", "xx"], "numbers with commas between: got xx, nearest legal: 1,8,64"),
    "stages": (["--stages", "foo"], "no such stage: ['foo']; there are ['stage1', 'stage2', 'la"),
    "routing": (["--routing", "foo"], "no such routing: ['foo']; there are ['uniform', 'zipf']"),
    "flush": (["--flush", "foo"], "no such flush: ['foo']; there are ['clean', 'dirty']"),
    "recipe": (["--recipes", "foo"], "no such recipe: ['foo']"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    results.save(Path("h200.json"), results.meta("NVIDIA H200", "abc"), [row()])
    Path("text.md").write_text("no marks, no JSON")
    Path("other.json").write_text('{"kernels": []}')
    words, message = REFUSED[case]
    answer = CliRunner().invoke(bench_cli.app, words)
    assert answer.exit_code == 2 and message in answer.output
    assert answer.output.startswith("mixmoe: ") and answer.output.count("\n") == 1
