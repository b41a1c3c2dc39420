"""The check engine: the cpu backend passes all of it, and every planted fault turns it red."""

import json
from dataclasses import replace

import pytest
import torch

from mixmoe import accuracy, verify
from mixmoe.backends.cpu import cpu
from mixmoe.errors import MixMoEError
from mixmoe.formats import FORMATS, Quantised, Rounding, ScaleKind, format_named
from mixmoe.spec import CELLS, PAIRS

ACTIVATIONS = list(PAIRS)
CASES = {case.name: case for case in verify.CASES}
E8M0 = ["mxfp4", "mxfp8"]


# The boundary rule.


def spread(rows=24, k=160, seed=0):
    """Rows of every magnitude, with ties, zeros and one large value."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=g, dtype=torch.float64)
    x *= 2.0 ** torch.randint(-12, 12, (rows, 1), generator=g)
    x[0] = 0
    x[1] = torch.arange(k) / 4 - 20
    x[2, 5] = 900 * x[2].abs().max()
    return x.float().double()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("rounding", list(Rounding))
def test_twin_has_no_error(name, rounding):
    fmt, exact = format_named(name), spread()
    errors = accuracy.code_errors(fmt.quantise(exact, rounding), exact, rounding)
    assert errors.worst < 2**-22 and errors.flips == 0
    assert accuracy.code_mismatches(fmt.quantise(exact, rounding), exact, rounding) == 0


def step_codes(q, up):
    """Every code moved to its neighbour, values as they then are (saturated at the ends)."""
    values = accuracy.values_of(q.format.element)
    stored = q.format.element.decode(q.codes, torch.float64)
    at = torch.searchsorted(values, stored.contiguous()) + (1 if up else -1)
    moved = values[at.clamp(0, len(values) - 1)]
    return replace(q, codes=q.format.element.encode(moved.float()))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("up", [False, True])
def test_error_is_the_distance_to_the_boundary(name, up):
    """Move the exact values by the error found: now, and not before, the code is the right one."""
    fmt, exact = format_named(name), spread()[3:]
    q = fmt.quantise(exact)
    moved = step_codes(q, up)
    errors = accuracy.code_errors(moved, exact)
    size = torch.maximum(exact.abs(), exact.square().mean(1, keepdim=True).sqrt())
    factor = 1.0 if q.scales is None else fmt._spread(q.scales, exact.shape, torch.float64)
    changed = fmt.element.decode(moved.codes, torch.float64) != fmt.element.decode(
        q.codes, torch.float64
    )
    assert changed.float().mean() > 0.5 and (errors.codes[~changed] < 2**-22).all()
    sign = 1 if up else -1
    for stretch, right in ((1 + 1e-3, True), (1 - 1e-3, False)):
        nudged = exact + sign * stretch * errors.codes * size
        codes = fmt.element.encode((nudged / factor).float())
        same = fmt.element.decode(codes, torch.float64) == fmt.element.decode(
            moved.codes, torch.float64
        )
        clear = changed & (errors.codes > 1e-4)  # nearer, float32 decides which side it is
        assert same[clear].all() if right else not same[clear].any()


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if format_named(n).scale.value != "none"])
def test_shifted_scale_is_an_error(name):
    fmt, exact = format_named(name), spread()[3:]
    q = fmt.quantise(exact)
    scales = q.scales.clone()
    if fmt.scale is ScaleKind.E8M0:
        scales[4, 1] += 1
    else:
        scales[4, 0] *= 1.01
    shifted = replace(q, scales=scales)
    recoded = exact / fmt._spread(scales, exact.shape, torch.float64)
    shifted = replace(shifted, codes=fmt.element.encode(recoded.float()))
    errors = accuracy.code_errors(shifted, exact)
    assert errors.worst > fmt.tolerance and errors.mismatches(fmt.tolerance) >= 1
    assert int((errors.scales > 2**-20).sum()) == 1
    scales[4, 0] = 0xFF if fmt.scale is ScaleKind.E8M0 else torch.nan
    assert accuracy.code_errors(replace(shifted, scales=scales), exact).worst == torch.inf


@pytest.mark.parametrize("name", E8M0)
@pytest.mark.parametrize("rounding", list(Rounding))
def test_another_rounding_is_an_error(name, rounding):
    exact = spread(rows=64)[3:]
    for other in Rounding:
        errors = accuracy.code_errors(format_named(name).quantise(exact, other), exact, rounding)
        assert (errors.worst < 2**-22) == (other is rounding)


def test_values_and_boundaries_cover_every_element():
    for fmt in FORMATS.values():
        values, edges = accuracy.values_of(fmt.element), accuracy.boundaries(fmt.element)
        assert (values[1:] > values[:-1]).all() and len(edges) == len(values) + 1
        assert values.max() >= fmt.element.max and (values == 0).sum() == 1


def test_nan_codes_and_rows():
    exact = spread()
    q = format_named("fp8_token").quantise(exact)
    codes = q.codes.clone()
    codes.view(torch.uint8)[5, 7] = 0x7F
    assert accuracy.code_errors(replace(q, codes=codes), exact).worst == torch.inf
    ref = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    y = torch.tensor([[3.0, 4.5], [0.0, 0.0], [0.0, 1e-9], [torch.nan, 0.0]])
    assert accuracy.row_errors(y, ref).tolist() == [0.1, 0.0, torch.inf, torch.inf]
    with pytest.raises(MixMoEError, match="one shape"):
        accuracy.row_errors(y, ref[:2])
    assert accuracy.differing(q, q) == 0 and accuracy.differing(q, replace(q, codes=codes)) == 1


# The matrix.


@pytest.fixture(scope="module")
def everything():
    return list(verify.verify(cpu()))


def test_cpu_passes_every_cell_in_every_case(everything):
    assert [row for row in everything if not row.ok] == []
    report = verify.report(everything, "cpu", "cpu")
    assert report["failed"] == report["refused"] == 0
    assert set(CELLS) <= set(report["cells"]) and len(report["cells"]) == 25
    for stages in report["cells"].values():
        assert set(stages) == set(verify.STAGES)
        assert all(cell["worst"] <= cell["tolerance"] for cell in stages.values())
    for recipe in CELLS:
        seen = {row.case for row in everything if row.recipe == recipe}
        missing = {name for name in CASES if name not in seen}
        assert all("rounding" in name or "x" in name for name in missing), missing
    json.dumps(report, allow_nan=False)


def test_families_of_every_pair_are_covered():
    judged = {(r.activation.name, r.weight.family) for r in verify.recipes().values()}
    assert judged == {(a, w) for a in PAIRS for w in PAIRS[a]}


def test_unknown_recipe_is_refused():
    with pytest.raises(MixMoEError, match="unknown recipe: got a9w9"):
        verify.recipes(["a9w9"])


# Faults. Each wraps the cpu backend, breaks one thing, and names the stage that must see it.


class Faulty:
    """The cpu backend with one method replaced by ``fault(original, *args)``."""

    def __init__(self, method, fault):
        self.original, self.method, self.fault = cpu(), method, fault
        self.name = "faulty"

    def __getattr__(self, name):
        found = getattr(self.original, name)
        if name != self.method:
            return found
        return lambda *args: self.fault(found, *args)


def swap_experts(stage):
    def fault(run, q, weights, *rest):
        stored = getattr(weights, stage)
        order = [1, 0, *range(2, weights.E)]
        scales = None if stored.scales is None else stored.scales[order]
        swapped = Quantised(stored.codes[order], scales, stored.format)
        return run(q, replace(weights, **{stage: swapped}), *rest)

    return fault


def shift_scale(stage):
    def fault(run, q, weights, *rest):
        stored = getattr(weights, stage)
        if stored.scales is None:
            codes = stored.codes.clone()
            codes[0, 3] *= 2
            return run(q, replace(weights, **{stage: replace(stored, codes=codes)}), *rest)
        scales = stored.scales.clone()
        first = scales[0, 0, 0].clone()
        scales[0, 0, 0] = first + 1 if scales.dtype == torch.uint8 else first * 2
        return run(q, replace(weights, **{stage: replace(stored, scales=scales)}), *rest)

    return fault


def swap_gate_up(run, q, weights, *rest):
    half, stored = weights.I, weights.w13
    values = stored.dequantise()
    values = torch.cat([values[:, half:], values[:, :half]], dim=1)
    return run(q, replace(weights, w13=stored.format.quantise(values)), *rest)


def drop_k_tail(run, q, *rest):
    codes = q.codes.clone()
    codes.view(torch.uint8)[:, -8:] = 0
    return run(replace(q, codes=codes), *rest)


def zero_code_row(run, *args):
    h = run(*args)
    h.codes.view(torch.uint8)[7] = 0
    return h


def zero_row(run, *args):
    rows = run(*args)
    rows[7] = 0
    return rows


def shift_h_scale(run, *args):
    h = run(*args)
    if h.scales is None:
        h.codes[4] *= 2
    elif h.scales.dtype == torch.uint8:
        h.scales[4, 0] += 1
    else:
        h.scales[4, 0] *= 2
    return h


def step_one_code(run, *args):
    q = run(*args)
    flat = q.codes.view(torch.uint8)
    flat[5, 3] ^= 1
    return q


def misroute(run, ids, *rest):
    routed = run(ids, *rest)
    first = routed.sorted_token_ids[:2].clone()
    routed.sorted_token_ids[0], routed.sorted_token_ids[1] = first[1], first[0]
    return routed


def lose_bias(run, q, weights, *rest):
    return run(q, replace(weights, w13_bias=None, w2_bias=None), *rest)


def lose_routing_weight(run, rows, routed, *rest):
    return run(rows, replace(routed, sorted_weights=torch.ones_like(routed.sorted_weights)), *rest)


def leave_row_unwritten(run, rows, routed, recipe, out, deterministic):
    y = run(rows, routed, recipe, out, deterministic)
    y[1] = torch.nan
    return y


def change(**fields):
    def fault(run, q, weights, routed, recipe):
        return run(q, weights, routed, replace(recipe, **fields))

    return fault


FAULTS = {
    "zeroed row of h": ("gemm1", zero_code_row, "gemm1"),
    "zeroed row of stage 2": ("gemm2", zero_row, "gemm2"),
    "zeroed row of y": ("combine", zero_row, "combine"),
    "swapped experts in w13": ("gemm1", swap_experts("w13"), "gemm1"),
    "swapped experts in w2": ("gemm2", swap_experts("w2"), "gemm2"),
    "dropped K tail of stage 1": ("gemm1", drop_k_tail, "gemm1"),
    "dropped K tail of stage 2": ("gemm2", drop_k_tail, "gemm2"),
    "swapped gate and up": ("gemm1", swap_gate_up, "gemm1"),
    "shifted scale of w13": ("gemm1", shift_scale("w13"), "gemm1"),
    "shifted scale of w2": ("gemm2", shift_scale("w2"), "gemm2"),
    "shifted scale of h": ("gemm1", shift_h_scale, "gemm1"),
    "one code of x": ("quantise", step_one_code, "quantise"),
    "one code of h": ("gemm1", step_one_code, "gemm1"),
    "two routes swapped": ("route", misroute, "route"),
    "routing weight ignored": ("combine", lose_routing_weight, "combine"),
    "a row of out unwritten": ("combine", leave_row_unwritten, "combine"),
}


def failed_stages(backend, recipe, case):
    rows = verify.judge(backend, recipe, verify.recipes()[recipe], CASES[case])
    return [row.stage for row in rows if row.failed]


@pytest.mark.parametrize("recipe", ["a8w4", "a8w8_block", "a4w4", "w4a8_smooth", "a16w16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_turn_it_red(fault, recipe):
    method, broken, stage = FAULTS[fault]
    assert failed_stages(Faulty(method, broken), recipe, "skewed")[:1] == [stage]


@pytest.mark.parametrize(
    "case, method, broken",
    [
        ("bias", "gemm1", lose_bias),
        ("bias", "gemm2", lose_bias),
        ("weight on 1", "gemm1", change(weight_on=2)),
        ("weight on 1", "combine", lambda run, rows, routed, recipe, *rest: run(
            rows, routed, replace(recipe, weight_on=2), *rest
        )),
        ("silu limit 1", "gemm1", change(act=CASES["plain"].act)),
        ("swiglu alpha 1 limit 2", "gemm1", change(act=CASES["swiglu"].act)),
        ("situv2 beta 2, 9", "gemm1", change(act=CASES["situv2"].act)),
        ("rounding FLOOR", "gemm1", change(rounding=Rounding.CEIL)),
        ("rounding EVEN", "quantise", lambda run, x, weights, routed, recipe: run(
            x, weights, routed, replace(recipe, rounding=Rounding.FLOOR)
        )),
    ],
)  # fmt: skip
def test_every_edge_can_fail(case, method, broken):
    assert failed_stages(Faulty(method, broken), "a8w4_mx", case)[:1] == [method]
    assert failed_stages(cpu(), "a8w4_mx", case) == []


def test_masked_row_left_nonzero_is_red():
    def dirty(run, *args):
        rows = run(*args)
        rows[2 * 3] = 1.0
        return rows

    assert failed_stages(Faulty("gemm2", dirty), "a8w4", "masked ids")[:1] == ["gemm2"]


def test_runs_that_differ_are_red():
    calls = []

    def drift(run, *args):
        calls.append(1)
        return run(*args) * (1 + 2.0**-7 * (len(calls) == 3))

    assert failed_stages(Faulty("combine", drift), "a8w4", "plain") == ["layer"]


def test_crash_and_refusal_are_told_apart():
    def crash(run, *args):
        raise RuntimeError("lost device")

    def refuse(run, *args):
        raise MixMoEError("no such format here", "mxfp4")

    args = ("a8w4", verify.recipes()["a8w4"], CASES["plain"])
    last = list(verify.judge(Faulty("gemm1", crash), *args))[-1]
    assert last.failed and "lost device" in last.note and last.stage == "gemm1"
    (row,) = verify.judge(Faulty("check", refuse), *args)
    assert row.refused and not row.ok and not row.failed
