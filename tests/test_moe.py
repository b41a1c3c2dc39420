"""The layer on the CPU: every recipe against a plain loop, the door's refusals, torch.compile."""

import ast
import io
import pathlib
import re
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest
import torch
from cpu_layers import TOPK, E, H, I, make

import mixmoe
from mixmoe import MixMoEError, MoE, Recipe, Weights, activations
from mixmoe.backends import load
from mixmoe.moe import call_key, flatten
from mixmoe.spec import CELLS, PAIRS

CPU = load("cpu")
ACTS = [mixmoe.silu(), mixmoe.silu(limit=1.0), mixmoe.swiglu(), mixmoe.gelu(), mixmoe.situv2()]


def plain_layer(x, weights, ids, topk_weights, recipe):
    """The layer as the formula reads, one route at a time, in float64."""
    w13, w2 = weights.dense(torch.float64)
    y = torch.zeros(len(x), H, dtype=torch.float64)
    for t in range(len(x)):
        for s in range(ids.shape[1]):
            e = int(ids[t, s])
            if e < 0:
                continue
            row = x[t : t + 1]
            if weights.w13_smooth is not None:
                row = row * weights.w13_smooth[e]
            a = recipe.activation.quantise(row, recipe.rounding).dequantise(torch.float64)
            both = a @ w13[e].T
            if weights.w13_bias is not None:
                both = both + weights.w13_bias[e]
            h = recipe.act(both[:, :I], both[:, I:])
            if recipe.weight_on == 1:
                h = h * topk_weights[t, s]
            if weights.w2_smooth is not None:
                h = h * weights.w2_smooth[e]
            h = recipe.activation.quantise(h, recipe.rounding).dequantise(torch.float64)
            out = h @ w2[e].T
            if weights.w2_bias is not None:
                out = out + weights.w2_bias[e]
            y[t] += (out * (topk_weights[t, s] if recipe.weight_on == 2 else 1))[0]
    return y


def worst(y, ref):
    return ((y.double() - ref).norm(dim=1) / ref.norm(dim=1)).max().item()


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("weight_on", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_the_formula(name, weight_on, bias):
    x, weights, ids, w, recipe = make(name, bias=bias, weight_on=weight_on)
    ref = plain_layer(x, weights, ids, w, recipe)
    exact = mixmoe.moe(x, weights, ids, w, recipe=recipe, backend="reference")
    assert worst(exact, ref) < 1e-6
    # float32 sums may land a value on the other side of a rounding boundary of h, nothing else.
    assert worst(mixmoe.moe(x, weights, ids, w, recipe=recipe), ref) < 2**-8


@pytest.mark.parametrize("act", ACTS, ids=lambda a: f"{a.kind.value}{a.limit or ''}")
@pytest.mark.parametrize("name", ["a16w16", "a8w4"])
def test_activations(act, name):
    x, weights, ids, w, recipe = make(name, act=act, bias=True)
    ref = plain_layer(x, weights, ids, w, recipe)
    assert worst(mixmoe.moe(x, weights, ids, w, recipe=recipe, backend="reference"), ref) < 1e-6


def test_activation_formulas():
    g, u = torch.tensor([0.5, -2.0, 9.0]), torch.tensor([3.0, -8.0, 0.25])
    sig = torch.sigmoid
    torch.testing.assert_close(mixmoe.silu()(g, u), g * sig(g) * u)
    clamped_g, clamped_u = g.clamp(max=2.0), u.clamp(-2.0, 2.0)
    torch.testing.assert_close(mixmoe.silu(2.0)(g, u), clamped_g * sig(clamped_g) * clamped_u)
    g7, u7 = g.clamp(max=7.0), u.clamp(-7, 7)
    torch.testing.assert_close(mixmoe.swiglu()(g, u), g7 * sig(1.702 * g7) * (u7 + 1))
    inner = (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)
    torch.testing.assert_close(mixmoe.gelu()(g, u), 0.5 * g * (1 + torch.tanh(inner)) * u)
    situ = 4 * torch.tanh(g / 4) * sig(g) * 25 * torch.tanh(u / 25)
    torch.testing.assert_close(mixmoe.situv2()(g, u), situ)
    for act in ACTS:
        assert activations.parse_activation(act.key) == act


@pytest.mark.parametrize("name", ["a8w4", "w8a8_smooth", "a16w4"])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_masked_duplicate_and_few(name, tokens):
    x, weights, ids, w, recipe = make(name, tokens=tokens, bias=True)
    if tokens:
        ids[0] = torch.tensor([-1, 2, 2])
    y = mixmoe.moe(x, weights, ids, w, recipe=recipe, backend="reference")
    assert y.shape == (tokens, H)
    assert not tokens or worst(y, plain_layer(x, weights, ids, w, recipe)) < 1e-6
    nobody = mixmoe.moe(x, weights, torch.full_like(ids, -1), w * float("inf"), recipe=recipe)
    assert (nobody == 0).all()


def test_expert_map_is_a_partition():
    x, weights, ids, w, recipe = make("a16w16")
    whole = mixmoe.moe(x, weights, ids, w, recipe=recipe, backend="reference")
    w13, w2 = weights.dense()
    total = torch.zeros_like(whole)
    for mine in ([0, 3], [1, 2, 4]):
        local = torch.full((E,), -1, dtype=torch.int32)
        local[mine] = torch.arange(len(mine), dtype=torch.int32)
        part = Weights.from_dense(w13[mine], w2[mine], "bf16")
        total += mixmoe.moe(x, part, ids, w, recipe=recipe, expert_map=local, backend="reference")
    torch.testing.assert_close(total, whole)


def test_stages_out_and_batch_companions():
    x, weights, ids, w, recipe = make("a8w4")
    y = mixmoe.moe(x, weights, ids, w, recipe=recipe)
    routed = mixmoe.route(ids, w, weights)
    h = mixmoe.gemm1(x, weights, routed, recipe=recipe)
    again = mixmoe.gemm1(mixmoe.quantise(x, "fp8_token"), weights, routed, recipe=recipe)
    assert torch.equal(h.codes.view(torch.uint8), again.codes.view(torch.uint8))
    rows = mixmoe.gemm2(h, weights, routed, recipe=recipe)
    assert rows.shape == (11 * TOPK, H)
    assert torch.equal(mixmoe.combine(rows, routed, recipe=recipe), y)
    out = torch.full_like(y, float("nan"))
    assert mixmoe.moe(x, weights, ids, w, recipe=recipe, out=out) is out
    assert torch.equal(out, y)


def test_from_dense_interleaved_and_smooth():
    torch.manual_seed(6)
    w13, w2, bias = torch.randn(E, 2 * I, H), torch.randn(E, H, I), torch.randn(E, 2 * I)
    mixed = torch.stack([w13[:, :I], w13[:, I:]], 2).reshape(E, 2 * I, H)
    mixed_bias = torch.stack([bias[:, :I], bias[:, I:]], 2).reshape(E, 2 * I)
    for fmt in ("mxfp4", "fp8_block", "bf16"):
        a = Weights.from_dense(w13, w2, fmt, w13_bias=bias)
        b = Weights.from_dense(mixed, w2, fmt, w13_bias=mixed_bias, gate_up="interleaved")
        assert torch.equal(a.w13.codes.view(torch.uint8), b.w13.codes.view(torch.uint8))
        assert torch.equal(a.w13_bias, b.w13_bias)
    s13, s2 = torch.rand(E, H) + 0.5, torch.rand(E, I) + 0.5
    smooth = Weights.from_dense(w13, w2, "bf16", w13_smooth=s13, w2_smooth=s2)
    want = (w13 / s13[:, None]).to(torch.bfloat16)
    assert torch.equal(smooth.w13.codes, want)


@pytest.mark.parametrize("name", CELLS)
def test_stages_one_by_one(name):
    """The public stages are the layer, from floats and from quantised rows, in every cell."""
    x, weights, ids, w, recipe = make(name, bias=True)
    y = mixmoe.moe(x, weights, ids, w, recipe=recipe)
    weights, routed = mixmoe.prepare(weights, recipe), mixmoe.route(ids, w, weights)
    given = CPU.quantise(x, weights, routed, recipe)
    for rows in (x, given):
        h = mixmoe.gemm1(rows, weights, routed, recipe=recipe)
        out = mixmoe.gemm2(h, weights, routed, recipe=recipe)
        wide = torch.cat([out, out], dim=1)[:, :H]
        assert torch.equal(mixmoe.combine(wide, routed, recipe=recipe), y)


def test_packed_for_another_order_is_refused():
    x, weights, ids, w, recipe = make("a8w4")
    order = next(iter(mixmoe.preshuffle.ORDERS.values()))
    packed = [o for o in mixmoe.preshuffle.ORDERS.values() if o.name.startswith("hopper_fp4")][0]
    assert order.name == "rows"
    wrong = weights.packed(packed, packed)
    with pytest.raises(MixMoEError, match="reads w13 in order 'rows': got hopper_fp4"):
        mixmoe.moe(x, wrong, ids, w, recipe=recipe)
    back = mixmoe.prepare(wrong, recipe)
    assert torch.equal(back.w13.codes, weights.w13.codes)
    again = mixmoe.moe(x, back, ids, w, recipe=recipe)
    assert torch.equal(again, mixmoe.moe(x, weights, ids, w, recipe=recipe))


@pytest.mark.parametrize("name", CELLS)
def test_recipe_keys_round_trip(name):
    recipe = Recipe.named(name, act=mixmoe.swiglu(5.0), weight_on=1, rounding="EVEN")
    assert Recipe.named(recipe.key) == recipe and recipe.name == name


def test_every_pair_has_a_cell_or_is_a_variant():
    families = {(a, mixmoe.FORMATS[w].family) for a, w in CELLS.values()}
    missing = {(a, w) for a in PAIRS for w in PAIRS[a]} - families
    assert all(a in ("fp16", "fp8_token_fnuz") for a, _ in missing), missing


def test_the_first_call_does_not_import_the_compiler():
    """torch._dynamo takes two to four seconds, which a server's first token would wait for."""
    call = """
import sys, torch, mixmoe
w = mixmoe.Weights.from_dense(torch.randn(2, 64, 32), torch.randn(2, 32, 32), "mxfp4")
ids, share = torch.tensor([[0, 1]]), torch.ones(1, 2)
mixmoe.moe(torch.randn(1, 32), w, ids, share, recipe="a8w4")
print("torch._dynamo" in sys.modules)
"""
    for lead, imported in (("", "False"), ("import torch._dynamo", "True")):
        ran = subprocess.run(
            [sys.executable, "-c", lead + call], capture_output=True, text=True, check=True
        )
        assert ran.stdout.strip() == imported


def test_no_gradients():
    x, weights, ids, topk_weights, recipe = make("a16w4")
    y = mixmoe.moe(x.requires_grad_(), weights, ids, topk_weights, recipe=recipe)
    with pytest.raises(MixMoEError, match="no gradients"):
        y.sum().backward()
    out = torch.empty_like(x).detach()
    mixmoe.moe(x, weights, ids, topk_weights, recipe=recipe, out=out)
    assert torch.equal(out, y) and not out.requires_grad


def test_a_missing_extra_is_no_attribute(monkeypatch):
    assert hasattr(mixmoe, "gating") and "hf" not in dir(mixmoe)
    monkeypatch.setitem(sys.modules, "mixmoe.hf", None)
    monkeypatch.delattr(mixmoe, "hf", raising=False)
    assert not hasattr(mixmoe, "hf")


def test_unknown_backends_are_refused_by_name():
    x, weights, ids, topk_weights, recipe = make("a16w4")
    for name in ("a|b", 5):
        with pytest.raises(MixMoEError, match="unknown backend"):
            mixmoe.moe(x, weights, ids, topk_weights, recipe=recipe, backend=name)


def test_a_recipe_of_any_number_has_a_key():
    recipe = Recipe.named("a8w4", weight_on=True)
    assert recipe.weight_on == 1 and Recipe.named(recipe.key) == recipe


@pytest.mark.parametrize("name", ["a8w4", "a8w8_block", "w8a8_smooth"])
def test_opcheck(name):
    x, weights, ids, w, recipe = make(name, bias=True)
    key = call_key(weights, recipe, None, True)
    args = (x, flatten(weights), ids, w, None, key)
    torch.library.opcheck(torch.ops.mixmoe.moe.default, args)
    out = torch.empty(len(x), H)
    torch.library.opcheck(torch.ops.mixmoe.moe_out.default, (*args, out))


def test_compile_and_export():
    x, weights, ids, w, recipe = make("a8w8", bias=True)
    layer = MoE(weights, recipe)
    want = mixmoe.moe(x, weights, ids, w, recipe=recipe)
    assert torch.equal(layer(x, ids, w), want)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, ids, w), want)
    door = torch.compile(
        lambda a: mixmoe.moe(a, weights, ids, w, recipe=recipe), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(door(x), want)
    exported = torch.export.export(layer, (x, ids, w))
    assert torch.equal(exported.module()(x, ids, w), want)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = ({0: tokens}, {0: tokens}, {0: tokens}, None)
    dynamic = torch.export.export(layer, (x, ids, w, None), dynamic_shapes=shapes).module()
    assert torch.equal(dynamic(x[:5], ids[:5], w[:5], None), layer(x[:5], ids[:5], w[:5]))


def compiled(f, **options):
    return torch.compile(f, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("packed", [False, True])
def test_compile_with_a_name_with_dynamic_shapes_and_with_other_scalars(packed, monkeypatch):
    x, weights, ids, w, _ = make("a8w4")
    want = mixmoe.moe(x, weights, ids, w, recipe="a8w4")
    if packed:  # shapes of a Packed are plain ints, which dynamic=True makes symbols of
        monkeypatch.setattr(type(CPU), "check", lambda *ignored: None)
        order = mixmoe.preshuffle.order_named("cdna_n16")
        weights = weights.packed(order, order)
    recipe = Recipe.named("a8w4")
    named = compiled(lambda a, b, c: mixmoe.moe(a, weights, b, c, recipe="a8w4"))
    record = compiled(lambda a, b, c: mixmoe.moe(a, weights, b, c, recipe=recipe), dynamic=True)
    for door in (named, record):
        assert torch.equal(door(x, ids, w), want)
        assert torch.equal(door(x[:5], ids[:5], w[:5]), want[:5])
    clamped = compiled(lambda a, r: mixmoe.moe(a, weights, ids, w, recipe=r))
    for limit in (1.0, 2.0, 0.5):
        r = Recipe.named("a8w4", act=mixmoe.silu(limit))
        assert torch.equal(clamped(x, r), mixmoe.moe(x, weights, ids, w, recipe=r))


def test_module_state_and_shape():
    x, weights, ids, w, recipe = make("a8w4", bias=True)
    layer = MoE(weights, recipe)
    other = MoE(make("a8w4", bias=True, seed=9)[1], recipe)
    assert not torch.equal(other(x, ids, w), layer(x, ids, w))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, ids, w), layer(x, ids, w))
    assert torch.equal(layer(x.view(1, 11, H), ids, w)[0], layer(x, ids, w))
    assert "a8w4" in repr(layer)


def test_casting_a_module_leaves_its_numbers():
    x, weights, ids, w, recipe = make("a16w16", bias=True)
    weights = replace(weights, w2_bias=weights.w2_bias + 2.0**-20)  # more bits than bf16 holds
    want = mixmoe.moe(x, weights, ids, w, recipe=recipe)
    layer = torch.nn.Sequential(MoE(weights, recipe))
    for cast in (layer.half, layer.bfloat16, lambda: layer.to(torch.float64)):
        cast()
        assert torch.equal(layer[0](x, ids, w), want)
    dtypes = {n: b.dtype for n, b in layer.named_buffers()}
    layer.to("meta", torch.float16)
    assert {n: b.dtype for n, b in layer.named_buffers()} == dtypes
    assert all(b.is_meta for b in layer.buffers())


def test_records_and_modules_are_saved():
    x, weights, ids, w, recipe = make("a8w8", bias=True, act=mixmoe.swiglu(5.0))
    order = mixmoe.preshuffle.order_named("cdna_uz_n16")
    layer, packed, held = MoE(weights, recipe), weights.packed(order, order), io.BytesIO()
    torch.save((layer, packed), held)
    held.seek(0)
    again, loaded = torch.load(held, weights_only=False)
    assert torch.equal(again(x, ids, w), layer(x, ids, w)) and again.recipe == recipe
    assert loaded.key == packed.key and loaded.w13.order is order


def test_weights_are_printed_in_one_line():
    text = repr(make("a8w4", bias=True)[1])
    assert text == (
        "Weights(mxfp4, E=5, H=96, I=64, orders rows and rows, w13_bias, w2_bias, "
        f"{5 * 96 * 192 * 17 // 32 + 4 * 5 * (128 + 96)} bytes on cpu)"
    )


PACKAGE = pathlib.Path(mixmoe.__file__).parent
RANK = {
    "errors": 0, "formats": 1, "layout": 1, "activations": 1, "timing": 1, "fold": 2,
    "arrangement": 2, "gating": 2, "preshuffle": 3, "spec": 4, "shapes": 4,
    "accuracy": 5, "checks": 5, "backends": 5, "checkpoint": 5, "moe": 6, "module": 7,
    "__init__": 7, "parallel": 8, "tune": 8, "hf": 8, "verify": 8, "bench_cli": 9, "cli": 9,
}


def test_import_arrow():
    """A module imports only what stands before it; nothing imports the simulator."""
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        mine = parts[0].removesuffix(".py")
        assert mine in RANK, f"{path} has no place in the import arrow"
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            for name in names:
                assert not name.startswith("cdnasim") or mine == "cli", path
                top = name.split(".")[1] if name.startswith("mixmoe.") else None
                if top in RANK and top != mine:
                    assert RANK[top] <= RANK[mine], f"{path} imports {name}"


def test_the_version_is_stated_once():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mixmoe.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", mixmoe.__version__)


def test_import_needs_torch_alone():
    code = (
        "import sys\n"
        "for name in ('triton', 'flydsl', 'transformers', 'safetensors', 'rich', 'typer', 'numpy',"
        " 'ml_dtypes', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import torch, mixmoe\n"
        "w = mixmoe.Weights.from_dense(torch.randn(2, 64, 64), torch.randn(2, 64, 32), 'mxfp4')\n"
        "ids = torch.tensor([[0, 1]])\n"
        "y = mixmoe.moe(torch.randn(1, 64), w, ids, torch.rand(1, 2), recipe='a8w4')\n"
        "assert y.shape == (1, 64)\n"
        "lazy = set(mixmoe.LAZY) - {'hf'}\n"
        "assert lazy & set(vars(mixmoe)) == set() and lazy < set(dir(mixmoe))\n"
        "assert callable(mixmoe.checkpoint.load_layer) and callable(mixmoe.gating.softmax_topk)\n"
        "assert all(getattr(mixmoe, name).__name__ == f'mixmoe.{name}' for name in lazy)\n"
        "assert not hasattr(mixmoe, 'nosuch')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
