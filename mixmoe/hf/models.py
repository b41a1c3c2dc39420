"""Small models with random weights, built from transformers' own configurations."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from mixmoe.errors import MixMoEError


def _sizes(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": 512,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": hidden**-0.5,  # keeps every layer's output near its input's size
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def _qwen3_moe(hidden: int, layers: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **_sizes(hidden, layers) | {"head_dim": hidden // 4}, num_experts=16, num_experts_per_tok=4,
        moe_intermediate_size=hidden // 2, intermediate_size=2 * hidden, norm_topk_prob=True,
    )


def _mixtral(hidden: int, layers: int) -> MixtralConfig:
    return MixtralConfig(
        **_sizes(hidden, layers), num_local_experts=8, num_experts_per_tok=2,
        intermediate_size=hidden,
    )


def _deepseek_v3(hidden: int, layers: int) -> DeepseekV3Config:
    return DeepseekV3Config(
        **_sizes(hidden, layers) | {"num_key_value_heads": 4}, n_routed_experts=16, n_group=4,
        topk_group=2, num_experts_per_tok=4, n_shared_experts=1, first_k_dense_replace=1,
        moe_intermediate_size=hidden // 2, intermediate_size=2 * hidden, q_lora_rank=hidden // 2,
        kv_lora_rank=hidden // 4, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    )


def _gpt_oss(hidden: int, layers: int) -> GptOssConfig:
    return GptOssConfig(
        **_sizes(hidden, layers), head_dim=hidden // 4, num_local_experts=8,
        num_experts_per_tok=4, intermediate_size=hidden // 2,
        layer_types=(["sliding_attention", "full_attention"] * layers)[:layers],
    )


SMALL: dict[str, Callable[[int, int], Any]] = {
    "qwen3-moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek-v3": _deepseek_v3,
    "gpt-oss": _gpt_oss,
}


def small_model(
    name: str,
    hidden: int = 256,
    layers: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **options: Any,
) -> PreTrainedModel:
    """A random model of this family; biases and DeepSeek's correction are random too."""
    if name not in SMALL:
        raise MixMoEError("unknown small model", name, ", ".join(SMALL))
    config = SMALL[name](hidden, layers)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith(("proj_bias", "score_correction_bias")):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=g))
    return model.eval()
