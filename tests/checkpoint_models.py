"""Writes small checkpoints for the checkpoint tests, with encoders of their own.

Every stored matrix is built from random codes and scales whose product is known in float64, so
"equal" in those tests means equal bit for bit in value. Files are written by safetensors itself.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

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


def packed_mx(rng, n, k):
    codes, scales, dense = mx_codes(rng, n, k)
    return Coded({".weight_packed": codes, ".weight_scale": scales}, dense)


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
    "compressed mxfp4": (QWEN, packed_mx, "model.layers.1.mlp", GATE_UP_DOWN, "mxfp4"),
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


BASE = "model.layers.1.mlp.experts"


def with_value(tensor, value):
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed
