"""safetensors -> Weights: one expert at a time, one tensor-parallel shard at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm
from operator import index
from pathlib import Path

import torch
from torch import Tensor

from mixmoe.checkpoint.config import family_of, moe_config
from mixmoe.checkpoint.layer import Layer, LayerInfo, moe_blocks
from mixmoe.checkpoint.matrix import FLOAT32, Matrix, empty, shard_format
from mixmoe.checkpoint.store import Store
from mixmoe.errors import MixMoEError
from mixmoe.formats import Format, Quantised, format_named
from mixmoe.spec import PAIRS, SCALE_BLOCK, Weights

Projections = tuple[Matrix, Matrix, Matrix]


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """The tensors that score experts, as stored: ``weight (E, H)``, ``bias (E,)`` of the logits,
    ``correction (E,)`` added to the scores for the choice alone, ``shared_gate (1, H)`` whose
    sigmoid weighs the shared expert; None where the model has none.
    """

    weight: Tensor
    bias: Tensor | None = None
    correction: Tensor | None = None
    shared_gate: Tensor | None = None

    def logits(self, x: Tensor) -> Tensor:
        """``x weight^T + bias`` in float32, (T, E) of x (T, H): what :meth:`Gating.choose` takes.

        Whatever x and the tensors are stored in: a choice of experts hangs on the last bits.
        """
        if x.shape[-1:] != self.weight.shape[1:]:
            columns = self.weight.shape[1]
            raise MixMoEError("x must have the router's H columns", tuple(x.shape), columns)
        bias = None if self.bias is None else self.bias.float()
        return torch.nn.functional.linear(x.float(), self.weight.float(), bias)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a caller asked of a load, apart from folder and layer; see :func:`load_layer`."""

    shard: tuple[int, int] = (0, 1)
    format: Format | None = None  # a name becomes the Format
    device: torch.device | str = "cpu"
    progress: bool = False
    shared_expert: bool = False
    experts: Sequence[int] | None = None
    uneven: bool = False

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        shard = _integers(self.shard)
        if shard is None or len(shard) != 2 or not 0 <= shard[0] < shard[1]:
            raise MixMoEError("shard is (r, n) with 0 <= r < n", self.shard, "(0, 1)")
        set_field(self, "shard", shard)
        if self.experts is not None:
            experts = _integers(self.experts)
            if not experts:
                raise MixMoEError("experts is a sequence of numbers", self.experts, "range(0, 8)")
            set_field(self, "experts", experts)
        if self.format is not None:
            set_field(self, "format", format_named(self.format))
        require_device(self.device)
        legal = sorted({family for families in PAIRS.values() for family in families})
        if self.format is not None and self.format.family not in legal:
            raise MixMoEError("not a format for weights", self.format.name, ", ".join(legal))


def _integers(values: object) -> tuple[int, ...] | None:
    """The integers of a sequence; None for what is none."""
    try:
        return tuple(map(index, values))  # type: ignore[call-overload]
    except TypeError:
        return None


def require_device(device: torch.device | str) -> None:
    """Refuse a device that torch does not know or cannot use here, before anything is read."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).splitlines()[0]
        raise MixMoEError("torch must have the device", f"{device}: {reason}", "cpu") from None


def load_layer(
    folder: str | Path,
    layer: int,
    *,
    shard: tuple[int, int] = (0, 1),
    format: Format | str | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
    shared_expert: bool = False,
    experts: Sequence[int] | None = None,
    uneven: bool = False,
) -> Weights:
    """Load the experts of one MoE layer: ``w13 (E, 2I/n, H)`` gate above up, ``w2 (E, H, I/n)``.

    Values are exactly the checkpoint's, in its own format, unless ``format`` names another: then
    each expert goes through float32 and is quantised anew (whole-row scales of w2 are then those of
    the shard's columns).

    ``shard=(r, n)`` keeps rows ``r I/n : (r+1) I/n`` of gate and of up and the same columns of w2,
    scales included; the n results add up to the layer. ``I/n`` must be a multiple of 32 and of the
    scale group; ``uneven`` allows shares of whole groups that differ by one group instead.
    fp8 blocks that a shard's edge cuts become smaller blocks with the same scale. ``w13_bias`` is
    cut like w13; ``w2_bias`` is on shard 0 alone (None elsewhere), so the sum counts it once.

    ``experts`` keeps these routed experts in this order (expert parallelism). ``shared_expert``
    appends the model's shared expert as expert E; one that is m times as wide as a routed expert is
    appended as m experts E..E+m-1 that add up to it.

    Reads the mapped files expert by expert: beside the result at most one expert is held. Raises
    MixMoEError, naming the tensor, for a missing, truncated, misshapen or non-finite one.
    """
    choice = Choice(shard, format, device, progress, shared_expert, experts, uneven)  # type: ignore[arg-type]
    return _load(Opened(folder)(layer), choice)


def iter_layers(folder: str | Path, **options: object) -> Iterator[tuple[int, Weights]]:
    """``(layer, Weights)`` for every MoE layer in turn; options as for :func:`load_layer`."""
    choice = Choice(**options)  # type: ignore[arg-type]
    opened = Opened(folder)
    for number in opened.blocks:
        yield number, _load(opened(number), choice)


def layers(folder: str | Path) -> list[LayerInfo]:
    """Every MoE layer of a checkpoint with its sizes and storage; reads headers alone."""
    opened = Opened(folder)
    return [opened(number).info for number in opened.blocks]


def detect(folder: str | Path) -> LayerInfo:
    """The first MoE layer; MixMoEError when the folder is no checkpoint this library reads."""
    opened = Opened(folder)
    return opened(next(iter(opened.blocks))).info


def load_router(folder: str | Path, layer: int, device: torch.device | str = "cpu") -> Router:
    """The router of one MoE layer, tensors as stored."""
    require_device(device)
    found = Opened(folder)(layer)
    names = {key: f"{found.prefix}.{name}" for key, name in found.family.router.items()}
    optional = {"shared_gate": found.config.shared == 0, "correction": True}
    kept = {k: n for k, n in names.items() if n in found.store or not optional.get(k, False)}
    return Router(**{k: found.store.tensor(n).clone().to(device) for k, n in kept.items()})


class Opened:
    """A folder's files, configuration and MoE layer numbers; call it with a number for a Layer."""

    def __init__(self, folder: str | Path) -> None:
        self.family, _ = family_of(folder)
        self.config = moe_config(folder)
        self.store = Store(folder)
        self.blocks = moe_blocks(self.store, self.family)
        if not self.blocks:
            raise MixMoEError("the checkpoint must hold MoE layers", f"none in {folder}")

    def __call__(self, number: int) -> Layer:
        if number not in self.blocks:
            legal = f"one of {', '.join(map(str, self.blocks))}"
            raise MixMoEError(
                f"layer must be a MoE layer of {self.store.folder.name}", number, legal
            )
        return Layer(self.store, self.config, self.family, number, self.blocks[number])


def _load(layer: Layer, choice: Choice) -> Weights:
    config = layer.config
    chosen = range(config.experts) if choice.experts is None else choice.experts
    for expert in chosen:
        if not 0 <= expert < config.experts:
            raise MixMoEError(f"experts must lie in 0..{config.experts - 1}", expert)
    copies = _shared_copies(layer) if choice.shared_expert else 0
    span = _span(layer, choice)
    target13, target2 = _targets(layer, choice, span)
    total, width = len(chosen) + copies, span.stop - span.start
    w13 = empty((total, 2 * width, config.hidden), target13, choice.device)
    w2 = empty((total, config.hidden, width), target2, choice.device)
    with _bar(layer, choice, w13.nbytes + w2.nbytes) as advance:
        for slot, expert in enumerate(chosen):
            _place(layer.expert(expert), layer, choice, span, w13[slot], w2[slot])
            layer.store.release()
            advance((w13.nbytes + w2.nbytes) // total)
        for copy in range(copies):
            start = copy * config.intermediate
            part = slice(start + span.start, start + span.stop)
            slot = len(chosen) + copy
            _place(layer.shared(), layer, choice, part, w13[slot], w2[slot])
            advance((w13.nbytes + w2.nbytes) // total)
    layer.store.release()
    return Weights(w13, w2, *_biases(layer, choice, chosen, span))


def _shared_copies(layer: Layer) -> int:
    wide, inner = layer.config.shared, layer.config.intermediate
    if not wide:
        raise MixMoEError("shared_expert=True takes a model with a shared expert", "none")
    if wide % inner:
        raise MixMoEError(
            "a shared expert is appended when its width is a multiple of I", wide, inner
        )
    return wide // inner


def _span(layer: Layer, choice: Choice) -> slice:
    """This shard's part of I. A cut may fall only where w2's scale groups end."""
    (rank, ranks), inner = choice.shard, layer.config.intermediate
    formats = [layer.format] + ([choice.format] if choice.format else [])
    step = lcm(SCALE_BLOCK, *(f.cols for f in formats if f.rows == 1 and f.cols))
    groups, rest = divmod(inner, step)
    if rest == 0 and (groups % ranks == 0 or (choice.uneven and ranks <= groups)):
        return slice(groups * rank // ranks * step, groups * (rank + 1) // ranks * step)
    legal = [n for n in range(1, groups + 1) if rest == 0 and groups % n == 0]
    below = [n for n in legal if n < ranks][-1:]
    above = [n for n in legal if n > ranks][:1]
    nearest = " or ".join(f"n = {n}" for n in below + above)
    names = " -> ".join(f.name for f in formats)
    raise MixMoEError(
        f"I/n must be a multiple of {step} to shard {names}",
        f"{inner}/{ranks}",
        f"{nearest}, or uneven=True" if rest == 0 and ranks <= groups else nearest or None,
    )


def _targets(layer: Layer, choice: Choice, span: slice) -> tuple[Format, Format]:
    if choice.format is not None and choice.format != layer.format:
        return choice.format, choice.format
    if layer.format == FLOAT32:
        raise MixMoEError(
            f"a float32 checkpoint is loaded with format=, {layer.prefix}", "None", "bf16"
        )
    return _cut_formats(layer.format, layer, span)


def _cut_formats(fmt: Format, layer: Layer, span: slice) -> tuple[Format, Format]:
    """Formats of the shard's w13 and w2 when the stored scales are kept."""
    edges = (span.start, span.stop, *layer.edges(fmt))
    return shard_format(fmt, edges, 1), shard_format(fmt, edges, 2)


def _place(
    found: Projections, layer: Layer, choice: Choice, span: slice, w13: Quantised, w2: Quantised
) -> None:
    """Write one expert's shard into its place: the stored bytes, or converted ones if asked to."""
    odd = next((m for m in found if m.format != layer.format), None)
    if choice.format is not None and (odd is not None or choice.format != layer.format):
        _convert(found, layer, span, w13, w2)
    elif odd is None:
        _keep(found, layer, span, w13, w2)
    else:
        raise MixMoEError(
            f"{odd.name} must be stored as {layer.format} like expert 0 of the layer "
            "(format= converts mixed storage)",
            odd.format,
        )


def _keep(found: Projections, layer: Layer, span: slice, w13: Quantised, w2: Quantised) -> None:
    """Copy codes and scales."""
    gate, up, down = found
    size, across = span.stop - span.start, slice(0, layer.config.hidden)
    for half, m in enumerate((gate, up)):
        m.copy_codes(span, across, w13.codes[half * size : (half + 1) * size])
        if w13.scales is not None:
            blocks = size // w13.format.rows
            place = w13.scales[half * blocks : (half + 1) * blocks]
            m.copy_scales(span, across, w13.format, place)
    down.copy_codes(across, span, w2.codes)
    if w2.scales is not None:
        down.copy_scales(across, span, w2.format, w2.scales)


def _convert(found: Projections, layer: Layer, span: slice, w13: Quantised, w2: Quantised) -> None:
    """Dequantise, and quantise again."""
    gate, up, down = found
    across = slice(0, layer.config.hidden)
    halves = [
        m.cut(span, across, _cut_formats(m.format, layer, span)[0]).dequantise() for m in (gate, up)
    ]
    target = _cut_formats(down.format, layer, span)[1]
    dense = (torch.cat(halves), down.cut(across, span, target).dequantise())
    for matrix, place in zip(dense, (w13, w2), strict=True):
        made = place.format.quantise(matrix)
        place.codes.copy_(made.codes)
        if place.scales is not None and made.scales is not None:
            place.scales.copy_(made.scales)


def _biases(
    layer: Layer, choice: Choice, chosen: Sequence[int], span: slice
) -> tuple[Tensor | None, Tensor | None]:
    w13, w2 = layer.bias("gate", chosen), layer.bias("down", chosen)
    if w13 is not None:
        inner = layer.config.intermediate
        w13 = torch.cat([w13[:, span], w13[:, inner + span.start : inner + span.stop]], 1)
        w13 = w13.to(choice.device)
    return w13, w2.to(choice.device) if w2 is not None and choice.shard[0] == 0 else None


@contextmanager
def _bar(layer: Layer, choice: Choice, total: int) -> Iterator[Callable[[int], object]]:
    """A callback that counts bytes, drawn by rich when a progress bar was asked for."""
    if not choice.progress:
        yield lambda count: None
        return
    try:
        from rich import progress
    except ImportError:
        raise MixMoEError(
            "progress=True needs rich", "not installed", "pip install '.[checkpoint]'"
        ) from None
    columns = (*progress.Progress.get_default_columns(), progress.DownloadColumn())
    with progress.Progress(*columns, progress.TransferSpeedColumn()) as bar:
        task = bar.add_task(f"layer {layer.number} ({layer.format})", total=total)
        yield lambda count: bar.advance(task, count)
