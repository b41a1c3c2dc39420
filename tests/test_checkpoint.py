"""Checkpoints written here by independent encoders (numpy, safetensors' own writer) load exactly.

Every stored matrix is built from random codes and scales whose product is known in float64, so
"equal" below means equal bit for bit in value.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mixmoe import checkpoint
from mixmoe.activations import silu, swiglu
from mixmoe.checkpoint import layer as layer_module
from mixmoe.checkpoint import load as load_module
from mixmoe.checkpoint import matrix as matrix_module
from mixmoe.errors import MixMoEError
from mixmoe.formats import format_named
from mixmoe.spec import Weights

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass
class Coded:
    """A matrix as tensors by suffix, and the float64 values they stand for."""

    tensors: dict[str, torch.Tensor]
    dense: np.ndarray


def pairs(nibbles: np.ndarray) -> torch.Tensor:
    """Two codes a byte, even column in the low four bits."""
    packed = np.zeros((nibbles.shape[0], nibbles.shape[1] // 2), np.uint8)
    for k in range(nibbles.shape[1]):
        packed[:, k // 2] |= (nibbles[:, k] << (4 * (k % 2))).astype(np.uint8)
    return torch.from_numpy(packed)


def mx_codes(rng, n, k):
    codes = rng.integers(0, 16, (n, k))
    exponents = rng.integers(110, 140, (n, k // 32))
    dense = E2M1[codes] * np.repeat(2.0 ** (exponents - 127), 32, axis=1)
    return pairs(codes), torch.from_numpy(exponents.astype(np.uint8)), dense


def gpt_oss(rng, n, k):
    codes, scales, dense = mx_codes(rng, n, k)
    return Coded({"_blocks": codes.view(n, k // 32, 16), "_scales": scales}, dense)


def quark(rng, n, k):
    codes, scales, dense = mx_codes(rng, n, k)
    return Coded({".weight": codes, ".weight_scale": scales}, dense)


def deepseek_v4(rng, n, k):
    codes, scales, dense = mx_codes(rng, n, k)
    scales = scales.view(torch.float8_e8m0fnu)
    return Coded({".weight": codes.view(torch.int8), ".scale": scales}, dense)


def fp8_codes(rng, n, k):
    codes = rng.integers(0, 256, (n, k)).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x08
    sign, exponent, mantissa = codes >> 7, (codes >> 3) & 15, codes & 7
    value = np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    )
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), np.where(sign == 1, -value, value)


def deepseek(rng, n, k):
    codes, values = fp8_codes(rng, n, k)
    scales = rng.random((-(-n // 128), -(-k // 128))).astype(np.float32) + np.float32(0.1)
    spread = np.repeat(np.repeat(scales.astype(np.float64), 128, 0), 128, 1)[:n, :k]
    stored = {".weight": codes, ".weight_scale_inv": torch.from_numpy(scales)}
    return Coded(stored, values * spread)


def fp8_rows(rng, n, k):
    codes, values = fp8_codes(rng, n, k)
    scales = rng.random((n, 1)).astype(np.float32) + np.float32(0.1)
    stored = {".weight": codes, ".weight_scale": torch.from_numpy(scales)}
    return Coded(stored, values * scales.astype(np.float64))


def fp8_tensor(rng, n, k):
    codes, values = fp8_codes(rng, n, k)
    scale = np.float32(rng.random() + 0.1)
    stored = {".weight": codes, ".weight_scale": torch.tensor(scale)}
    return Coded(stored, values * np.float64(scale))


def mx8(rng, n, k):
    codes, values = fp8_codes(rng, n, k)
    exponents = rng.integers(110, 140, (n, k // 32))
    scales = torch.from_numpy(exponents.astype(np.uint8))
    dense = values * np.repeat(2.0 ** (exponents - 127), 32, axis=1)
    return Coded({".weight": codes, ".weight_scale_inv": scales}, dense)


def int8_rows(rng, n, k):
    codes = rng.integers(-127, 128, (n, k)).astype(np.int8)
    scales = torch.from_numpy(rng.random((n, 1))).to(torch.bfloat16)
    stored = {".weight": torch.from_numpy(codes), ".weight_scale": scales}
    return Coded(stored, codes * scales.double().numpy())


def kimi(rng, n, k, group=32, dtype=torch.bfloat16):
    values = rng.integers(-8, 8, (n, k))
    words = np.zeros((n, k // 8), np.uint32)
    for i in range(k):
        words[:, i // 8] |= (values[:, i] + 8).astype(np.uint32) << np.uint32(4 * (i % 8))
    scales = torch.from_numpy(rng.random((n, k // group))).to(dtype)
    stored = {
        ".weight_packed": torch.from_numpy(words.view(np.int32)),
        ".weight_scale": scales,
        ".weight_shape": torch.tensor([n, k], dtype=torch.int64),
    }
    return Coded(stored, values * np.repeat(scales.double().numpy(), group, axis=1))


def kimi_f16_64(rng, n, k):
    return kimi(rng, n, k, 64, torch.float16)


def plain(rng, n, k):
    values = torch.from_numpy(rng.standard_normal((n, k))).to(torch.bfloat16)
    return Coded({".weight": values}, values.double().numpy())


def half(rng, n, k):
    values = torch.from_numpy(rng.standard_normal((n, k))).to(torch.float16)
    return Coded({".weight": values}, values.double().numpy())


QWEN = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
}
MIXTRAL = {"model_type": "mixtral", "num_experts_per_tok": 2, "num_hidden_layers": 2}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
}
GPT_OSS = {"model_type": "gpt_oss", "num_experts_per_tok": 2, "num_hidden_layers": 2}
V4 = {
    "model_type": "deepseek_v4",
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "n_shared_experts": 1,
    "swiglu_limit": 10.0,
    "routed_scaling_factor": 1.5,
}
KIMI = {"model_type": "kimi_k25", "text_config": {**DEEPSEEK, "model_type": "kimi_k2"}}


@dataclass
class Model:
    """A written checkpoint: the tensors before they were saved and what each layer should give."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    w13: np.ndarray
    w2: np.ndarray
    bias13: np.ndarray | None = None
    bias2: np.ndarray | None = None

    def save(self, files: int = 1) -> Path:
        """Write the tensors (again), in one file or in several with an index."""
        for old in self.folder.glob("*safetensors*"):
            old.unlink()
        tensors = {k: v.contiguous() for k, v in self.tensors.items()}
        if files == 1:
            save_file(tensors, self.folder / "model.safetensors")
            return self.folder
        places = {}
        for i in range(files):
            name = f"model-{i + 1:05}-of-{files:05}.safetensors"
            part = {k: tensors[k] for k in sorted(tensors)[i::files]}
            save_file(part, self.folder / name)
            places |= dict.fromkeys(part, name)
        index = {"metadata": {}, "weight_map": places}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return self.folder


def sizes(config: dict, e: int, h: int, i: int) -> dict:
    text = config.get("text_config", config)
    text = {**text, "hidden_size": h, "num_experts": e, "num_local_experts": e}
    text |= {"n_routed_experts": e, "moe_intermediate_size": i}
    if text["model_type"] in ("mixtral", "gpt_oss"):
        text["intermediate_size"] = i
    return {**config, "text_config": text} if "text_config" in config else text


def separate(tmp, config, coder, block, names, e=3, h=128, i=128, seed=0) -> Model:
    """One tensor set per expert and projection."""
    rng = np.random.default_rng(seed)
    tensors, w13, w2 = {}, [], []
    for x in range(e):
        parts = [coder(rng, *shape) for shape in ((i, h), (i, h), (h, i))]
        for name, part in zip(names, parts, strict=True):
            for suffix, tensor in part.tensors.items():
                tensors[f"{block}.experts.{x}.{name}{suffix}"] = tensor
        w13.append(np.concatenate([parts[0].dense, parts[1].dense]))
        w2.append(parts[2].dense)
    (tmp / "config.json").write_text(json.dumps(sizes(config, e, h, i)))
    model = Model(tmp, tensors, np.stack(w13), np.stack(w2))
    model.save()
    return model


GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
W1_W3_W2 = ("w1", "w3", "w2")
SEPARATE = {
    "qwen bf16": (QWEN, plain, "model.layers.1.mlp", GATE_UP_DOWN, "bf16"),
    "qwen fp16": (QWEN, half, "model.layers.1.mlp", GATE_UP_DOWN, "fp16"),
    "mixtral bf16": (MIXTRAL, plain, "model.layers.1.block_sparse_moe", W1_W3_W2, "bf16"),
    "deepseek fp8": (DEEPSEEK, deepseek, "model.layers.1.mlp", GATE_UP_DOWN, "fp8_block"),
    "deepseek quark": (DEEPSEEK, quark, "model.layers.1.mlp", GATE_UP_DOWN, "mxfp4"),
    "deepseek v4": (V4, deepseek_v4, "layers.1.ffn", W1_W3_W2, "mxfp4"),
    "kimi int4": (KIMI, kimi, "language_model.model.layers.1.mlp", GATE_UP_DOWN, "int4_group32"),
    "int4 f16 scales": (
        KIMI,
        kimi_f16_64,
        "language_model.model.layers.1.mlp",
        GATE_UP_DOWN,
        "int4_group64_f32",
    ),
    "fp8 per row": (QWEN, fp8_rows, "model.layers.1.mlp", GATE_UP_DOWN, "fp8_channel"),
    "fp8 per tensor": (QWEN, fp8_tensor, "model.layers.1.mlp", GATE_UP_DOWN, "fp8_channel"),
    "mxfp8": (QWEN, mx8, "model.layers.1.mlp", GATE_UP_DOWN, "mxfp8"),
    "int8 per row": (QWEN, int8_rows, "model.layers.1.mlp", GATE_UP_DOWN, "int8_channel"),
}


def interleave(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    out = np.empty((2 * gate.shape[0], *gate.shape[1:]), gate.dtype)
    out[0::2], out[1::2] = gate, up
    return out


def gpt_oss_model(tmp, kind="blocks", e=3, h=64, i=96, seed=0) -> Model:
    """gpt-oss: gate and up rows alternate, biases, three kinds of storage."""
    rng = np.random.default_rng(seed)
    base = "model.layers.1.mlp.experts"
    coder = {"blocks": gpt_oss, "quark": quark, "dense": plain}[kind]
    joint = [coder(rng, 2 * i, h) for _ in range(e)]
    down = [coder(rng, h, i) for _ in range(e)]
    bias13, bias2 = (
        torch.from_numpy(rng.standard_normal((e, n))).to(torch.bfloat16) for n in (2 * i, h)
    )
    tensors = {}
    for name, parts, bias in (("gate_up_proj", joint, bias13), ("down_proj", down, bias2)):
        if kind == "quark":
            for x, part in enumerate(parts):
                tensors |= {f"{base}.{x}.{name}{s}": t for s, t in part.tensors.items()}
                tensors[f"{base}.{x}.{name}.bias"] = bias[x]
            continue
        tensors[f"{base}.{name}_bias"] = bias
        for suffix in parts[0].tensors:
            stack = torch.stack([p.tensors[suffix] for p in parts])
            if kind == "dense":
                tensors[f"{base}.{name}"] = stack.transpose(1, 2)
            else:
                tensors[f"{base}.{name}{suffix}"] = stack
    (tmp / "config.json").write_text(json.dumps(sizes(GPT_OSS, e, h, i)))
    w13 = np.stack([np.concatenate([p.dense[0::2], p.dense[1::2]]) for p in joint])
    b = bias13.double().numpy()
    model = Model(tmp, tensors, w13, np.stack([p.dense for p in down]))
    model.bias13, model.bias2 = np.concatenate([b[:, 0::2], b[:, 1::2]], 1), bias2.double().numpy()
    model.save()
    return model


def fused_model(tmp, transposed, e=3, h=64, i=96, coder=plain, seed=0) -> Model:
    """Qwen3.5 (E, 2I, H) and Qwen3-VL (E, H, 2I): one tensor of all experts, gate above up."""
    rng = np.random.default_rng(seed)
    joint = [coder(rng, 2 * i, h) for _ in range(e)]
    down = [coder(rng, h, i) for _ in range(e)]
    tensors = {}
    for name, parts in (("gate_up_proj", joint), ("down_proj", down)):
        for suffix in parts[0].tensors:
            stack = torch.stack([p.tensors[suffix] for p in parts])
            key = f"model.language_model.layers.1.mlp.experts.{name}"
            key += suffix.replace(".weight", "")
            tensors[key] = stack.transpose(1, 2) if transposed else stack
    text = {**QWEN, "model_type": "qwen3_vl_moe_text"}
    config = {"model_type": "qwen3_vl_moe", "text_config": text}
    (tmp / "config.json").write_text(json.dumps(sizes(config, e, h, i)))
    dense = [np.stack([p.dense for p in parts]) for parts in (joint, down)]
    model = Model(tmp, tensors, *dense)
    model.save()
    return model


def assert_equal(weights: Weights, w13: np.ndarray, w2: np.ndarray) -> None:
    got13, got2 = weights.dense(torch.float64)
    np.testing.assert_array_equal(got13.numpy(), w13)
    np.testing.assert_array_equal(got2.numpy(), w2)


def assert_shards(folder, shares: list[Weights], model: Model) -> None:
    """Gate parts, up parts and w2 columns of all shards, put together, are the whole layer."""
    dense = [w.dense(torch.float64) for w in shares]
    gates = [d[0][:, : w.I] for d, w in zip(dense, shares, strict=True)]
    ups = [d[0][:, w.I :] for d, w in zip(dense, shares, strict=True)]
    np.testing.assert_array_equal(torch.cat([*gates, *ups], 1).numpy(), model.w13)
    np.testing.assert_array_equal(torch.cat([d[1] for d in dense], 2).numpy(), model.w2)


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


@pytest.mark.parametrize("i", [96, 192, 256])
def test_fused_fp8_blocks_that_straddle_gate_and_up(tmp_path, i):
    model = fused_model(tmp_path, False, h=64, i=i, coder=deepseek)
    weights = checkpoint.load_layer(tmp_path, 1)
    assert_equal(weights, model.w13, model.w2)
    shares = [checkpoint.load_layer(tmp_path, 1, shard=(r, i // 32)) for r in range(i // 32)]
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
    assert shares[0].E == 2 + copies
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


# Wrong files. Each message names the tensor.

BASE = "model.layers.1.mlp.experts"


def broken(tmp_path, change) -> str:
    """The error of a DeepSeek checkpoint whose tensors ``change`` has edited."""
    model = separate(tmp_path, DEEPSEEK, deepseek, "model.layers.1.mlp", GATE_UP_DOWN)
    change(model.tensors)
    model.save(2)
    with pytest.raises(MixMoEError) as error:
        checkpoint.load_layer(tmp_path, 1)
    return str(error.value)


@pytest.mark.parametrize("expert", [0, 1, 2])
@pytest.mark.parametrize("part", GATE_UP_DOWN)
@pytest.mark.parametrize("suffix", [".weight", ".weight_scale_inv"])
def test_missing_tensor(tmp_path, expert, part, suffix):
    name = f"{BASE}.{expert}.{part}{suffix}"
    assert f"must hold the tensor {name}: got none" in broken(tmp_path, lambda t: t.pop(name))


def put(name, make):
    def change(tensors):
        assert name in tensors
        tensors[name] = make(tensors[name])

    return change


def with_value(tensor, value):
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


def nan_code(tensor, byte):
    return with_value(tensor.view(torch.uint8), byte).view(tensor.dtype)


CODES, SCALES = f"{BASE}.2.up_proj.weight", f"{BASE}.2.down_proj.weight_scale_inv"
BROKEN = {
    "codes shape": (CODES, lambda t: t[:-1], r"weight must have shape \(128, 128\): got \(127"),
    "codes transposed": (CODES, lambda t: t.repeat(2, 1), "must have shape"),
    "codes dtype": (CODES, lambda t: t.float(), "F32"),
    "scale shape": (SCALES, lambda t: t.repeat(1, 2), r"must have shape \(1, 1\): got \(1, 2\)"),
    "scale dtype": (SCALES, lambda t: t.long(), "I64"),
    "scale nan": (SCALES, lambda t: with_value(t, torch.nan), "scales must be finite: got nan"),
    "scale inf": (SCALES, lambda t: with_value(t, torch.inf), "scales must be finite: got inf"),
    "code +nan": (CODES, lambda t: nan_code(t, 0x7F), "weights must be finite"),
    "code -nan": (CODES, lambda t: nan_code(t, 0xFF), "weights must be finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_tensor(tmp_path, case):
    name, make, message = BROKEN[case]
    error = broken(tmp_path, put(name, make))
    assert name in error
    assert re.search(message, error)


def test_e8m0_nan_is_refused(tmp_path):
    model = separate(tmp_path, DEEPSEEK, quark, "model.layers.1.mlp", GATE_UP_DOWN)
    name = f"{BASE}.1.gate_proj.weight_scale"
    model.tensors[name] = with_value(model.tensors[name], 0xFF)
    model.save()
    with pytest.raises(MixMoEError, match=rf"{name}: scales must be finite.*0xFF.*\(127, 3\)"):
        checkpoint.load_layer(tmp_path, 1)


def test_e8m0_nan_of_gpt_oss_is_refused(tmp_path):
    model = gpt_oss_model(tmp_path)
    name = f"{BASE}.down_proj_scales"
    model.tensors[name] = with_value(model.tensors[name], 0xFF)
    model.save()
    with pytest.raises(MixMoEError, match=rf"{name}: scales must be finite"):
        checkpoint.load_layer(tmp_path, 1)


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "down_proj_bias"])
def test_gpt_oss_bias_errors(tmp_path, name):
    model = gpt_oss_model(tmp_path)
    whole = model.tensors[f"{BASE}.{name}"]
    for bad, message in (
        (None, "must hold the tensor"),
        (whole[:, 1:], "float of shape"),
        (whole.long(), "float of shape"),
        (with_value(whole, torch.nan), "must be finite"),
    ):
        model.tensors.pop(f"{BASE}.{name}", None)
        if bad is not None:
            model.tensors[f"{BASE}.{name}"] = bad
        model.save()
        with pytest.raises(MixMoEError, match=message) as error:
            checkpoint.load_layer(tmp_path, 1)
        assert f"{BASE}.{name}" in str(error.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_bf16_weight_is_refused(tmp_path, value):
    model = separate(tmp_path, QWEN, plain, "model.layers.1.mlp", GATE_UP_DOWN)
    name = f"{BASE}.2.down_proj.weight"
    model.tensors[name] = with_value(model.tensors[name], value)
    model.save()
    with pytest.raises(MixMoEError, match=f"{name}: weights must be finite"):
        checkpoint.load_layer(tmp_path, 1)


def test_weight_shape_must_agree(tmp_path):
    model = separate(tmp_path, DEEPSEEK, kimi, "model.layers.1.mlp", GATE_UP_DOWN)
    name = f"{BASE}.1.up_proj.weight_shape"
    model.tensors[name] = torch.tensor([128, 256])
    model.save()
    with pytest.raises(MixMoEError, match=rf"{name} must hold \(128, 128\): got \(128, 256\)"):
        checkpoint.load_layer(tmp_path, 1)


@pytest.mark.parametrize(
    ("suffix", "scheme"),
    [
        (".weight_scale_2", "nvfp4"),
        (".weight_zero_point", "asymm"),
        (".weight_g_idx", "actorder"),
        (".qweight", "GPTQ"),
    ],
)
def test_schemes_that_are_not_read_are_refused(tmp_path, suffix, scheme):
    model = separate(tmp_path, DEEPSEEK, kimi, "model.layers.1.mlp", GATE_UP_DOWN)
    model.tensors[f"{BASE}.0.gate_proj{suffix}"] = torch.zeros(4)
    model.save()
    with pytest.raises(MixMoEError, match=rf"{BASE}.0.gate_proj.*not supported.*{scheme}"):
        checkpoint.load_layer(tmp_path, 1)


def test_nvfp4_is_not_taken_for_mxfp4(tmp_path):
    def coder(rng, n, k):
        codes, _, dense = mx_codes(rng, n, k)
        scales = torch.ones(n, k // 16).to(torch.float8_e4m3fn)
        return Coded({".weight": codes, ".weight_scale": scales}, dense)

    separate(tmp_path, DEEPSEEK, coder, "model.layers.1.mlp", GATE_UP_DOWN)
    with pytest.raises(MixMoEError, match=r"gate_proj.weight_scale: no format has U8.*F8_E4M3"):
        checkpoint.load_layer(tmp_path, 1)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_truncated_file_names_the_tensor(tmp_path):
    separate(tmp_path, DEEPSEEK, deepseek, "model.layers.1.mlp", GATE_UP_DOWN)
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    truncate(file, size - 1)
    with pytest.raises(MixMoEError, match=rf"{BASE}.*model.safetensors is truncated.*{size - 1}"):
        checkpoint.load_layer(tmp_path, 1)
    for short in (0, 4, 100):
        truncate(file, short)
        with pytest.raises(MixMoEError, match=r"model.safetensors.*header.*truncated"):
            checkpoint.load_layer(tmp_path, 1)


def test_bad_headers(tmp_path):
    separate(tmp_path, DEEPSEEK, deepseek, "model.layers.1.mlp", GATE_UP_DOWN)
    file = tmp_path / "model.safetensors"

    def write(header: bytes) -> None:
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))

    for header in (b"{not json", b"[1, 2]   ", b'{"a": {"dtype": "F32"}}'):
        write(header)
        with pytest.raises(MixMoEError, match="must have a safetensors header"):
            checkpoint.load_layer(tmp_path, 1)
    name = f"{BASE}.0.gate_proj.weight"
    for dtype, message in (("F32", "takes 65536 bytes: got 64"), ("Q5", "unknown dtype: got Q5")):
        entry = {"dtype": dtype, "shape": [128, 128], "data_offsets": [0, 64]}
        write(json.dumps({name: entry}).encode())
        with pytest.raises(MixMoEError, match=rf"{name}.*{message}"):
            checkpoint.load_layer(tmp_path, 1)


def test_index_errors(tmp_path):
    model = separate(tmp_path, DEEPSEEK, deepseek, "model.layers.1.mlp", GATE_UP_DOWN)
    model.save(2)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = f"{BASE}.1.down_proj.weight"
    places = dict(good["weight_map"])
    for file, message in (
        ("model-00009-of-00002.safetensors", "index names a file that must exist"),
        (next(f for f in places.values() if f != places[name]), "where the index puts it"),
    ):
        index.write_text(json.dumps({"weight_map": {**places, name: file}}))
        with pytest.raises(MixMoEError, match=rf"{name}: .*{message}"):
            checkpoint.load_layer(tmp_path, 1)
    for text, message in (("{", "readable JSON"), ("[]", "JSON object"), ("{}", "weight_map")):
        index.write_text(text)
        with pytest.raises(MixMoEError, match=message):
            checkpoint.load_layer(tmp_path, 1)


def test_folder_and_config_errors(tmp_path):
    with pytest.raises(MixMoEError, match="must hold config.json"):
        checkpoint.detect(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "qwen4_moe"}))
    with pytest.raises(MixMoEError, match="unknown model_type.*qwen4_moe.*qwen"):
        checkpoint.detect(tmp_path)
    config.write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(MixMoEError, match="must have the key"):
        checkpoint.detect(tmp_path)
    config.write_text(json.dumps(sizes(QWEN, 2, 64, 32)))
    with pytest.raises(MixMoEError, match=r"must hold \*.safetensors"):
        checkpoint.detect(tmp_path)
    save_file(
        {"model.layers.0.mlp.gate_proj.weight": torch.zeros(2, 2)}, tmp_path / "m.safetensors"
    )
    with pytest.raises(MixMoEError, match="must hold MoE layers"):
        checkpoint.detect(tmp_path)
    config.write_text(json.dumps({**sizes(QWEN, 2, 64, 32), "hidden_act": "relu"}))
    with pytest.raises(MixMoEError, match="hidden_act.*relu"):
        checkpoint.detect(tmp_path)


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


# transformers writes the checkpoint, its own modules say what it means.


def tiny(kind: str):
    import transformers as tf

    common = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts_per_tok": 2,
    }
    torch.manual_seed(0)
    if kind == "mixtral":
        config = tf.MixtralConfig(**common, intermediate_size=96, num_local_experts=4)
        return tf.MixtralForCausalLM(config)
    if kind == "qwen3_moe":
        more = {"moe_intermediate_size": 96, "num_experts": 4, "norm_topk_prob": True}
        return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**common, **more))
    if kind == "gpt_oss":
        config = tf.GptOssConfig(**common, intermediate_size=96, num_local_experts=4)
        return tf.GptOssForCausalLM(config)
    more = {
        "moe_intermediate_size": 96,
        "intermediate_size": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
    }
    common.pop("head_dim")
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**common, **more))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_what_transformers_saved(tmp_path, kind):
    model = tiny(kind).to(torch.bfloat16)
    block = model.model.layers[1].mlp
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.copy_(torch.randn(tensor.shape))  # biases too: they start at zero
    model.save_pretrained(tmp_path)
    experts = block.experts
    shared = kind == "deepseek_v3"
    weights = checkpoint.load_layer(tmp_path, 1, shared_expert=shared)
    joint, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    if kind == "gpt_oss":
        joint = torch.cat([joint[..., 0::2], joint[..., 1::2]], -1).transpose(1, 2)
        down = down.transpose(1, 2)
        bias = experts.gate_up_proj_bias.detach()
        bias = torch.cat([bias[:, 0::2], bias[:, 1::2]], 1).float()
        assert torch.equal(weights.w13_bias, bias)
        assert torch.equal(weights.w2_bias, experts.down_proj_bias.detach().float())
    assert torch.equal(weights.w13.codes[: len(joint)], joint)
    assert torch.equal(weights.w2.codes[: len(down)], down)
    if shared:
        wide = block.shared_experts
        assert torch.equal(
            weights.w13.codes[-1], torch.cat([wide.gate_proj.weight, wide.up_proj.weight])
        )
        assert torch.equal(weights.w2.codes[-1], wide.down_proj.weight)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_router_and_gating_agree_with_transformers(tmp_path, kind):
    model = tiny(kind)
    block = model.model.layers[1].mlp
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.copy_(torch.randn(tensor.shape))
    model.save_pretrained(tmp_path)
    router = checkpoint.load_router(tmp_path, 1)
    config = checkpoint.moe_config(tmp_path)
    x = torch.randn(16, 64)
    logits = torch.nn.functional.linear(x, router.weight, router.bias)
    ids, weights = config.gating.choose(logits, config.topk, router.correction)
    gate = block.router if kind == "gpt_oss" else block.gate
    with torch.no_grad():
        _, want_weights, want_ids = gate(x)
    order, want_order = ids.argsort(1), want_ids.argsort(1)
    assert torch.equal(ids.gather(1, order).long(), want_ids.gather(1, want_order))
    torch.testing.assert_close(weights.gather(1, order), want_weights.gather(1, want_order))


# What is read and what is held.


def test_a_shard_reads_only_its_own_rows(tmp_path):
    """Rows of the other shard are NaN on disk: shard 0 never sees them, shard 1 refuses them."""
    model = separate(tmp_path, QWEN, plain, "model.layers.1.mlp", GATE_UP_DOWN)
    for name, tensor in model.tensors.items():
        bad = tensor.clone()
        (bad[:, 64:] if "down" in name else bad[64:]).fill_(torch.nan)
        model.tensors[name] = bad
    model.save()
    share = checkpoint.load_layer(tmp_path, 1, shard=(0, 2))
    np.testing.assert_array_equal(share.w2.codes.double().numpy(), model.w2[:, :, :64])
    with pytest.raises(MixMoEError, match="must be finite"):
        checkpoint.load_layer(tmp_path, 1, shard=(1, 2))


LIMITED = """
import resource, sys, torch
torch.set_num_threads(1)
from mixmoe import checkpoint
folder, shrink, wanted = sys.argv[1], int(sys.argv[2]), sys.argv[3] or None
checkpoint.load_layer(folder, 1, experts=[0], format=wanted)  # every import and pool is in place
held = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) << 10
expert = 3 * 1024 * 512 * 2
result = 16 * expert if wanted is None else 16 * expert // 2 + 6 * expert
limit = held + result + 2 * expert + (4 << 20) - shrink
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(checkpoint.load_layer(folder, 1, format=wanted).nbytes)
"""


@pytest.mark.parametrize("wanted", ["", "fp8_channel"])
def test_loading_holds_the_result_and_one_expert(tmp_path, wanted):
    """48 MB of bf16 experts under a limit on private memory of result + 2 experts + 4 MB.

    Conversion may also hold one expert's float32 copies (6x its 3 MB of bf16).
    """
    separate(tmp_path, QWEN, plain, "model.layers.1.mlp", GATE_UP_DOWN, e=16, h=512, i=1024)

    def run(shrink: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", LIMITED, str(tmp_path), str(shrink), wanted]
        return subprocess.run(command, capture_output=True, text=True)

    done = run(0)
    assert done.returncode == 0, done.stderr
    assert run(40 << 20).returncode != 0, "the limit must be able to bite"


# Mutations: each wrong reading of the files is seen by the comparison.


def mutated(tmp_path, monkeypatch, build, change) -> None:
    model = build(tmp_path)
    change(monkeypatch, model)
    with pytest.raises(AssertionError):
        weights = checkpoint.load_layer(tmp_path, 1)
        assert_equal(weights, model.w13, model.w2)
        np.testing.assert_array_equal(weights.w13_bias.double().numpy(), model.bias13)


def build_kimi(tmp):
    return separate(tmp, DEEPSEEK, kimi, "model.layers.1.mlp", GATE_UP_DOWN)


def build_quark(tmp):
    return separate(tmp, DEEPSEEK, quark, "model.layers.1.mlp", GATE_UP_DOWN)


def swap_nibbles(patch, model):
    name = f"{BASE}.1.gate_proj.weight"
    t = model.tensors[name]
    model.tensors[name] = (t >> 4) | (t << 4)
    model.save()


def shift_one_scale(patch, model):
    name = f"{BASE}.1.gate_proj.weight_scale"
    model.tensors[name] = with_value(model.tensors[name], 3)
    model.save()


def swap_gate_and_up(patch, model):
    swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    model.tensors = {
        ".".join(swap.get(word, word) for word in name.split(".")): t
        for name, t in model.tensors.items()
    }
    model.save()


def swap_experts(patch, model):
    swap = {"0": "2", "2": "0"}
    model.tensors = {
        ".".join(swap.get(word, word) for word in name.split(".")): t
        for name, t in model.tensors.items()
    }
    model.save()


def read_twos_complement(patch, model):
    patch.setattr(matrix_module, "OFFSET_BINARY", 0)


def read_halves(patch, model):
    halves = (slice(0, 96), slice(96, 192))
    patch.setattr(layer_module.Layer, "halves", lambda self: halves)


MUTATIONS = {
    "nibble order": (build_quark, swap_nibbles),
    "one scale": (build_quark, shift_one_scale),
    "gate and up": (build_kimi, swap_gate_and_up),
    "experts": (build_kimi, swap_experts),
    "offset binary": (build_kimi, read_twos_complement),
    "interleaving": (gpt_oss_model, read_halves),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_seen(tmp_path, monkeypatch, name):
    mutated(tmp_path, monkeypatch, *MUTATIONS[name])


def test_mutated_bias_interleaving_is_seen(tmp_path, monkeypatch):
    model = gpt_oss_model(tmp_path)
    model.bias13 = np.roll(model.bias13, 1, axis=1)
    with pytest.raises(AssertionError):
        weights = checkpoint.load_layer(tmp_path, 1)
        np.testing.assert_array_equal(weights.w13_bias.double().numpy(), model.bias13)


def test_mutated_shards_are_seen(tmp_path, monkeypatch):
    """A shard that starts one group late, and scales that follow the wrong block."""
    args = (tmp_path, DEEPSEEK, deepseek, "model.layers.1.mlp", GATE_UP_DOWN)
    model = separate(*args, e=1, h=160, i=384)
    right = load_module._span
    copy = matrix_module.Matrix.copy_scales

    def late(layer, choice):
        span = right(layer, choice)
        return span if span.start == 0 else slice(span.start - 32, span.stop - 32)

    def shifted(self, rows, cols, target, out):
        copy(self, rows, cols, target, out)
        out.copy_(out.roll(1, -1))

    for patch in ((load_module, "_span", late), (matrix_module.Matrix, "copy_scales", shifted)):
        with monkeypatch.context() as context:
            context.setattr(*patch)
            shares = [checkpoint.load_layer(tmp_path, 1, shard=(r, 2)) for r in range(2)]
            with pytest.raises(AssertionError):
                assert_shards(tmp_path, shares, model)
    shares = [checkpoint.load_layer(tmp_path, 1, shard=(r, 2)) for r in range(2)]
    assert_shards(tmp_path, shares, model)
