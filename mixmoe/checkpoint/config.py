"""What a model's config.json says of its MoE layers, read through the family table maps.json."""

import json
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from mixmoe.activations import Activation, gelu, silu, swiglu
from mixmoe.checkpoint.store import read_json
from mixmoe.errors import MixMoEError
from mixmoe.gating import sigmoid_topk, softmax_topk

MAPS = Path(__file__).with_name("maps.json")


class Rows(Enum):
    """Where a projection's gate and up rows lie on disk."""

    SEPARATE = "separate"  # two tensors
    HALVES = "halves"  # one tensor, gate above up
    INTERLEAVED = "interleaved"  # one tensor, gate, up, gate, up


class Score(Enum):
    """How router logits become scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SQRT_SOFTPLUS = "sqrtsoftplus"


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of the expert tensors below a layer's MoE block and how gate and up share them.

    ``{expert}`` in a name stands for the expert's number; ``fused`` tensors hold all experts,
    ``(E, N, K)`` or, ``transposed``, ``(E, K, N)``. ``stores`` are the (codes, scales) suffixes
    that may follow, ``bias`` the suffix of the biases where the model has them.
    """

    name: str
    gate: str
    up: str
    down: str
    rows: Rows
    stores: tuple[tuple[str, str | None], ...]
    fused: bool = False
    transposed: bool = False
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """Models that share names: a row of maps.json."""

    name: str
    model_types: tuple[str, ...]
    block: str
    layouts: tuple[Layout, ...]
    shared: Layout | None
    router: dict[str, str]
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Gating:
    """How router logits choose experts and weigh them.

    Scores = ``score(logits)``. Chosen: the ``topk`` largest ``scores + correction`` (a tensor of
    the router, where ``corrected``) inside the best ``topk_groups`` of ``groups``; a group's own
    score is its ``"max"`` or the sum of its ``"top2"``. Weights = the chosen scores, divided by
    their sum where ``renormalise``, times ``scale``.
    """

    score: Score
    renormalise: bool
    scale: float = 1.0
    groups: int = 1
    topk_groups: int = 1
    group_score: str = "top2"
    corrected: bool = False

    def choose(
        self, logits: Tensor, topk: int, correction: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(topk_ids int32, topk_weights float32)``, both (T, topk), of logits (T, E).

        Raises MixMoEError for DeepSeek-V2's grouped softmax and DeepSeek-V4's sqrtsoftplus, which
        :mod:`mixmoe.gating` does not have.
        """
        if self.score is Score.SIGMOID and self.group_score == "top2":
            groups = (self.groups, self.topk_groups)
            return sigmoid_topk(logits, topk, correction, *groups, self.renormalise, self.scale)
        if self.score is Score.SOFTMAX and self.groups == 1 and correction is None:
            ids, weights = softmax_topk(logits, topk, self.renormalise)
            return ids, weights * self.scale
        raise MixMoEError(
            "no gating function for this model",
            f"{self.score.value} in {self.groups} groups",
            "softmax without groups, sigmoid",
        )


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """The MoE part of a config.json: sizes, activation, gating, shared expert, quantisation.

    ``layers`` counts decoder layers (dense ones too); ``shared`` is the intermediate size of the
    shared expert, 0 without one; ``block`` the rows x columns of one fp8 block scale.
    """

    model_type: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    experts: int
    topk: int
    activation: Activation
    gating: Gating
    shared: int
    quant_method: str | None
    block: tuple[int, int]


@cache
def roots() -> tuple[str, ...]:
    """Module paths that may stand before ``layers.N``."""
    return tuple(json.loads(MAPS.read_text())["roots"])


@cache
def refused_suffixes() -> dict[str, str]:
    """Tensor suffixes whose presence means a scheme this library does not read, and its name."""
    return dict(json.loads(MAPS.read_text())["refused"])


@cache
def families() -> dict[str, Family]:
    """Model type -> family, for every model type that is known."""
    maps = json.loads(MAPS.read_text())

    def layout(name: str, row: dict[str, Any]) -> Layout:
        stores = tuple((c, s) for key in row["stores"] for c, s in maps["stores"][key])
        return Layout(**{**row, "name": name, "rows": Rows(row["rows"]), "stores": stores})

    table: dict[str, Family] = {}
    for name, row in maps["families"].items():
        shared = {"rows": "separate", "stores": ["linear"], **row.get("shared", {})}
        family = Family(
            name,
            tuple(row["model_types"]),
            row["block"],
            tuple(layout(key, maps["layouts"][key]) for key in row["layouts"]),
            layout("shared", shared) if "shared" in row else None,
            row["router"],
            row,
        )
        table |= dict.fromkeys(family.model_types, family)
    return table


def family_of(folder: str | Path) -> tuple[Family, dict[str, Any]]:
    """The family of a checkpoint folder, and its text model's configuration, defaults filled in."""
    top = read_json(Path(folder) / "config.json")
    config = {**top, **_section(top, "text_config")}
    known = families()
    kinds = [str(c.get("model_type")) for c in (top, config)]
    kind = next((k for k in kinds if k in known), None)
    if kind is None:
        near = get_close_matches(kinds[0], known, n=1) or [", ".join(known)]
        raise MixMoEError("unknown model_type in config.json", kinds[0], *near)
    return known[kind], {**known[kind].fields.get("defaults", {}), **config, "model_type": kind}


def moe_config(folder: str | Path) -> MoEConfig:
    """Read ``folder/config.json``. Raises MixMoEError for an unknown model, and for a key that is
    missing or holds what cannot be meant."""
    family, config = family_of(folder)
    fields = family.fields
    intermediate = _number(config, fields.get("intermediate", ["moe_intermediate_size"]))
    quant = _section(config, "quantization_config")
    return MoEConfig(
        model_type=config["model_type"],
        family=family.name,
        layers=_number(config, ["num_hidden_layers"]),
        hidden=_number(config, ["hidden_size"]),
        intermediate=intermediate,
        experts=_number(config, ["num_experts", "num_local_experts", "n_routed_experts"]),
        topk=_number(config, ["num_experts_per_tok"]),
        activation=_activation(config, fields),
        gating=_gating(config, family),
        shared=_shared(config, intermediate) if family.shared else 0,
        quant_method=quant.get("quant_method"),
        block=_block(quant),
    )


def _get(config: dict[str, Any], keys: Any) -> Any:
    """A list of keys: the first one that config.json has. Anything else is the value itself."""
    if not isinstance(keys, list):
        return keys
    for key in keys:
        if key in config:
            return config[key]
    raise MixMoEError("config.json must have the key", " or ".join(["none of", *keys]))


def _number(config: dict[str, Any], keys: Any, kinds: tuple[type, ...] = (int,)) -> Any:
    """What :func:`_get` finds, which must be a number of these kinds and positive."""
    value = _get(config, keys)
    if type(value) not in kinds or value <= 0:
        what = "a number" if float in kinds else "a whole number"
        raise MixMoEError(f"config.json: {' or '.join(keys)} must be {what} above 0", repr(value))
    return value


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """An object in the object; empty where it is absent or null."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise MixMoEError(f"config.json: {key} must be an object", repr(found), "{}")
    return found


def _shared(config: dict[str, Any], intermediate: int) -> int:
    """The shared expert's width, by its own key or as so many routed experts; 0 without one."""
    width, many = "shared_expert_intermediate_size", "n_shared_experts"
    if config.get(width) is not None:
        return _number(config, [width]) if config[width] != 0 else 0
    return _number(config, [many]) * intermediate if config.get(many) else 0


def _activation(config: dict[str, Any], fields: dict[str, Any]) -> Activation:
    keys = fields.get("limit")
    limit = None if _get(config, keys) is None else _number(config, keys, (int, float))
    if fields.get("activation") == "swiglu":
        return swiglu(limit, _number(config, fields["alpha"], (int, float)))
    name = config.get("hidden_act", "silu")
    if name in ("silu", "swish"):
        return silu(limit)
    if name == "gelu_pytorch_tanh":
        return gelu()
    raise MixMoEError("hidden_act in config.json", name, "silu or gelu_pytorch_tanh")


def _gating(config: dict[str, Any], family: Family) -> Gating:
    values = {key: _get(config, keys) for key, keys in family.fields["gating"].items()}
    try:
        score = Score(values.pop("score"))
    except ValueError as error:
        legal = ", ".join(s.value for s in Score)
        raise MixMoEError("unknown scoring_func in config.json", error, legal) from None
    keys = family.fields["gating"]
    for name in ("groups", "topk_groups"):  # null in the config of models without groups
        values[name] = _number(config, keys[name]) if values.get(name) else 1
    if "scale" in keys:
        _number(config, keys["scale"], (int, float))
    return Gating(score, corrected="correction" in family.router, **values)


def _block(quant: dict[str, Any]) -> tuple[int, int]:
    block = quant.get("weight_block_size")
    groups = _section(quant, "config_groups")
    for name in groups:
        block = block or _section(_section(groups, name), "weights").get("block_structure")
    match block or [128, 128]:
        case [int(rows), int(cols)] if rows > 0 and cols > 0:
            return rows, cols
    raise MixMoEError("config.json: a scale block is [rows, columns]", repr(block), "[128, 128]")
