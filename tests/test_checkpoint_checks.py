"""Checkpoints against transformers' own modules, memory held, and mutations of the checks."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_models import (
    BASE,
    DEEPSEEK,
    GATE_UP_DOWN,
    QWEN,
    assert_equal,
    assert_shards,
    deepseek,
    gpt_oss_model,
    kimi,
    plain,
    quark,
    separate,
    with_value,
)

from mixmoe import checkpoint
from mixmoe.checkpoint import layer as layer_module
from mixmoe.checkpoint import load as load_module
from mixmoe.checkpoint import matrix as matrix_module
from mixmoe.checkpoint.store import Store
from mixmoe.errors import MixMoEError

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


def by_expert(chosen):
    """(ids, weights) with each token's experts in ascending order."""
    ids, weights = chosen
    order = ids.argsort(1)
    return ids.gather(1, order).long(), weights.gather(1, order)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_float32_of_any_dtypes(x_dtype, stored):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=g).to(x_dtype)
    weight, bias = torch.randn(4, 64, generator=g), torch.randn(4, generator=g)
    router = checkpoint.Router(weight.to(stored), bias.to(stored))
    logits = router.logits(x)
    want = x.double() @ router.weight.double().T + router.bias.double()
    assert logits.dtype == torch.float32 and logits.shape == (5, 4)
    torch.testing.assert_close(logits.double(), want, rtol=1e-5, atol=1e-5)  # bf16's own are 2^-9
    with pytest.raises(MixMoEError, match=r"router's H columns: got \(5, 32\), nearest legal: 64"):
        router.logits(x[:, :32])


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
    ids, weights = by_expert(config.gating.choose(router.logits(x), config.topk, router.correction))
    gate = block.router if kind == "gpt_oss" else block.gate
    with torch.no_grad():
        want_weights, want_ids = gate(x)[1:]
    want_ids, want_weights = by_expert((want_ids, want_weights))
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights)
    if kind == "gpt_oss":  # without its bias it is another router
        unbiased = dataclasses.replace(router, bias=None).logits(x)
        assert not torch.equal(by_expert(config.gating.choose(unbiased, config.topk))[0], want_ids)


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
    if not wanted:
        assert run(40 << 20).returncode != 0, "the limit must be able to bite"


def mapped_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssFile")).split()[1]) << 10


@pytest.mark.parametrize("releases", [True, False])
def test_mapped_pages_of_an_expert_are_dropped(tmp_path, monkeypatch, releases):
    """While 48 MB load, at most an expert's 3 MB of the file are mapped; without release all."""
    separate(tmp_path, QWEN, plain, "model.layers.1.mlp", GATE_UP_DOWN, e=16, h=512, i=1024)
    checkpoint.load_layer(tmp_path, 1, experts=[0])
    seen, place = [], load_module._place

    def watched(*args):
        place(*args)
        seen.append(mapped_bytes())

    monkeypatch.setattr(load_module, "_place", watched)
    if not releases:
        monkeypatch.setattr(Store, "release", lambda self: None)
    before = mapped_bytes()
    checkpoint.load_layer(tmp_path, 1)
    assert (max(seen) - before < 6 << 20) is releases


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
