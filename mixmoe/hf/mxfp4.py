"""gpt-oss MXFP4 checkpoints, loaded as they lie on disk.

transformers' ``Mxfp4GptOssExperts`` asks for a Triton kernel from the Hub and goes past both
expert registries; without that kernel it unpacks the weights to bf16. Here the quantiser that
``from_pretrained`` picks for ``quant_method: mxfp4`` is replaced by one that behaves as its parent
unless the model asks for a mixmoe implementation: then blocks and scales are read as they are.
"""

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.quantizers import auto
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

PREFIX = "mixmoe"


class Mxfp4Blocks(nn.Module):
    """Parameters with the names and shapes of the checkpoint, until they are converted.

    ``*_blocks`` uint8 (E, rows, K/32, 16), ``*_scales`` uint8 (E, rows, K/32), biases; rows of
    gate_up_proj are gate, up, gate, up.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.num_experts = config.num_local_experts
        self.alpha = getattr(config, "swiglu_alpha", 1.702)
        self.limit = getattr(config, "swiglu_limit", 7.0)
        hidden, inner = config.hidden_size, config.intermediate_size
        for name, rows, k in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            shape = (self.num_experts, rows, k // 32)
            blocks = torch.zeros(*shape, 16, dtype=torch.uint8)
            scales, bias = torch.zeros(*shape, dtype=torch.uint8), torch.zeros(shape[:2])
            for suffix, tensor in (("_blocks", blocks), ("_scales", scales), ("_bias", bias)):
                self.register_parameter(name + suffix, nn.Parameter(tensor, requires_grad=False))


class MixMoEMxfp4Quantizer(Mxfp4HfQuantizer):
    """Its parent, except for models whose ``experts_implementation`` is one of mixmoe's."""

    ours = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Put off until the model is known: mixmoe needs neither a GPU nor a Hub kernel."""
        self.environment = args, kwargs

    def _process_model_before_weight_loading(
        self, model: Any, use_kernels: bool = False, **kwargs: Any
    ) -> Any:
        name = getattr(model.config, "_experts_implementation", None) or ""
        wants_dense = getattr(self.quantization_config, "dequantize", False)
        self.ours = self.pre_quantized and name.startswith(PREFIX) and not wants_dense
        if not self.ours:
            super().validate_environment(*self.environment[0], **self.environment[1])
            return super()._process_model_before_weight_loading(model, use_kernels, **kwargs)
        for path, module in list(model.named_modules()):
            if isinstance(module, GptOssExperts):
                with torch.device("meta"):
                    model.set_submodule(path, Mxfp4Blocks(model.config))
        return model

    def get_weight_conversions(self) -> list[Any]:
        """None for ours: names and shapes are the checkpoint's."""
        return [] if self.ours else super().get_weight_conversions()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.ours:
            return super()._process_model_after_weight_loading(model, **kwargs)
        from mixmoe.hf.convert import convert

        return convert(model, **chosen(model.config._experts_implementation))

    def is_serializable(self) -> bool:
        """The converted layout is the backend's: save the checkpoint it came from instead."""
        return not self.ours and super().is_serializable()


def chosen(implementation: str) -> dict[str, Any]:
    """Recipe and backend that ``register`` bound to this name."""
    return dict(ALL_EXPERTS_FUNCTIONS[implementation].keywords)


def take_over_mxfp4() -> None:
    """Let ``from_pretrained`` find the quantiser above; harmless when called again."""
    auto.AUTO_QUANTIZER_MAPPING["mxfp4"] = MixMoEMxfp4Quantizer
