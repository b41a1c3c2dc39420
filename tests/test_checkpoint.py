"""Checkpoints of every storage and layout load exactly, whole and by shard."""

import json
from math import gcd

import numpy as np
import pytest
import torch
from checkpoint_models import (
    DEEPSEEK,
    GATE_UP_DOWN,
    GPT_OSS,
    KIMI,
    QWEN,
    SEPARATE,
    V4,
    Coded,
    assert_equal,
    assert_shards,
    deepseek,
    fp8_codes,
    fused_model,
    gpt_oss_model,
    kimi,
    plain,
    quark,
    separate,
    sizes,
)

from mixmoe import checkpoint
from mixmoe.activations import silu, swiglu
from mixmoe.errors import MixMoEError
from mixmoe.formats import format_named


@pytest.mark.parametrize("name", SEPARATE)
@pytest.mark.parametrize("files", [1, 3])
def test_separate_experts_load_exactly(tmp_path, name, files):
    config, coder, block, names, fmt = SEPARATE[name]
    model = separate(tmp_path, config, coder, block, names)
    weights = checkpoint.load_layer(model.save(files), 1)
    assert (weights.w13.format.name, weights.w2.format.name) == (fmt, fmt)
    assert (weights.E, weights.H, weights.I) == (3, 128, 128)
    assert weights.w13_bias is None and weights.w2_bias is None
    assert_equal(weights, model.w13, model.w2)


@pytest.mark.parametrize("name", SEPARATE)
def test_shards_of_separate_experts_add_up(tmp_path, name):
    config, coder, block, names, _ = SEPARATE[name]
    model = separate(tmp_path, config, coder, block, names, i=256, e=2)
    for n in (1, 2, 4):
        shares = [checkpoint.load_layer(tmp_path, 1, shard=(r, n)) for r in range(n)]
        assert [w.I for w in shares] == [256 // n] * n
        assert_shards(tmp_path, shares, model)


@pytest.mark.parametrize("kind", ["blocks", "quark", "dense"])
def test_gpt_oss_loads_exactly(tmp_path, kind):
    model = gpt_oss_model(tmp_path, kind)
    weights = checkpoint.load_layer(tmp_path, 1)
    assert weights.format.name == ("bf16" if kind == "dense" else "mxfp4")
    assert_equal(weights, model.w13, model.w2)
    np.testing.assert_array_equal(weights.w13_bias.double().numpy(), model.bias13)
    np.testing.assert_array_equal(weights.w2_bias.double().numpy(), model.bias2)


@pytest.mark.parametrize("kind", ["blocks", "quark", "dense"])
def test_gpt_oss_shards_add_up_and_count_the_bias_once(tmp_path, kind):
    model = gpt_oss_model(tmp_path, kind)
    shares = [checkpoint.load_layer(tmp_path, 1, shard=(r, 3)) for r in range(3)]
    assert_shards(tmp_path, shares, model)
    gate = torch.cat([w.w13_bias[:, :32] for w in shares], 1)
    up = torch.cat([w.w13_bias[:, 32:] for w in shares], 1)
    np.testing.assert_array_equal(torch.cat([gate, up], 1).double().numpy(), model.bias13)
    np.testing.assert_array_equal(shares[0].w2_bias.double().numpy(), model.bias2)
    assert shares[1].w2_bias is None and shares[2].w2_bias is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("h", "i"), [(64, 96), (64, 32), (64, 64)])
def test_fused_experts_load_exactly(tmp_path, transposed, h, i):
    """(64, 32) has square gate_up, (64, 64) square down: the other tensor tells the orientation."""
    model = fused_model(tmp_path, transposed, h=h, i=i)
    weights = checkpoint.load_layer(tmp_path, 1)
    assert_equal(weights, model.w13, model.w2)
    assert checkpoint.detect(tmp_path).layout == ("fused_transposed" if transposed else "fused")
    if i == 96:
        shares = [checkpoint.load_layer(tmp_path, 1, shard=(r, 3)) for r in range(3)]
        assert_shards(tmp_path, shares, model)


@pytest.mark.parametrize("i", [96, 192, 224, 256])
def test_fused_fp8_blocks_that_straddle_gate_and_up(tmp_path, i):
    model = fused_model(tmp_path, False, h=64, i=i, coder=deepseek)
    weights = checkpoint.load_layer(tmp_path, 1)
    assert_equal(weights, model.w13, model.w2)
    shares = [checkpoint.load_layer(tmp_path, 1, shard=(r, i // 32)) for r in range(i // 32)]
    assert_shards(tmp_path, shares, model)
    if i == 224:  # uneven: blocks must also divide the row where up begins
        shares = [checkpoint.load_layer(tmp_path, 1, shard=(r, 3), uneven=True) for r in range(3)]
        assert [w.I for w in shares] == [64, 64, 96]
        assert_shards(tmp_path, shares, model)


@pytest.mark.parametrize("size", [192, 320, 576, 2112, 2880])
@pytest.mark.parametrize("n", [1, 2])
def test_fp8_shards_that_cut_a_block(tmp_path, size, n):
    """DeepSeek-V3's 128 blocks under shards of odd widths: smaller blocks, the same values."""
    args = (tmp_path, DEEPSEEK, deepseek, "model.layers.1.mlp", GATE_UP_DOWN)
    model = separate(*args, e=1, h=160, i=size * n)
    shares = [checkpoint.load_layer(tmp_path, 1, shard=(r, n)) for r in range(n)]
    edge = gcd(size, 128)
    assert edge < 128
    for w in shares:
        assert (w.I, w.w13.format.rows, w.w13.format.cols) == (size, edge, 128)
        assert (w.w2.format.rows, w.w2.format.cols) == (128, edge)
        assert w.w13.scales.shape == (1, 2 * size // edge, 2)
        assert w.w2.scales.shape == (1, 2, size // edge)
    assert_shards(tmp_path, shares, model)


@pytest.mark.parametrize(("coder", "fmt"), [(quark, "mxfp4"), (kimi, "int4_group32")])
@pytest.mark.parametrize("n", [1, 3])
def test_four_bit_shards_of_odd_widths(tmp_path, coder, fmt, n):
    """I = 192, 320, 576 are legal for groups of 32; three shards of 576 are 192 wide."""
    args = (tmp_path, DEEPSEEK, coder, "model.layers.1.mlp", GATE_UP_DOWN)
    model = separate(*args, e=1, h=64, i=576)
    shares = [checkpoint.load_layer(tmp_path, 1, shard=(r, n)) for r in range(n)]
    assert {w.format.name for w in shares} == {fmt}
    assert_shards(tmp_path, shares, model)


def test_illegal_shard_names_the_nearest_and_uneven_ones_add_up(tmp_path):
    """gpt-oss on 4 cards: 2880 / 4 = 720 is no multiple of 32; whole groups can still be shared."""
    model = gpt_oss_model(tmp_path, h=64, i=160)
    with pytest.raises(MixMoEError, match=r"multiple of 32.*160/4.*n = 1 or n = 5, or uneven=True"):
        checkpoint.load_layer(tmp_path, 1, shard=(0, 4))
    shares = [checkpoint.load_layer(tmp_path, 1, shard=(r, 4), uneven=True) for r in range(4)]
    assert [w.I for w in shares] == [32, 32, 32, 64]
    assert_shards(tmp_path, shares, model)
    for bad in ((4, 4), (-1, 2), (0, 0)):
        with pytest.raises(MixMoEError, match="0 <= r < n"):
            checkpoint.load_layer(tmp_path, 1, shard=bad)
    with pytest.raises(MixMoEError, match="multiple of 32"):
        checkpoint.load_layer(tmp_path, 1, shard=(0, 6), uneven=True)


def test_dense_shards_are_multiples_of_32_too(tmp_path):
    separate(tmp_path, QWEN, plain, "model.layers.1.mlp", GATE_UP_DOWN, e=1, h=64, i=96)
    with pytest.raises(MixMoEError, match=r"I/n must be a multiple of 32 to shard bf16: got 96/2"):
        checkpoint.load_layer(tmp_path, 1, shard=(0, 2))


def test_group_128_shards_only_at_its_own_edges(tmp_path):
    def coder(rng, n, k):
        return kimi(rng, n, k, 128)

    args = (tmp_path, DEEPSEEK, coder, "model.layers.1.mlp", GATE_UP_DOWN)
    model = separate(*args, e=1, h=128, i=512)
    shares = [checkpoint.load_layer(tmp_path, 1, shard=(r, 4)) for r in range(4)]
    assert_shards(tmp_path, shares, model)
    with pytest.raises(MixMoEError, match=r"multiple of 128.*512/8.*n = 4"):
        checkpoint.load_layer(tmp_path, 1, shard=(0, 8))


@pytest.mark.parametrize("wanted", ["mxfp4", "fp8_channel", "int8_channel", "bf16", "fp8_block"])
@pytest.mark.parametrize("name", ["qwen bf16", "deepseek fp8", "kimi int4"])
def test_format_converts_through_dense(tmp_path, name, wanted):
    config, coder, block, names, _ = SEPARATE[name]
    model = separate(tmp_path, config, coder, block, names)
    weights = checkpoint.load_layer(tmp_path, 1, format=wanted)
    assert weights.format.name == wanted
    for got, dense in ((weights.w13, model.w13), (weights.w2, model.w2)):
        want = format_named(wanted).quantise(torch.from_numpy(dense).float())
        assert torch.equal(got.codes.view(torch.uint8), want.codes.view(torch.uint8))
        if want.scales is not None:
            assert torch.equal(got.scales, want.scales)


def test_conversion_of_a_shard_is_that_shard_of_the_values(tmp_path):
    args = (tmp_path, DEEPSEEK, deepseek, "model.layers.1.mlp", GATE_UP_DOWN)
    model = separate(*args, e=2, h=128, i=192)
    share = checkpoint.load_layer(tmp_path, 1, shard=(1, 2), format="mxfp4")
    rows = torch.from_numpy(np.concatenate([model.w13[:, 96:192], model.w13[:, 288:]], 1)).float()
    want = format_named("mxfp4").quantise(rows)
    assert torch.equal(share.w13.codes, want.codes) and torch.equal(share.w13.scales, want.scales)


def test_float32_checkpoints_need_a_format(tmp_path):
    def coder(rng, n, k):
        values = torch.from_numpy(rng.standard_normal((n, k))).float()
        return Coded({".weight": values}, values.double().numpy())

    model = separate(tmp_path, QWEN, coder, "model.layers.1.mlp", GATE_UP_DOWN)
    with pytest.raises(MixMoEError, match="float32 checkpoint.*bf16"):
        checkpoint.load_layer(tmp_path, 1)
    weights = checkpoint.load_layer(tmp_path, 1, format="bf16")
    assert torch.equal(weights.w13.codes, torch.from_numpy(model.w13).to(torch.bfloat16))


def test_format_must_be_one_of_weights(tmp_path):
    model = separate(tmp_path, QWEN, plain, "model.layers.1.mlp", GATE_UP_DOWN)
    with pytest.raises(MixMoEError, match="not a format for weights.*fp8_token"):
        checkpoint.load_layer(model.folder, 1, format="fp8_token")


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("n", [1, 2])
def test_shared_expert_is_appended(tmp_path, copies, n):
    block, i, h = "model.layers.1.mlp", 192, 160
    config = {**DEEPSEEK, "n_shared_experts": copies}
    model = separate(tmp_path, config, deepseek, block, GATE_UP_DOWN, e=2, h=h, i=i)
    rng = np.random.default_rng(7)
    wide = copies * i
    parts = [deepseek(rng, *shape) for shape in ((wide, h), (wide, h), (h, wide))]
    for name, part in zip(GATE_UP_DOWN, parts, strict=True):
        model.tensors |= {f"{block}.shared_experts.{name}{s}": t for s, t in part.tensors.items()}
    for c in range(copies):
        cut = slice(c * i, (c + 1) * i)
        joint = np.concatenate([parts[0].dense[cut], parts[1].dense[cut]])
        model.w13 = np.concatenate([model.w13, joint[None]])
        model.w2 = np.concatenate([model.w2, parts[2].dense[None, :, cut]])
    model.save()
    shares = [
        checkpoint.load_layer(tmp_path, 1, shard=(r, n), shared_expert=True) for r in range(n)
    ]
    assert {w.E for w in shares} == {2 + copies}
    assert_shards(tmp_path, shares, model)


def test_shared_expert_errors(tmp_path):
    block = "model.layers.1.mlp"
    model = separate(tmp_path, DEEPSEEK, kimi, block, GATE_UP_DOWN)
    with pytest.raises(MixMoEError, match=r"shared_experts\.gate_proj\.weight"):
        checkpoint.load_layer(tmp_path, 1, shared_expert=True)
    rng = np.random.default_rng(1)
    for name in GATE_UP_DOWN:  # Kimi-K2 keeps its shared expert in bf16
        model.tensors[f"{block}.shared_experts.{name}.weight"] = plain(rng, 128, 128).tensors[
            ".weight"
        ]
    model.save()
    with pytest.raises(MixMoEError, match="must be stored as int4_group32 like expert 0"):
        checkpoint.load_layer(tmp_path, 1, shared_expert=True)
    assert checkpoint.load_layer(tmp_path, 1, shared_expert=True, format="bf16").E == 4
    weights = checkpoint.load_layer(tmp_path, 1, shared_expert=True, format="int4_group32")
    got = weights.dense(torch.float64)[0][:3].numpy()
    np.testing.assert_array_equal(got, model.w13)  # the routed experts keep their own codes
    (tmp_path / "q").mkdir()
    separate(tmp_path / "q", QWEN, plain, block, GATE_UP_DOWN)
    with pytest.raises(MixMoEError, match="takes a model with a shared expert"):
        checkpoint.load_layer(tmp_path / "q", 1, shared_expert=True)


def test_chosen_experts_come_in_the_order_asked(tmp_path):
    model = gpt_oss_model(tmp_path)
    weights = checkpoint.load_layer(tmp_path, 1, experts=[2, 0])
    assert_equal(weights, model.w13[[2, 0]], model.w2[[2, 0]])
    np.testing.assert_array_equal(weights.w2_bias.double().numpy(), model.bias2[[2, 0]])
    with pytest.raises(MixMoEError, match=r"experts must lie in 0\.\.2: got 3"):
        checkpoint.load_layer(tmp_path, 1, experts=[3])


def test_layers_detect_and_iter(tmp_path):
    first = separate(tmp_path, QWEN, plain, "model.layers.0.mlp", GATE_UP_DOWN, seed=1)
    second = separate(tmp_path, QWEN, plain, "model.layers.10.mlp", GATE_UP_DOWN, seed=2)
    second.tensors |= first.tensors
    second.tensors["model.layers.5.mlp.gate_proj.weight"] = torch.zeros(2, 2)  # a dense layer
    second.save(4)
    found = checkpoint.layers(tmp_path)
    assert [info.layer for info in found] == [0, 10]
    assert checkpoint.detect(tmp_path) == found[0]
    info = found[0]
    assert (info.experts, info.hidden, info.intermediate, info.format) == (3, 128, 128, "bf16")
    assert (info.model_type, info.layout) == ("qwen3_moe", "gate_up_down")
    loaded = dict(checkpoint.iter_layers(tmp_path, format="bf16", progress=True))
    assert_equal(loaded[0], first.w13, first.w2)
    assert_equal(loaded[10], second.w13, second.w2)
    with pytest.raises(MixMoEError, match="must be a MoE layer.*got 5.*one of 0, 10"):
        checkpoint.load_layer(tmp_path, 5)


# The configuration.


def test_moe_config(tmp_path):
    def read(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return checkpoint.moe_config(tmp_path)

    deepseek_v3 = read(sizes({**DEEPSEEK, "n_group": 8, "topk_group": 4}, 16, 64, 32))
    assert (deepseek_v3.experts, deepseek_v3.topk, deepseek_v3.shared) == (16, 2, 32)
    want = checkpoint.Gating(checkpoint.Score.SIGMOID, True, 2.5, 8, 4, "top2", True)
    assert deepseek_v3.gating == want
    oss = read({**sizes(GPT_OSS, 4, 64, 32), "swiglu_limit": 5.0})
    assert oss.activation == swiglu(5.0) and oss.shared == 0
    v4 = read(sizes(V4, 4, 64, 32))
    assert v4.activation == silu(10.0) and v4.gating.score is checkpoint.Score.SQRT_SOFTPLUS
    with pytest.raises(MixMoEError, match="no gating function"):
        v4.gating.choose(torch.zeros(1, 4), 2)
    kimi_k2 = read(sizes(KIMI, 4, 64, 32))
    assert (kimi_k2.model_type, kimi_k2.family) == ("kimi_k25", "deepseek_v3")
    quant = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    fp8 = read({**sizes(QWEN, 4, 64, 32), "quantization_config": quant})
    assert (fp8.quant_method, fp8.block) == ("fp8", (64, 64))


def test_block_size_of_the_config_is_used(tmp_path):
    def coder(rng, n, k):
        codes, values = fp8_codes(rng, n, k)
        scales = rng.random((-(-n // 64), -(-k // 32))).astype(np.float32)
        spread = np.repeat(np.repeat(scales.astype(np.float64), 64, 0), 32, 1)[:n, :k]
        tensors = {".weight": codes, ".weight_scale": torch.from_numpy(scales)}
        return Coded(tensors, values * spread)

    group = {"weights": {"strategy": "block", "block_structure": [64, 32]}}
    config = {**QWEN, "quantization_config": {"config_groups": {"group_0": group}}}
    model = separate(tmp_path, config, coder, "model.layers.1.mlp", GATE_UP_DOWN, h=160, i=96)
    weights = checkpoint.load_layer(tmp_path, 1)
    assert (weights.w13.format.name, weights.w2.format.name) == ("fp8_block32x32", "fp8_block64x32")
    assert_equal(weights, model.w13, model.w2)
