"""One MoE layer of an open checkpoint: which tensors it has, and what they mean."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from mixmoe.checkpoint.config import Family, Layout, MoEConfig, Rows, refused_suffixes, roots
from mixmoe.checkpoint.matrix import FLOATS, Matrix, as_bytes, interpret, stored_shape
from mixmoe.checkpoint.store import Store
from mixmoe.errors import MixMoEError
from mixmoe.formats import Format

Suffixes = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One MoE layer of a checkpoint: its number, sizes, the format it is stored in, its names.

    Layers numbered from ``MoEConfig.layers`` up are multi-token-prediction layers.
    """

    layer: int
    model_type: str
    experts: int
    hidden: int
    intermediate: int
    format: str
    layout: str


class Layer:
    """Finds the tensors of an expert by the family's names and says what they are.

    ``prefix`` is the path of the MoE block; ``layout`` and ``suffixes`` are the names found there,
    ``format`` is what expert 0 is stored in.
    """

    def __init__(
        self, store: Store, config: MoEConfig, family: Family, number: int, prefix: str
    ) -> None:
        self.store, self.config, self.family = store, config, family
        self.number, self.prefix = number, prefix
        self.layout, self.suffixes = self._routed_layout()
        self._check_count()
        self.format = self._projection(self.layout, self.suffixes, "gate", 0).format

    def _routed_layout(self) -> tuple[Layout, Suffixes]:
        hits = [
            (layout, suffixes)
            for layout in self.family.layouts
            for suffixes in layout.stores
            if self._holds(layout, suffixes)
        ]
        if not hits:
            self.store.entry(self._name(self.family.layouts[0], "gate", 0) + ".weight")
        return next((hit for hit in hits if self._fits(*hit)), hits[0])

    def _check_count(self) -> None:
        """Refuse more experts than config.json has; one too few is missed under its name, and a
        fused tensor by its shape."""
        known = self.config.experts

        def stored(expert: int) -> str:
            return self._name(self.layout, "down", expert) + self.suffixes[0]

        if not self.layout.fused and stored(known) in self.store:
            held = next(n for n in count(known) if stored(n) not in self.store)
            rule = f"config.json must count every expert, and the files hold {stored(known)}"
            raise MixMoEError(rule, known, held)

    def _holds(self, layout: Layout, suffixes: Suffixes) -> bool:
        """Whether these names occur: any projection of the first two experts will do, so that one
        that is missing is reported under its own name."""
        for part in ("gate", "up", "down"):
            for expert in (0, 1):
                name = self._name(layout, part, expert)
                for suffix, scheme in refused_suffixes().items():
                    if name + suffix in self.store:
                        raise MixMoEError(
                            f"{name}: this storage is not supported", f"{scheme}, {suffix}"
                        )
                if all(name + s in self.store for s in suffixes if s is not None):
                    return True
        return False

    def _fits(self, layout: Layout, suffixes: Suffixes) -> bool:
        """Whether the down projection is oriented as the layout says (it differs in no more)."""
        if not layout.fused or suffixes[0] == "_blocks":
            return True
        entry = self.store.entry(self._name(layout, "down", 0) + suffixes[0])
        shapes = (self.config.hidden, self.config.intermediate)
        if shapes[0] == shapes[1]:
            entry = self.store.entry(self._name(layout, "gate", 0) + suffixes[0])
            shapes = (2 * self.config.intermediate, self.config.hidden)
        return entry.shape[-2:] == (shapes[::-1] if layout.transposed else shapes)

    def _name(self, layout: Layout, part: str, expert: int) -> str:
        return f"{self.prefix}.{getattr(layout, part).format(expert=expert)}"

    def _projection(
        self, layout: Layout, suffixes: Suffixes, part: str, expert: int, inner: int = 0
    ) -> Matrix:
        """The stored tensor of a projection as a matrix of all its rows, gate and up together."""
        inner = inner or self.config.intermediate
        joint = layout.rows is not Rows.SEPARATE and part != "down"
        shape = (self.config.hidden, inner) if part == "down" else (inner, self.config.hidden)
        if joint:
            shape = (2 * shape[0], shape[1])
        name = self._name(layout, part, expert)
        entry = self.store.entry(name + suffixes[0])
        scale_entry = None if suffixes[1] is None else self.store.entry(name + suffixes[1])
        fmt, flip = interpret(entry, scale_entry, shape, self.config.block)
        want: tuple[int, ...] = stored_shape(entry, fmt, shape)
        if suffixes[0] == "_blocks":
            want = (want[0], want[1] // 16, 16)
        want = want[::-1] if layout.transposed else want
        want = (self.config.experts, *want) if layout.fused else want
        if entry.shape != want:
            raise MixMoEError(f"{entry.name} must have shape {want}", entry.shape)
        self._check_shape_tensor(name, shape)
        codes = self.store.tensor(entry.name)
        scales = None if scale_entry is None else self.store.tensor(scale_entry.name)
        if layout.fused:
            codes = codes[expert]
            scales = scales[expert] if scales is not None and scales.dim() else scales
        codes = codes.flatten(1) if suffixes[0] == "_blocks" else codes
        codes = codes.T if layout.transposed else codes
        if scales is not None and scales.dim() < 2:
            scales = scales.reshape(-1, 1).expand(shape[0], 1)
        label = entry.name if scale_entry is None else scale_entry.name
        return Matrix(entry.name, label, as_bytes(codes, fmt), scales, fmt, flip)

    def _check_shape_tensor(self, name: str, shape: tuple[int, int]) -> None:
        shape_name = f"{name}.weight_shape"
        if shape_name in self.store:
            stored = tuple(self.store.tensor(shape_name).flatten().tolist())
            if stored != shape:
                raise MixMoEError(f"{shape_name} must hold {shape}", stored)

    def expert(self, number: int) -> tuple[Matrix, Matrix, Matrix]:
        """Gate, up ``(I, H)`` and down ``(H, I)`` of a routed expert."""
        if self.layout.rows is Rows.SEPARATE:
            return self._separate(self.layout, self.suffixes, number, 0)
        joint = self._projection(self.layout, self.suffixes, "gate", number)
        down = self._projection(self.layout, self.suffixes, "down", number)
        gate, up = (joint.part(rows) for rows in self.halves())
        return gate, up, down

    def shared(self) -> tuple[Matrix, Matrix, Matrix]:
        """Gate, up and down of the shared expert, ``MoEConfig.shared`` wide."""
        layout = self.family.shared
        if layout is None:
            raise MixMoEError("the model must have a shared expert", self.config.model_type)
        suffixes = next((s for s in layout.stores if self._holds(layout, s)), layout.stores[-1])
        return self._separate(layout, suffixes, 0, self.config.shared)

    def _separate(
        self, layout: Layout, suffixes: Suffixes, expert: int, inner: int
    ) -> tuple[Matrix, Matrix, Matrix]:
        gate, up, down = (
            self._projection(layout, suffixes, part, expert, inner)
            for part in ("gate", "up", "down")
        )
        return gate, up, down

    def halves(self) -> tuple[slice, slice]:
        """Rows of gate and of up in a tensor that holds both."""
        inner = self.config.intermediate
        if self.layout.rows is Rows.HALVES:
            return slice(0, inner), slice(inner, 2 * inner)
        return slice(0, 2 * inner, 2), slice(1, 2 * inner, 2)

    def edges(self, fmt: Format) -> tuple[int, ...]:
        """Row counts that a block of gate or up must divide because of how the two are stored."""
        if self.layout.rows is Rows.INTERLEAVED and fmt.rows > 1:
            return self.config.intermediate, fmt.rows // 2
        return (self.config.intermediate,)

    def bias(self, part: str, experts: Sequence[int]) -> Tensor | None:
        """Biases ``(experts, 2I)`` in float32, gate then up, or ``(experts, H)``; None without."""
        if self.layout.bias is None:
            return None
        width = self.config.hidden if part == "down" else 2 * self.config.intermediate
        rows = []
        for expert in experts:
            entry = self.store.entry(self._name(self.layout, part, expert) + self.layout.bias)
            want = (self.config.experts, width) if self.layout.fused else (width,)
            if entry.shape != want or entry.dtype not in FLOATS:
                raise MixMoEError(
                    f"{entry.name} must be a float of shape {want}", f"{entry.dtype} {entry.shape}"
                )
            stored = self.store.tensor(entry.name)
            rows.append(stored[expert] if self.layout.fused else stored)
            if not torch.isfinite(rows[-1]).all():
                raise MixMoEError(f"{entry.name}: biases must be finite", f"expert {expert}")
        joined = torch.stack(rows).to(torch.float32)
        return joined if part == "down" else torch.cat([joined[:, s] for s in self.halves()], 1)

    @property
    def info(self) -> LayerInfo:
        """What :func:`mixmoe.checkpoint.layers` lists."""
        c = self.config
        sizes = (c.experts, c.hidden, c.intermediate)
        names = (self.format.name, self.layout.name)
        return LayerInfo(self.number, c.model_type, *sizes, *names)


def moe_blocks(store: Store, family: Family) -> dict[int, str]:
    """Layer number -> path of its MoE block, for every layer that has experts."""
    paths = "|".join(re.escape(f"{root}.") if root else "" for root in roots())
    block = re.compile(rf"((?:{paths})layers\.(\d+)\.{re.escape(family.block)})\.experts\.")
    found = (block.match(name) for name in store.names)
    return dict(sorted({int(m[2]): m[1] for m in found if m}.items()))
