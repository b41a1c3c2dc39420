"""safetensors checkpoints -> Weights, for the formats and models people have on disk.

``load_layer`` and ``iter_layers`` load, ``layers`` and ``detect`` look, ``moe_config`` and
``load_router`` give what else a MoE layer needs. Models are rows of ``maps.json``.
"""

from mixmoe.checkpoint.config import Gating, MoEConfig, Score, moe_config
from mixmoe.checkpoint.layer import LayerInfo
from mixmoe.checkpoint.load import (
    Router,
    detect,
    iter_layers,
    layers,
    load_layer,
    load_router,
)

__all__ = [
    "Gating",
    "LayerInfo",
    "MoEConfig",
    "Router",
    "Score",
    "detect",
    "iter_layers",
    "layers",
    "load_layer",
    "load_router",
    "moe_config",
]
