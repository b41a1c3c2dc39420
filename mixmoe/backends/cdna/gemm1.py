"""Stage 1: ``h[route] = quantise(act(x Wg^T + bg, x Wu^T + bu))``, a row per route.

A wave owns 32 columns of h: two 16-row blocks of gate and the two of up that belong to them. So a
lane holds gate and up of the same four columns of one token, and the 32 values of an MX block lie
in the four lanes that share a token: its maximum is two lane exchanges away. Codes and scales go
where stage 2 reads them, in plain rows. Where h has one scale a row it is written in float32, from
which a second kernel makes its codes: the maximum is known when every workgroup of the row is done.
"""

from dataclasses import dataclass, replace
from functools import cache, partial

import flydsl.compiler as flyc
import flydsl.expr as fx

from mixmoe.activations import ActivationKind
from mixmoe.backends.cdna import arguments, grid, mainloop, results
from mixmoe.backends.cdna.activate import Scalars, activate
from mixmoe.backends.cdna.arguments import Routes, Sources
from mixmoe.backends.cdna.atoms import MFMA_ROWS
from mixmoe.backends.cdna.config import THREADS, Gemm
from mixmoe.backends.cdna.mainloop import held, inside
from mixmoe.backends.cdna.prebuilt import launcher
from mixmoe.backends.cdna.quantise import MANTISSA, block_max, encode, scale_bits, stagger
from mixmoe.backends.cdna.results import QUAD, Lines, Quads, Target
from mixmoe.backends.cdna.tokens import Ids, shared_storage
from mixmoe.backends.cdna.work import at_hand, tiles_of, work_of
from mixmoe.formats import Rounding


def gate_up(sums, block: int, group: int) -> list[fx.Vector]:
    """Four columns of gate and of up of one token."""
    return [sums.of(half, block, group) for half in range(2)]


def add_bias(values: list[fx.Vector], bias: fx.Tensor, gate_at, rows: int) -> list[fx.Vector]:
    """Gate and up with their biases; the up bias lies ``rows`` after the gate's."""
    return [v + mainloop.row_bias(bias, gate_at + i * rows) for i, v in enumerate(values)]


@dataclass(frozen=True, slots=True)
class Stage1:
    """What a kernel is compiled for; ``weighted`` multiplies h by the routing weight, ``limited``
    clamps gate and up. h takes the tokens' format where that scales blocks, else float32; with
    split_k the sums of gate and up go to memory as they are."""

    cfg: Gemm
    kind: ActivationKind
    rounding: Rounding
    bias: bool
    weighted: bool
    limited: bool

    @property
    def name(self) -> str:
        """The kernel's name."""
        flags = f"{self.bias:d}{self.weighted:d}{self.limited:d}"
        return f"gemm1_{self.cfg.name}_{self.kind.value}_{self.rounding.value}_{flags}"


@dataclass(frozen=True, slots=True)
class Arguments(arguments.Arguments):
    """``out`` is h; its scales, and the activation's scalars."""

    h_scales: fx.Tensor
    scalars: Scalars


@flyc.jit
def compute(spec: Stage1, args: Arguments, lds, number) -> None:
    """One piece of work."""
    cfg, routes = spec.cfg, args.routes
    work = work_of(cfg, number, routes)
    # 1. Which tokens: padding reads row 0 and writes nothing
    bits = cfg.token.bits if fx.const_expr(cfg.token.block) else 32
    rows = mainloop.Rows(routes.ids, work.routes, routes.tokens, spread=routes.topk)
    rows = replace(rows, **results.places(cfg, bits))
    ids = Ids(cfg, rows)
    if work.used & at_hand(args):
        # 2. Multiply
        place = mainloop.stand(cfg, work)
        first = mainloop.first_block(cfg, place, work)
        sums = mainloop.multiply_all(cfg, place, lds, args.sources, rows, ids, first)

        # 3. What comes of it
        store = store_of(cfg)
        if fx.const_expr(cfg.k_waves > 1):
            if place.part == 0:
                store(spec, args, lds, work, place, sums, first)
        else:
            store(spec, args, lds, work, place, sums, first)


def store_of(cfg: Gemm):
    """What a launch leaves."""
    if cfg.split_k > 1:
        return store_sums
    return store_codes if cfg.token.block else store_floats


def activated(spec: Stage1, args: Arguments, place, sums, block: int, group: int, column):
    """Four columns of h, the first of the 16 in memory order at ``column``."""
    gate, up = gate_up(sums, block, group)
    if spec.bias:
        row = place.expert * 2 * spec.cfg.rows + column
        gate, up = add_bias([gate, up], args.bias, row + place.g * 4, spec.cfg.rows)
    return activate(spec.kind, args.scalars, gate, up, spec.limited)


def shares_of(spec: Stage1, args: Arguments, work, place) -> list | None:
    """Routing weights of a lane's tokens, where h is multiplied by them."""
    if not spec.weighted:
        return None
    column = mainloop.of_groups(spec.cfg, work, place, args.routes.weights)
    return [fx.Float32(share) for share in column]


def store_floats(spec: Stage1, args: Arguments, lds, work, place, sums, first) -> None:
    """Activate and store four columns of one route."""
    cfg, h = spec.cfg, Target(spec.cfg, args.out, columns=1, elements=QUAD)
    routes, shares = sums.places.of_groups(place), shares_of(spec, args, work, place)
    for group in range(cfg.groups):
        for block in range(cfg.blocks):
            column = (first + block) * MFMA_ROWS
            value = activated(spec, args, place, sums, block, group, held(cfg, column))
            value = value * shares[group] if shares else value
            h.put(routes[group], h.within(column, place.g * QUAD), column, value)


def store_codes(spec: Stage1, args: Arguments, lds, work, place, sums, first) -> None:
    """Activate, quantise and store blocks of 32 columns of one route, in turn: while the maximum
    of one goes round its lanes the next is activated."""
    cfg = spec.cfg
    shares, pairs = shares_of(spec, args, work, place), range(cfg.blocks // 2)
    kind, where = (Lines, lds) if cfg.lines else (Quads, first)
    out = kind(cfg, place, where, args.out, args.h_scales)
    out.open(sums.places)

    def steps(group: int, pair: int):
        both = [
            activated(spec, args, place, sums, block, group, held(cfg, (first + block) * MFMA_ROWS))
            for block in (2 * pair, 2 * pair + 1)
        ]
        both = [value * shares[group] for value in both] if shares else both
        top = yield from block_max(both)
        bits = scale_bits(cfg.token, top, spec.rounding)
        for b, values in enumerate(both):
            out.write(group, 2 * pair + b, encode(cfg.token, values, bits).to(out.h.type))
        out.write_scale(group, pair, (bits >> MANTISSA).to(fx.Uint8))

    stagger(steps(group, pair) for group in range(cfg.groups) for pair in pairs)
    out.close(sums.places, work.rows * cfg.tile_rows)


@flyc.jit
def store_sums(spec: Stage1, args: Arguments, lds, work, place, sums, first) -> None:
    """float32 sums of gate and up over a part of K: ``h (split_k, P, 2 I)`` by sorted position."""
    cfg = spec.cfg
    quad = fx.make_copy_atom(fx.UniversalCopy128b(), fx.Float32)
    positions = fx.Int64(args.routes.tiles * cfg.tokens)
    for group in fx.range_constexpr(cfg.groups):
        at = work.routes + group * MFMA_ROWS + place.r
        row = (fx.Int64(work.split) * positions + at) * (2 * cfg.rows)
        for block in fx.range_constexpr(cfg.blocks):
            column = (first + block) * MFMA_ROWS
            if inside(cfg, column):
                for half in fx.range_constexpr(2):
                    out = row + (half * cfg.rows + column + place.g * 4)
                    dest = (fx.get_iter(args.out) + out).view(fx.make_layout(4, 1))
                    fx.copy(quad, sums.acc[half, block, group], dest)


@cache
def build(cfg: Gemm, kind: ActivationKind, rounding: Rounding, bias: bool, weighted: bool,
          limited: bool):
    """The launcher for one GEMM shape, activation and rounding."""
    spec = Stage1(cfg, kind, rounding, bias, weighted, limited)
    variant = spec.name

    @flyc.kernel(name=variant)
    def gemm1_kernel(
        h: fx.Tensor,  # (R, I) codes, four an item; or f32; or sums
        h_scales: fx.Tensor,  # (R, I / 32)
        x: fx.Tensor,  # (T, H) codes as words
        x_scales: fx.Tensor,  # (T, H / 32), or (T) f32
        codes: fx.Tensor,  # (E, ...) words
        scales: fx.Tensor,  # (E, ...) words, or (E, 2 I) f32
        bias_rows: fx.Tensor,  # (E, 2 I) f32, gate then up
        sorted_ids: fx.Tensor,
        sorted_weights: fx.Tensor,
        expert_ids: fx.Tensor,
        tokens: fx.Int32,
        topk: fx.Int32,
        limit: fx.Float32,
        alpha: fx.Float32,
        beta: fx.Float32,
        beta2: fx.Float32,
        token_tiles: fx.Int32,
    ):
        lds = fx.SharedAllocator().allocate(shared_storage(cfg)).peek()
        sources = Sources(codes, scales, x, x_scales)
        routes = Routes(sorted_ids, expert_ids, tokens, topk, token_tiles, sorted_weights)
        scalars = Scalars(limit, alpha, beta, beta2)
        args = Arguments(h, sources, bias_rows, routes, h_scales, scalars)
        each = partial(compute, spec, args, lds)
        grid.over(cfg.walk, tiles_of(cfg, token_tiles), each)

    @flyc.jit
    def launch(
        h: fx.Tensor,
        h_scales: fx.Tensor,
        x: fx.Tensor,
        x_scales: fx.Tensor,
        codes: fx.Tensor,
        scales: fx.Tensor,
        bias_rows: fx.Tensor,
        sorted_ids: fx.Tensor,
        sorted_weights: fx.Tensor,
        expert_ids: fx.Tensor,
        tokens: fx.Int32,
        topk: fx.Int32,
        limit: fx.Float32,
        alpha: fx.Float32,
        beta: fx.Float32,
        beta2: fx.Float32,
        token_tiles: fx.Int32,
        groups: fx.Int32,
        name: fx.Constexpr[str],
        stream: fx.Stream,
    ):
        gemm1_kernel(
            h, h_scales, x, x_scales, codes, scales, bias_rows, sorted_ids, sorted_weights,
            expert_ids, tokens, topk, limit, alpha, beta, beta2, token_tiles,
        ).launch(grid=(groups, 1, 1), block=(THREADS, 1, 1), stream=stream)

    return launcher(variant, launch, mainloop.hints(cfg))
