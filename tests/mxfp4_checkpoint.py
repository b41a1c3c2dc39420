"""Writes a small gpt-oss checkpoint with MXFP4 experts, laid out as OpenAI's."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mixmoe.formats import format_named
from mixmoe.hf.models import small_model


def write(folder: Path, hidden: int = 128, layers: int = 2) -> Path:
    """Blocks, scales and biases of interleaved gate and up rows; config.json says mxfp4."""
    model = small_model("gpt-oss", hidden=hidden, layers=layers, dtype=torch.bfloat16, seed=5)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            q = format_named("mxfp4").quantise(tensor.transpose(1, 2).float())
            state[f"{name}_blocks"] = q.codes.unflatten(-1, (-1, 16)).contiguous()
            state[f"{name}_scales"] = q.scales
        else:
            state[name] = tensor.contiguous().clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
