"""How a run is ordered, cut into shares, compiled ahead, accounted for and put together again."""

import dataclasses
import io
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from benchmark_toys import TINY, entry_of, row
from rich.console import Console
from triton.backends.compiler import GPUTarget
from typer.testing import CliRunner

from benchmarks import compile_only, merged, models, registry, report, results, run, warm
from benchmarks.case import Case, Memo, Model
from benchmarks.compile_only import CompileOnly
from benchmarks.counts import Stage
from benchmarks.models import Models
from benchmarks.plan import Plan, Spot
from benchmarks.routing import Skew
from benchmarks.shapes import SHAPES, TABLE_TOKENS, TOKENS
from benchmarks.spent import Spent, listed
from mixmoe import bench_cli
from mixmoe.backends import hopper
from mixmoe.backends.hopper import decode

# --- order and shares


def test_what_is_worth_most_comes_first():
    spots = Plan().spots()
    assert len(spots) == len(set(spots)) == len(SHAPES) * len(TOKENS) * 2
    goals = len(SHAPES) * len(TABLE_TOKENS)
    first, half = spots[:goals], spots[: len(spots) // 2]
    assert {s.tokens for s in first} == set(TABLE_TOKENS) and {s.shape for s in first} == {*SHAPES}
    assert {s.skew for s in half} == {Skew.UNIFORM}
    assert {s.tokens for s in half[goals:]} == {*TOKENS} - {*TABLE_TOKENS}
    assert spots[0] == Spot("dsv3_tp8", Skew.UNIFORM, 1)
    # a shape's cases follow each other: its weights are still there
    assert [s.tokens for s in first[:5]] == list(TABLE_TOKENS)
    assert len({s.shape for s in first[:5]}) == 1
    assert {s.tokens for s in spots[len(half) :][:goals]} == set(TABLE_TOKENS)
    assert Plan(skews=("zipf",), tokens=(8, 2, 1), shapes=("dsv3_ep",)).spots() == [
        Spot("dsv3_ep", Skew.ZIPF, tokens) for tokens in (1, 8, 2)
    ]


@pytest.mark.parametrize("parts", range(1, len(SHAPES) + 1))
def test_shares_cover_a_plan_exactly_once(parts):
    plan = Plan(out="x")
    shares = [plan.share(f"{number}/{parts}") for number in range(parts)]
    counted = Counter(spot for share in shares for spot in share.spots())
    assert counted == Counter(plan.spots())
    sizes = [len(share.shapes) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert len({share.journal for share in shares} | {plan.journal}) == parts + 1
    assert Plan.read(shares[0].dump()) == shares[0]


@pytest.mark.parametrize("bad", ["2/2", "0", "", "-1/2", "a/b", "0/0", "6/7"])
def test_a_share_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match="share"):
        Plan().share(bad)


# --- compiling ahead


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:9]])
def test_parts_compile_every_kernel_of_a_plan(tokens):
    plan = Plan(tokens=tokens, rival_tokens=(1, 8, 128), commit="abc", resume=True)
    chosen = registry.choose(registry.load(), "humming,deepgemm", plan.recipes)
    cut = warm.parts(plan, chosen)
    seen = Counter()
    for piece in cut:
        assert piece.warm and not piece.resume and piece.skews == ("uniform",)
        entries = registry.choose(registry.load(), piece.rivals, piece.recipes)
        assert len({entry.plugin for entry in entries}) == 1, "one owner a process"
        for spot in piece.spots():
            for entry in entries:
                seen[entry.label, entry.stage, spot.shape, spot.tokens] += 1
    want = {
        (entry.label, entry.stage, shape, tokens)
        for entry in chosen
        for shape in plan.shapes
        for tokens in (plan.tokens if entry.provider == registry.OURS else plan.rival_tokens)
    }
    assert seen == Counter(want)
    owners = list(dict.fromkeys(piece.rivals for piece in cut))
    assert owners == ["none", "humming", "deepgemm"], "ours, then the one with most ways"
    assert all(len(piece.tokens) <= warm.COUNTS for piece in cut)
    has_goal = [set(piece.tokens) <= set(TABLE_TOKENS) for piece in cut]
    assert has_goal == sorted(has_goal, reverse=True) and any(has_goal), "goals come first"


@triton.jit
def store_ones(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), 1)


@pytest.fixture
def standin(monkeypatch):
    """Triton believes in an sm_90 GPU; a launch would fail."""
    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)


def test_kernels_are_compiled_by_one_process_and_not_launched(tmp_path, monkeypatch, standin):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    out = torch.zeros(32, dtype=torch.int32)

    def cubins():
        return len(list((tmp_path / "cache").glob("*/*.cubin")))

    with CompileOnly(tmp_path / "claims"):
        store_ones[(1,)](out, 16)
        store_ones[(1,)](out, 16)
    assert cubins() == 1 and not out.any()
    store_ones.warmup(out, 16, grid=(1,))
    assert cubins() == 1, "what a launch would have looked for"
    store_ones.device_caches.clear()
    (tmp_path / "taken").mkdir()
    for claim in (tmp_path / "claims").iterdir():
        (tmp_path / "taken" / claim.name).touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    with CompileOnly(tmp_path / "taken"):
        store_ones[(1,)](out, 16)
    assert not list((tmp_path / "other").glob("*/*.cubin")), "another process had it"
    with CompileOnly(tmp_path / "taken"):
        store_ones[(1,)](out, 32)
    assert list((tmp_path / "other").glob("*/*.cubin")) and not out.any()
    with pytest.raises(Exception):  # noqa: B017 whatever a launch without a GPU says
        store_ones[(1,)](out, 16)


@pytest.mark.parametrize("tokens", [1, 8, 600])
def test_our_layer_is_compiled_without_its_results(tmp_path, monkeypatch, standin, tokens):
    """Nothing on the host reads what a kernel that was not launched would have written."""
    asked = set()
    monkeypatch.setattr(compile_only, "take", lambda path: asked.add(path.name))
    monkeypatch.setattr(hopper.HopperBackend, "unavailable", lambda self: None)
    for module in (decode, *vars(hopper_modules()).values()):
        if hasattr(module, "multiprocessors"):
            monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    case = Case.random(Model.random(TINY, "cpu"), tokens, Skew.UNIFORM)
    entries = [e for e in registry.load() if (e.provider, e.recipe) == (registry.OURS, "a8w4")]
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # fills what is left unwritten with the largest
    try:
        with CompileOnly(tmp_path):
            for entry in entries:
                try:
                    entry.build(case).call()
                except registry.Unsupported:
                    continue
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(asked) >= 4


def hopper_modules():
    import mixmoe.backends.hopper.gemm1_decode
    import mixmoe.backends.hopper.stages

    return mixmoe.backends.hopper


# --- accounts


def test_seconds_add_up_and_only_the_innermost_is_charged():
    now = [0.0]
    spent = Spent(clock=lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    wait(1)
    with spent.on("build"):
        wait(2)
        with spent.on("weights"):
            wait(4)
        wait(8)
    with pytest.raises(ValueError), spent.on("check"):
        wait(16)
        raise ValueError
    wait(32)
    assert spent.take() == {"rest": 33, "build": 10, "weights": 4, "check": 16}
    assert sum(spent.take().values()) == 0
    assert listed({"build": 1.0, "check": 0.001}) == "1.00 s (build 1.00)"


def test_a_memo_builds_under_watch_and_once():
    spent = Spent(clock=iter(range(100)).__next__)
    memo = Memo(watch=lambda: spent.on("weights"))
    assert [memo.once("a", lambda: 3), memo.once("a", lambda: 4)] == [3, 3]
    assert spent.take()["weights"] == 1


def test_weights_are_kept_while_there_is_room(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setitem(SHAPES, "other", dataclasses.replace(TINY, name="other"))
    kept = Models("cpu", Spent())
    first = kept.of("tiny")
    assert kept.of("other").shape.name == "other" and kept.of("tiny") is first
    monkeypatch.setattr(models, "taken", lambda *which: 0.9)
    assert kept.of("tiny") is first, "nothing is made, nothing goes"
    kept.drop()
    kept.of("tiny")
    kept.of("other")
    assert list(kept.kept) == ["other"]


def test_a_journal_sums_what_was_spent(tmp_path):
    journal = results.Journal(tmp_path / "journal.jsonl", resume=False)
    journal.note_spent({"build": 1.5})
    journal.note_spent({"build": 2.0, "check": 0.25})
    again = results.Journal(tmp_path / "journal.jsonl", resume=True)
    assert again.spent == journal.spent == {"build": 3.5, "check": 0.25}


# --- merging


def about(commit="abc", device="NVIDIA H200", date="2026-11-28 05:57 UTC", fp8=1500.0, **more):
    made = results.meta(device, commit) | {"date": date, "spent": {"build": 1.0}}
    reads = [{"flush": "clean", "bytes": int(fp8), "us": 1.0}]
    roofs = {"dense_tflops": {"fp8": fp8}, "read_us": reads, "reduction_us": []}
    missing = [{"provider": "x", "shape": "all", "tokens": 0, "stage": "layer", "reason": "gone"}]
    return made | {"roofs": roofs, "left_out": missing, "not_reached": [f"T {fp8}"]} | more


def test_shards_become_one_result(tmp_path):
    rows = [row(shape="dsv3_tp8"), row("deepgemm", 30.0)], [row(shape="dsv3_ep")]
    abouts = about(), about(date="2026-11-28 06:01 UTC", fp8=1490.0)
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, meta, found in zip(paths, abouts, rows, strict=True):
        results.save(path, meta, found)
    made = run.merge(paths, tmp_path / "whole")
    assert made == tmp_path / "whole" / "h200.json"
    meta, merged_rows = results.load(made)
    assert merged_rows == rows[0] + rows[1]
    assert meta["commit"] == "abc" and meta["date"] == "2026-11-28 06:01 UTC"
    assert meta["roofs"]["dense_tflops"] == {"fp8": 1500.0}
    assert [read["bytes"] for read in meta["roofs"]["read_us"]] == [1490, 1500]
    assert len(meta["left_out"]) == 1 and len(meta["not_reached"]) == 2
    first, second = meta["parts"]
    assert first["file"] == "a.json" and first["rows"] == 2 and first["shapes"] == ["dsv3_tp8"]
    assert second["dense_tflops"] == {"fp8": 1490.0} and second["spent"] == {"build": 1.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"commit": "abd"}, "different commit"),
        ({"device": "NVIDIA H100 80GB HBM3"}, "different device"),
        ({"triton": "3.9.0"}, "different triton"),
        ({"rivals": {"deep_gemm": "1"}}, "different rivals"),
    ],
)
def test_what_does_not_belong_together_is_not_merged(change, reason):
    files = ("a", about(), [row()]), ("b", about(**change), [row(tokens=64)])
    with pytest.raises(ValueError, match=reason):
        merged.merged(files)
    merged.merged([files[0], ("b", about(), [row(tokens=64)])])


def test_unknown_commits_and_rows_measured_twice_are_not_merged():
    unknown = about(commit="unknown")
    with pytest.raises(ValueError, match="unknown commits"):
        merged.merged([("a", unknown, [row()]), ("b", unknown, [row(tokens=64)])])
    with pytest.raises(ValueError, match="measured twice: mixmoe, a8w4"):
        merged.merged([("a", about(), [row(us=20.0)]), ("b", about(), [row(us=21.0)])])
    for other in ({"accumulate": "fast"}, {"deterministic": False}, {"flush": "dirty"}):
        merged.merged([("a", about(), [row()]), ("b", about(), [row(**other)])])


def test_a_merge_does_not_write_over_its_sources(tmp_path):
    path = tmp_path / "h200.json"
    results.save(path, about(), [row()])
    with pytest.raises(ValueError, match="written over"):
        run.merge([path], tmp_path)
    assert json.loads(path.read_text())["meta"].get("parts") is None


def test_the_command_merges_and_shares(tmp_path):
    for name, tokens in (("a", 8), ("b", 64)):
        results.save(tmp_path / f"{name}.json", about(), [row(tokens=tokens), row("dg", 9.0)][:1])
    files, whole = f"{tmp_path}/a.json,{tmp_path}/b.json", tmp_path / "whole"
    answer = CliRunner().invoke(bench_cli.app, ["--merge", files, "--out", str(whole)])
    assert answer.exit_code == 0, answer.output
    assert len(results.load(whole / "h200.json")[1]) == 2 and (whole / "roofline.png").exists()
    results.save(tmp_path / "b.json", about(commit="other"), [row(tokens=64)])
    answer = CliRunner().invoke(bench_cli.app, ["--merge", files, "--out", str(whole)])
    assert answer.exit_code != 0 and "different commit" in answer.output
    answer = CliRunner().invoke(bench_cli.app, ["--shard", "3/2"])
    assert answer.exit_code != 0 and "a share is like 0/2" in answer.output


def test_a_warm_run_starts_a_process_a_part_on_every_gpu(tmp_path, monkeypatch, capsys):
    started = []

    def worker(command, input, text, env, stdout, stderr, timeout):
        started.append((Plan.read(input), env))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(warm.subprocess, "run", worker)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    plan = Plan(out=str(tmp_path), warm=True, rivals="deepgemm", shapes=("dsv3_tp8", "dsv3_ep"))
    assert run.execute(plan, jobs=3) == tmp_path
    parts = warm.parts(plan, registry.choose(registry.load(), plan.rivals, plan.recipes))
    assert len(started) == len(parts) == 24
    assert {env["CUDA_VISIBLE_DEVICES"] for _, env in started} == {"0", "1"}
    assert len({piece.journal for piece, _ in started}) == 24, "each has files of its own"
    assert {piece.folder for piece, _ in started} == {tmp_path / "warm"}
    assert "warmed: 24 parts" in capsys.readouterr().out


def test_entries_without_a_stage_of_the_plan_leave_a_case_closed(tmp_path):
    from benchmarks.worker import Worker

    plan = Plan(out=str(tmp_path), stages=("layer",))
    journal = results.Journal(plan.journal, resume=False)
    worker = Worker(plan, journal, [entry_of(Stage.STAGE1)], {}, None)
    spot = Spot("dsv3_tp8", Skew.UNIFORM, 1)
    assert not worker._is_open(spot)
    worker.entries.append(entry_of(Stage.LAYER))
    assert worker._is_open(spot)
    for flush in plan.flushes:
        measured = row("toy", stage="layer", tokens=1, flush=flush)
        journal.add(measured, worker.entries[1].label)
    assert not worker._is_open(spot), "all of it is measured"


@pytest.mark.parametrize("width", [130, report.WIDTH])
def test_no_cell_of_a_summary_is_cut(width):
    """A console that is too narrow for all stages side by side has them one below the other."""
    ways = ({"us": 1234.5}, {"us": 2345.6, "accumulate": "precise"},
            {"us": 1111.1, "deterministic": False})  # fmt: skip
    rows = [row(tokens=16384, stage=stage, **way) for stage in report.STAGES for way in ways]
    rows += [row("humming_fp8", 2222.2, 16384, stage) for stage in report.STAGES]
    console = Console(width=width, file=io.StringIO())
    report.print_summary(console, "a shape", rows)
    text = console.file.getvalue()
    assert text.count(" 16384 ") == (1 if width == report.WIDTH else 3) and "…" not in text
    assert all(f"{stage}: roof" in text for stage in report.STAGES)
    console.print(report.summary_table("all of them", rows))  # what is too wide is seen
    assert ("…" in console.file.getvalue()) == (width < report.WIDTH)


@pytest.mark.parametrize("what", ["shapes", "tokens", "skews", "stages", "flushes"])
def test_a_plan_of_nothing_is_refused(what):
    with pytest.raises(ValueError, match=f"nothing to measure: no {what}"):
        Plan(**{what: ()})
