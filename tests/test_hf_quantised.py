"""FP8 and MXFP4 modules of transformers through mixmoe, as they lie in their checkpoints."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="an extra: pip install '.[hf]'")

import mxfp4_checkpoint as mxfp4_checkpoint_file  # noqa: E402
from hf_models import (  # noqa: E402
    IDS,
    LAYERS,
    experts_input,
    first_experts,
    small,
    worst,
)
from transformers import AutoModelForCausalLM, Mxfp4Config  # noqa: E402
from transformers.integrations import finegrained_fp8, moe, mxfp4  # noqa: E402

import mixmoe  # noqa: E402
import mixmoe.hf.experts as experts_module  # noqa: E402
from mixmoe import MixMoEError, Recipe, accuracy, hf  # noqa: E402
from mixmoe.formats import format_named  # noqa: E402
from mixmoe.hf import stored  # noqa: E402

pytestmark = pytest.mark.usefixtures("registered", "no_grad")


# FP8 modules.


def fp8_experts(model, block=(128, 128), inner=64, scale_fmt="float", **options):
    """The model's first experts as FP8Experts, and dense ones of exactly the same values."""
    dense = first_experts(model)
    config = dense.config
    build = moe.use_experts_implementation(
        experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
    )
    kind = type("FP8ExpertsHere", (finegrained_fp8.FP8Experts,), {})
    module = build(kind)(config, block_size=block, scale_fmt=scale_fmt, **options)
    for name in ("gate_up_proj", "down_proj"):
        values = getattr(dense, name)
        halves = values.chunk(2, dim=1) if name == "gate_up_proj" else [values]
        if block is None:
            peak = [h.abs().amax(dim=(1, 2), keepdim=True) / 448 for h in halves]
            codes = [(h / p).to(torch.float8_e4m3fn) for h, p in zip(halves, peak, strict=True)]
            exact = torch.cat([c.float() * p for c, p in zip(codes, peak, strict=True)], dim=1)
            codes, scales = torch.cat(codes, dim=1), torch.cat(peak, dim=1)
        else:
            q = [format_named(f"fp8_block{block[0]}x{block[1]}").quantise(h) for h in halves]
            codes = torch.cat([h.codes for h in q], dim=1)
            scales = torch.cat([h.scales for h in q], dim=1)
            exact = torch.cat([h.dequantise() for h in q], dim=1)
        setattr(module, name, torch.nn.Parameter(codes, requires_grad=False))
        scales = torch.nn.Parameter(scales, requires_grad=False)
        setattr(module, f"{name}_scale_inv", scales)
        values.copy_(exact)
    return dense, module


@pytest.mark.parametrize(
    "attributes, act",
    [
        ({}, mixmoe.silu()),
        ({"limit": 5.0}, mixmoe.silu(5.0)),
        ({"swiglu_alpha": 1.5, "swiglu_limit": 9.0}, mixmoe.swiglu(9.0, 1.5)),
        ({"gate_softcap": 3.0, "up_softcap": 20.0}, mixmoe.situv2(3.0, 20.0)),
    ],
    ids=lambda a: str(a)[:20],
)
def test_gates_of_fp8_experts_are_recognised(attributes, act):
    module = fp8_experts(small("qwen3-moe"))[1]
    if "gate_softcap" in attributes and not hasattr(module, "gate_softcap"):
        act = mixmoe.silu()  # transformers 5.17 does not know the caps
    for name, value in attributes.items():
        setattr(module, name, value)
    assert hf.activation_of(module) == act


@pytest.mark.parametrize(
    "block, recipe",
    [
        ((128, 128), "a8w8_block"),
        ((64, 128), "a8w8_block"),
        ((48, 128), "a8w8_block"),
        (None, "a8w8"),
    ],
    ids=str,
)
def test_fp8_module(block, recipe):
    dense, module = fp8_experts(small("qwen3-moe"), block)
    assert hf.default_recipe(module).name == recipe
    args = experts_input(dense)
    dense.config._experts_implementation = "eager"
    ref = dense(*args)
    module.config._experts_implementation = "mixmoe"
    y = module(*args)
    noise = 2.5 * format_named("fp8_token").noise  # the weights are the same: activations alone
    assert 0 < worst(y, ref) < noise
    kept = module.__dict__[experts_module.KEPT].layer
    assert kept.w13_codes.data_ptr() == module.gate_up_proj.data_ptr()  # bit for bit, no copy
    module.config._experts_implementation = "mixmoe-a16w4"
    assert noise < worst(module(*args), ref) < 1.25 * accuracy.layer_noise(Recipe.named("a16w4"))
    module.gate_up_proj_scale_inv[:, :1].mul_(2)
    module.config._experts_implementation = "mixmoe"
    assert worst(module(*args), ref) > 0.1


def test_fp8_models_convert_and_static_scales_are_refused():
    model = small("deepseek-v3")
    dense, module = fp8_experts(model)
    path = next(name for name, found in hf.experts_of(model) if found is dense)
    args = experts_input(dense)
    ref = dense(*args)
    model.set_submodule(path, module)
    hf.convert(model)
    assert model.get_submodule(path).layer.recipe.name == "a8w8_block"
    assert worst(model.get_submodule(path)(*args), ref) < 0.075
    module.activation_scheme = "static"
    with pytest.raises(MixMoEError, match="static scales"):
        hf.weights_of(module)


def test_fp4_module():
    module = fp8_experts(small("qwen3-moe"))[1]
    values = torch.randn(16, 128, 128), torch.randn(16, 128, 64)
    for name, dense in zip(("gate_up_proj", "down_proj"), values, strict=True):
        q = format_named("mxfp4").quantise(dense)
        setattr(module, name, torch.nn.Parameter(q.codes.view(torch.int8), requires_grad=False))
        scales = torch.nn.Parameter(q.scales.view(torch.float8_e8m0fnu), requires_grad=False)
        setattr(module, f"{name}_scale_inv", scales)
    weights = hf.weights_of(module)
    assert hf.default_recipe(module).name == "a8w4"
    assert torch.equal(weights.dense()[0], format_named("mxfp4").quantise(values[0]).dequantise())


# MXFP4 gpt-oss.


@pytest.fixture(scope="module")
def mxfp4_checkpoint(tmp_path_factory):
    return mxfp4_checkpoint_file.write(tmp_path_factory.mktemp("gpt-oss-mxfp4"))


def load(folder, implementation, **options):
    model = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation=implementation, dtype=torch.float32, **options
    )
    return model.eval()


@pytest.fixture(scope="module")
def unpacked(mxfp4_checkpoint):
    """transformers' own way without a GPU: the weights unpacked."""
    options = {"quantization_config": Mxfp4Config(dequantize=True)}
    return load(mxfp4_checkpoint, "eager", **options).float()


def test_mxfp4_checkpoint_loads_as_it_lies(mxfp4_checkpoint, unpacked):
    model = load(mxfp4_checkpoint, "mixmoe")
    layers = [m for m in model.modules() if isinstance(m, hf.Experts)]
    assert len(layers) == LAYERS and layers[0].layer.recipe.name == "a16w4"
    assert layers[0].layer.recipe.act == mixmoe.swiglu(7.0, 1.702)
    assert layers[0].layer.w13_codes.dtype == torch.uint8
    ref, y = unpacked(IDS).logits, model(IDS).logits
    assert 0 < worst(y, ref) < LAYERS * accuracy.layer_noise(Recipe.named("a16w16"))
    want = unpacked.generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), want)


def test_mxfp4_recipe_by_name_and_fault(mxfp4_checkpoint, unpacked, monkeypatch):
    model = load(mxfp4_checkpoint, "mixmoe-a8w4")
    assert next(m for m in model.modules() if isinstance(m, hf.Experts)).layer.recipe.name == "a8w4"
    ref = unpacked(IDS).logits
    good = accuracy.row_errors(model(IDS).logits, ref).median()
    assert good < 2 * format_named("fp8_token").noise  # the weights are the same
    with monkeypatch.context() as patch:
        apart = stored._apart

        def swapped(w13, w2, module):
            weights = apart(w13, w2, module)
            half = weights.I
            order = [*range(half, 2 * half), *range(half)]
            rows = weights.w13
            moved = replace(rows, codes=rows.codes[:, order], scales=rows.scales[:, order])
            return replace(weights, w13=moved)

        patch.setattr(stored, "_apart", swapped)
        broken = load(mxfp4_checkpoint, "mixmoe-a8w4")
    assert accuracy.row_errors(broken(IDS).logits, ref).median() > 4 * good


def test_mxfp4_swizzled_module_is_read_back(mxfp4_checkpoint, unpacked):
    """transformers' GPU form, its Triton tensors played by ones that hold plain transposes."""

    class Plain:
        def __init__(self, data):
            self.data, self.storage, self.layout, self.weight_scale = data, self, self, self

        def unswizzle_data(self, data):
            return data

    source = load(mxfp4_checkpoint, "mixmoe")
    model = small("gpt-oss")
    model.load_state_dict(unpacked.state_dict())
    want = source(IDS).logits
    tensors = load_file(mxfp4_checkpoint / "model.safetensors")
    for number, layer in enumerate(model.model.layers):
        module = mxfp4.Mxfp4GptOssExperts(model.config)
        for name in ("gate_up_proj", "down_proj"):
            prefix = f"model.layers.{number}.mlp.experts.{name}"
            blocks = tensors[f"{prefix}_blocks"].flatten(-2).transpose(1, 2)
            del module._parameters[name]
            setattr(module, name, Plain(blocks))
            scales = Plain(tensors[f"{prefix}_scales"].transpose(1, 2))
            setattr(module, f"{name}_precision_config", scales)
            getattr(module, f"{name}_bias").copy_(tensors[f"{prefix}_bias"])
        layer.mlp.experts = module
        if hasattr(mxfp4, "Mxfp4GptOssMLP"):  # from transformers 5.2x on a class of its own
            layer.mlp = mxfp4.Mxfp4GptOssMLP(layer.mlp.router, module)
    hf.convert(model)
    assert torch.equal(model(IDS).logits, want)


def test_other_implementations_keep_transformers_way(mxfp4_checkpoint):
    """Asked for eager, the quantiser is its parent: it wants accelerate or a kernel, or unpacks."""
    try:
        model = load(mxfp4_checkpoint, "eager")
    except ImportError as error:
        assert "accelerate" in str(error).lower()
    else:
        assert type(first_experts(model)).__name__ == "GptOssExperts"
