"""transformers models through mixmoe: four families, faults that show."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="an extra: pip install '.[hf]'")

from hf_models import (  # noqa: E402
    IDS,
    LAYERS,
    eager_and,
    experts_input,
    first_experts,
    small,
    worst,
)

import mixmoe  # noqa: E402
import mixmoe.hf.experts as experts_module  # noqa: E402
from mixmoe import MixMoEError, Recipe, accuracy, hf  # noqa: E402
from mixmoe.formats import format_named  # noqa: E402
from mixmoe.hf import stored  # noqa: E402
from mixmoe.hf.models import SMALL  # noqa: E402

# Seeds whose greedy path keeps its two best logits apart, by 3 times the drift and more.
SEEDS = {"qwen3-moe": 9, "mixtral": 7, "deepseek-v3": 3, "gpt-oss": 5}
RECIPES = ["a16w4", "a16i4", "a8w4", "a8w8", "a8w8_block", "a8w4_mx", "a4w4", "w8a8", "w4a8"]
pytestmark = pytest.mark.usefixtures("registered", "no_grad")


# A layer: every recipe within its noise of transformers' own run on the same input.


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sixteen_bit_layer(name, dtype):
    module = first_experts(small(name, dtype))
    ref, y = eager_and(module, "mixmoe", *experts_input(module))
    assert y.dtype == dtype == ref.dtype
    recipe = hf.recipe_for(module, None, dtype)
    assert recipe.out_dtype == dtype and recipe.weight.name in ("bf16", "fp16")
    assert 0 < worst(y, ref) < accuracy.layer_noise(recipe)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("recipe", RECIPES)
def test_quantised_layer(name, recipe):
    module = first_experts(small(name))
    ref, y = eager_and(module, f"mixmoe-{recipe}", *experts_input(module))
    noise = accuracy.layer_noise(Recipe.named(recipe))
    assert noise / 8 < worst(y, ref) < noise * 1.25  # 128 columns spread more than noise's 4096


@pytest.mark.parametrize("name", SMALL)
def test_layer_is_the_reference_on_its_own_weights(name):
    """What is left besides quantisation is float32 against float64."""
    module = first_experts(small(name))
    x, ids, w = experts_input(module)
    recipe = hf.recipe_for(module, "a8w4", torch.float32)
    weights = hf.weights_of(module, recipe.weight)
    _, y = eager_and(module, "mixmoe-a8w4", x, ids, w)
    exact = mixmoe.moe(x, weights, ids, w, recipe=recipe, backend="reference")
    assert worst(y, exact) < 2**-11


FAULTS = {
    "gate and up swapped": lambda w13, w2: (torch.cat(w13.chunk(2, dim=1)[::-1], dim=1), w2),
    "rows taken as interleaved": lambda w13, w2: (
        torch.cat([w13[:, 0::2], w13[:, 1::2]], dim=1), w2,
    ),
    "two experts swapped": lambda w13, w2: (w13[[1, 0, *range(2, len(w13))]], w2),
    "one row zeroed": lambda w13, w2: (w13.index_fill(1, torch.tensor([5]), 0.0), w2),
    "half of down lost": lambda w13, w2: (w13, w2 * (torch.arange(w2.shape[2]) < w2.shape[2] / 2)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", SMALL)
def test_faults_show(name, fault, monkeypatch):
    """Each planted fault takes the 16-bit layer out of the tolerance of the test above."""

    def broken(module, fmt=None):
        weights = stored.weights_of(module, fmt)
        dense = FAULTS[fault](*weights.dense())
        q13, q2 = (fmt.quantise(w) for w in dense)
        return replace(weights, w13=q13, w2=q2)

    monkeypatch.setattr(experts_module, "weights_of", broken)
    module = first_experts(small(name))
    ref, y = eager_and(module, "mixmoe", *experts_input(module, tokens=24))
    assert worst(y, ref) > 2 * accuracy.layer_noise(hf.recipe_for(module, None))


@pytest.mark.parametrize("name", ["gpt-oss", "qwen3-moe"])
def test_bias_and_limit_are_the_modules(name, monkeypatch):
    module = first_experts(small(name))
    args = experts_input(module)
    for wrong in ("bias", "act"):
        if name == "qwen3-moe" and wrong == "bias":
            continue
        with monkeypatch.context() as patch:
            if wrong == "bias":
                patch.setattr(stored, "_biases", lambda module: (None, None))
            else:
                patch.setattr(stored, "activation_of", lambda module: mixmoe.gelu())
            experts_module.forget(module)
            ref, y = eager_and(module, "mixmoe", *args)
            assert worst(y, ref) > 0.05
    experts_module.forget(module)


def test_sentinel_ids_are_skipped():
    """Expert parallelism names another rank's expert num_experts; eager alone sees weight 0."""
    module = first_experts(small("qwen3-moe"))
    x, ids, w = experts_input(module)
    w[:, 1] = 0
    away = ids.clone()
    away[:, 1] = module.num_experts
    ref, plain = eager_and(module, "mixmoe", x, ids, w)
    assert worst(plain, ref) < accuracy.layer_noise(hf.recipe_for(module, None))
    w[:, 1] = 5.0  # skipped whatever its weight
    assert worst(module(x, away, w), plain) < 2**-11
    away[0] = module.num_experts
    assert (module(x, away, w)[0] == 0).all()


# A model: logits and greedy tokens.


@pytest.mark.parametrize("name", SMALL)
def test_logits_and_tokens_of_the_sixteen_bit_recipe(name):
    """float32 models: bf16 operands in the experts, the same tokens, with room between the two best
    logits everywhere along the way, so that the equality is no luck."""
    model = small(name, seed=SEEDS[name])
    ref = model(IDS).logits
    tokens = model.generate(IDS, max_new_tokens=8, do_sample=False)
    best = model(tokens[:, :-1]).logits[:, IDS.shape[1] - 1 :]
    model.set_experts_implementation("mixmoe")
    y = model(IDS).logits
    assert 0 < worst(y, ref) < LAYERS * accuracy.layer_noise(Recipe.named("a16w16"))
    margin = best.topk(2).values.diff().abs().min()
    drift = (model(tokens[:, :-1]).logits[:, IDS.shape[1] - 1 :] - best).abs().max()
    assert 2 * drift < margin
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), tokens)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("recipe", ["a8w8", "a8w4", "a4w4"])
def test_logits_of_quantised_recipes(name, recipe):
    """The median row: where noise flips a router's choice of expert, a row is further off."""
    model = small(name)
    ref = model(IDS).logits
    model.set_experts_implementation(f"mixmoe-{recipe}")
    errors = accuracy.row_errors(model(IDS).logits, ref)
    noise = accuracy.layer_noise(Recipe.named(recipe))
    assert noise / 20 < float(errors.median()) < LAYERS**0.5 * noise


def test_tokens_of_a_bf16_model():
    model = small("deepseek-v3", torch.bfloat16, seed=SEEDS["deepseek-v3"])
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
    hf.convert(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), tokens)


# register, cache, convert.


def test_names_reach_from_config_and_the_fp8_registry():
    model = small("mixtral", implementation="mixmoe-a8w4")
    model(IDS)
    layer = first_experts(model).__dict__[experts_module.KEPT].layer
    assert layer.recipe.name == "a8w4"
    for interface in experts_module.interfaces():
        assert {"mixmoe", "mixmoe-a8w4", "mixmoe-a8w8_block"} <= set(interface._global_mapping)
    assert len(list(experts_module.interfaces())) == 2
    with pytest.raises(ValueError, match="mixmoe-a3w4"):
        model.set_experts_implementation("mixmoe-a3w4")


def test_register_chooses_recipe_and_backend():
    module = first_experts(small("qwen3-moe"))
    args = experts_input(module)
    try:
        hf.register(recipe="a8w8", backend="reference")
        _, y = eager_and(module, "mixmoe", *args)
        kept = module.__dict__[experts_module.KEPT].layer
        assert (kept.recipe.name, kept.backend) == ("a8w8", "reference")
    finally:
        hf.register()
    assert not torch.equal(module(*args), y)
    with pytest.raises(MixMoEError, match="unknown recipe: got a9w9"):
        hf.register(recipe="a9w9")


def test_layer_is_made_once_and_follows_the_parameters():
    module = first_experts(small("gpt-oss"))
    args = experts_input(module)
    _, y = eager_and(module, "mixmoe-a8w4", *args)
    kept = module.__dict__[experts_module.KEPT].layer
    assert torch.equal(module(*args), y)
    assert module.__dict__[experts_module.KEPT].layer is kept
    assert not any("mixmoe" in key for key in module.state_dict())
    module.down_proj.mul_(2.0)
    assert not torch.equal(module(*args), y)
    other = first_experts(small("gpt-oss", seed=5))
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(*args), eager_and(other, "mixmoe-a8w4", *args)[1])
    module.down_proj.data.zero_()  # moves no version counter
    before = module(*args)
    experts_module.forget(module)
    assert before.abs().max() > 1 and not torch.equal(module(*args), before)


def test_plain_bf16_parameters_are_not_copied():
    module = first_experts(small("mixtral", torch.bfloat16))
    weights = hf.weights_of(module, format_named("bf16"))
    assert weights.w13.codes.data_ptr() == module.gate_up_proj.data_ptr()


@pytest.mark.parametrize("name", SMALL)
def test_convert_releases_the_dense_parameters(name):
    model = small(name, torch.bfloat16)
    modules = dict(hf.experts_of(model))
    dense = sum(sum(t.nbytes for t in stored.parameters_of(m)) for m in modules.values())
    before = sum(t.nbytes for t in model.state_dict().values())
    module = first_experts(model)
    args = experts_input(module)
    _, want = eager_and(module, "mixmoe-a8w4", *args)
    module.config._experts_implementation = "eager"
    assert hf.convert(model, "a8w4") is model
    assert not list(hf.experts_of(model))
    path = next(iter(modules))
    assert torch.equal(model.get_submodule(path)(*args), want)
    after = sum(t.nbytes for t in model.state_dict().values())
    assert before - after > 0.6 * dense
    assert "a8w4" in repr(model)
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    with pytest.raises(MixMoEError, match="experts are converted already: got a8w4"):
        hf.convert(model)


def test_a_converted_model_is_not_saved(tmp_path):
    """Its experts' names are no loader's: what it wrote would load with random experts."""
    kept = hf.convert(small("qwen3-moe"), "a8w4", free=False)
    kept.save_pretrained(tmp_path / "kept")
    assert (tmp_path / "kept" / "model.safetensors").exists()
    model = hf.convert(kept, "a8w4")
    with pytest.raises(MixMoEError, match="not saved as a checkpoint"):
        model.save_pretrained(tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("recipe, nearest", [("w8a8_smooth", "w8a8"), ("w4a8_smooth", "w4a8")])
def test_smooth_recipes_are_refused_before_anything_is_lost(recipe, nearest):
    model = small("qwen3-moe")
    message = f"no smooth factors .*w13_smooth.*: got {recipe}, nearest legal: {nearest}$"
    for free in (True, False):
        with pytest.raises(MixMoEError, match=message):
            hf.convert(model, recipe, free=free)
    with pytest.raises(MixMoEError, match=message):
        hf.register(Recipe.named(recipe))
    with pytest.raises(MixMoEError, match=message):
        hf.recipe_for(first_experts(model), recipe)
    assert model.config._experts_implementation == "eager" and len(list(hf.experts_of(model))) == 2


def test_convert_refuses_the_last_layer_before_the_first_is_replaced():
    model = small("qwen3-moe")
    last = list(hf.experts_of(model))[-1][1]
    last.act_fn = torch.nn.ReLU()
    with pytest.raises(MixMoEError, match="unknown activation of experts: got ReLU"):
        hf.convert(model, "a8w4")
    assert len(list(hf.experts_of(model))) == 2


def test_convert_keeping_the_dense_parameters():
    model = small("qwen3-moe")
    ref = model(IDS).logits
    hf.convert(model, Recipe.named("a8w8", rounding="EVEN"), free=False)
    y = model(IDS).logits
    assert first_experts(model).__dict__[experts_module.KEPT].layer.recipe.rounding.name == "EVEN"
    assert not torch.equal(y, ref)
    model.set_experts_implementation("eager")
    assert torch.equal(model(IDS).logits, ref)


def test_compiled_experts():
    module = first_experts(small("qwen3-moe"))
    args = experts_input(module)
    module.config._experts_implementation = "mixmoe-a8w4"
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="experts are not prepared: convert"):
        compiled(*args)
    torch._dynamo.reset()
    broken = torch.compile(module, backend="aot_eager")(*args)  # a graph break prepares them
    want = module(*args)
    assert torch.equal(broken, want)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(*args), want)


def test_refusals():
    module = first_experts(small("qwen3-moe"))
    module.act_fn = torch.nn.ReLU()
    with pytest.raises(MixMoEError, match="unknown activation of experts: got ReLU"):
        hf.activation_of(module)
    module.has_gate = False
    with pytest.raises(MixMoEError, match="gated experts"):
        hf.weights_of(module)
    with pytest.raises(MixMoEError, match="the model must hold experts: got Linear"):
        hf.convert(torch.nn.Linear(4, 4))
    with pytest.raises(MixMoEError, match="not an experts module"):
        hf.weights_of(torch.nn.Linear(4, 4))
