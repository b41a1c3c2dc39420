"""Wrong checkpoints are refused, and each message names the tensor."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_models import (
    BASE,
    DEEPSEEK,
    GATE_UP_DOWN,
    QWEN,
    Coded,
    assert_equal,
    deepseek,
    gpt_oss_model,
    kimi,
    mx_codes,
    plain,
    quark,
    separate,
    sizes,
    with_value,
)
from safetensors.torch import save_file

from mixmoe import checkpoint
from mixmoe.errors import MixMoEError

# Wrong files. Each message names the tensor.


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


def test_missing_expert_is_named_as_the_others_are_stored(tmp_path):
    model = separate(tmp_path, DEEPSEEK, kimi, "model.layers.1.mlp", GATE_UP_DOWN)
    model.tensors = {k: v for k, v in model.tensors.items() if ".experts.0." not in k}
    model.save()
    with pytest.raises(MixMoEError, match=rf"{BASE}\.0\.gate_proj\.weight_packed: got none"):
        checkpoint.load_layer(tmp_path, 1)


def put(name, make):
    def change(tensors):
        assert name in tensors
        tensors[name] = make(tensors[name])

    return change


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


VALUES = {
    "null": ("hidden_size", None, "hidden_size must be a whole number above 0: got None"),
    "text": ("hidden_size", "abc", "hidden_size must be a whole number above 0: got 'abc'"),
    "fraction": ("moe_intermediate_size", 64.5, "whole number above 0: got 64.5"),
    "zero": ("num_experts_per_tok", 0, "whole number above 0: got 0"),
    "shared": ("n_shared_experts", "x", "n_shared_experts must be a whole number"),
    "groups": ("n_group", "x", "n_group must be a whole number"),
    "scale": ("routed_scaling_factor", None, "routed_scaling_factor must be a number above 0"),
    "quant": ("quantization_config", "fp8", "must be an object: got 'fp8', nearest legal: {}"),
    "block": ("quantization_config", {"weight_block_size": [128]}, r"nearest legal: \[128, 128\]"),
    "groups of": ("quantization_config", {"config_groups": [1]}, "config_groups must be an object"),
    "text model": ("text_config", 3, "text_config must be an object: got 3"),
    "experts": ("num_experts", 2, r"experts.2.down_proj.weight: got 2, nearest legal: 3"),
}


@pytest.mark.parametrize("case", VALUES)
def test_config_values_that_cannot_be_meant(tmp_path, case):
    key, value, message = VALUES[case]
    separate(tmp_path, DEEPSEEK, deepseek, "model.layers.1.mlp", GATE_UP_DOWN)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    with pytest.raises(MixMoEError, match=message) as error:
        checkpoint.load_layer(tmp_path, 1)
    assert "config.json" in str(error.value)


def test_half_a_file_still_holds_the_layers_before_the_cut(tmp_path):
    model = separate(tmp_path, QWEN, plain, "model.layers.0.mlp", GATE_UP_DOWN)
    later = {k.replace("layers.0", "layers.1"): t.clone() for k, t in model.tensors.items()}
    model.tensors |= later
    model.save()
    file = tmp_path / "model.safetensors"
    truncate(file, file.stat().st_size // 2 + 4096)
    assert_equal(checkpoint.load_layer(tmp_path, 0), model.w13, model.w2)
    with pytest.raises(MixMoEError, match=r"layers\.1\..*model.safetensors is truncated"):
        checkpoint.load_layer(tmp_path, 1)


OPTIONS = {
    "shard is a number": ({"shard": 2}, r"shard is \(r, n\) .*: got 2, nearest legal: \(0, 1\)"),
    "shard of three": ({"shard": (0, 1, 2)}, r"shard is \(r, n\)"),
    "shard of words": ({"shard": ("0", "1")}, r"shard is \(r, n\)"),
    "experts is a number": ({"experts": 3}, "experts is a sequence of numbers: got 3"),
    "experts of words": ({"experts": ["a"]}, "experts is a sequence of numbers"),
    "no experts": ({"experts": []}, "experts is a sequence of numbers"),
    "device": ({"device": "gpu"}, "torch must have the device: got gpu: .*nearest legal: cpu"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be(tmp_path, case):
    options, message = OPTIONS[case]
    separate(tmp_path, QWEN, plain, "model.layers.1.mlp", GATE_UP_DOWN)
    with pytest.raises(MixMoEError, match=message):
        checkpoint.load_layer(tmp_path, 1, **options)
    with pytest.raises(MixMoEError, match=message):
        next(checkpoint.iter_layers(tmp_path, **options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch that sees no GPU")
def test_a_device_that_is_not_there(tmp_path):
    separate(tmp_path, QWEN, plain, "model.layers.1.mlp", GATE_UP_DOWN)
    for load in (checkpoint.load_layer, checkpoint.load_router):
        with pytest.raises(MixMoEError, match="torch must have the device: got cuda"):
            load(tmp_path, 1, device="cuda")


def test_progress_without_rich_says_what_to_install(tmp_path, monkeypatch):
    separate(tmp_path, DEEPSEEK, quark, "model.layers.1.mlp", GATE_UP_DOWN)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(MixMoEError, match="needs rich"):
        checkpoint.load_layer(tmp_path, 1, progress=True)
