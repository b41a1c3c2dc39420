"""Schedules of the CDNA kernels: who computes which tile, how K is shared, what the chooser takes.

What only moves work (walks, cache modifiers, room for a second workgroup) must give the same bits;
what adds up in another order is judged against float64. Simulated, with hazards and races on.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("flydsl")

from cdna_cases import failures, findings, judge, simulate
from test_cdna import layer_parts, same, staged

from mixmoe import moe, prepare
from mixmoe.backends.cdna import cdna, choose, gemm1, gemm2, grid, mainloop, stages
from mixmoe.backends.cdna.atoms import E2M1, E4M3, GFX950
from mixmoe.backends.cdna.config import Gemm, RowsOut
from mixmoe.backends.cdna.grid import Walk
from mixmoe.errors import MixMoEError
from mixmoe.spec import Problem, Recipe

MOVES = {
    "fixed": {"walk": Walk(each=3)},
    "persistent": {"walk": Walk(groups=3, together=True, band=2), "streaming": True},
    "room for two": {"waves_per_eu": 2, "walk": Walk(together=True)},
    "far": {"far": True, "far_rows": True},
}
SPLITS = {
    "two waves": {"k_waves": 2},
    "four waves": {"k_waves": 4},
    "three workgroups": {"split_k": 3},
    "both": {"k_waves": 2, "split_k": 2, "walk": Walk(groups=5)},
}


def change(monkeypatch, **fields):
    """Let every tile be cut with these fields changed; split_k only in stage 1."""
    real = choose.cut

    def cut(*args):
        gemm = real(*args)
        mine = fields if gemm.halves == 2 else {k: v for k, v in fields.items() if k != "split_k"}
        return replace(gemm, **mine)

    monkeypatch.setattr(choose, "cut", cut)


@pytest.mark.parametrize(("name", "recipe"), [
    *((name, "a4w4") for name in MOVES), ("persistent", "a8w8"),
])
def test_moves_change_no_bit(monkeypatch, name, recipe):
    recipe = Recipe.named(recipe)
    parts = layer_parts(recipe, tokens=40, hidden=320, inter=160, experts=3)
    with simulate("random", seed=1) as session:
        plain = staged(recipe, parts, 16)
        change(monkeypatch, **MOVES[name])
        assert same(plain, staged(recipe, parts, 16))
    assert findings(session) == []


@pytest.mark.parametrize(("name", "recipe", "case"), [
    ("two waves", "a4w4", "tail 288 x 96"), ("four waves", "a8w4_mx", "plain"),
    ("three workgroups", "a4w4", "weight on 1"), ("both", "a8w8_mx", "bias"),
    ("two waves", "a8w8", "bias"), ("four waves", "a8w8_block", "bias"),
])
def test_shared_k_against_float64(monkeypatch, name, recipe, case):
    """K of five K tiles, the last one short: parts that end inside K and parts beyond it."""
    change(monkeypatch, **SPLITS[name])
    with simulate("reverse") as session:
        rows = judge(recipe, case, session, tokens=5, hidden=1120, experts=2, topk=2)
    assert findings(session) == [] and failures(rows) == []


def test_a_lost_part_is_seen(monkeypatch):
    change(monkeypatch, k_waves=2)
    monkeypatch.setattr(mainloop, "add_sums", lambda *args: None)
    gemm1.build.cache_clear()
    with simulate() as session:
        rows = judge("a4w4", "plain", session, tokens=3, hidden=1120, experts=2, topk=2)
    gemm1.build.cache_clear()
    gemm2.build.cache_clear()
    assert "gemm1" in {row.stage for row in failures(rows)}


# Every tile is computed once, whatever the grid.

WALKS = [
    Walk(each=each, groups=groups, together=together, band=band)
    for each, groups in ((1, 0), (4, 0), (1, 7), (1, 256))
    for together in (False, True)
    for band in (1, 3, 8)
]


def computed(walk, rows, blocks):
    """(row tile, token tile) of everything that all workgroups of a launch take."""
    tiles, out = rows * blocks, []
    for workgroup in range(walk.workgroups(tiles)):
        first, end = walk.share(workgroup, tiles)
        out += [walk.tile(number, rows, blocks) for number in range(first, end)]
    return out


def is_bijection(walk, rows, blocks):
    taken = computed(walk, rows, blocks)
    return sorted(taken) == [(r, b) for r in range(rows) for b in range(blocks)]


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.name)
def test_every_tile_once(walk):
    assert all(is_bijection(walk, r, b) for r in (1, 2, 5, 28) for b in (1, 3, 8, 9, 25, 64))


def test_the_floor_formula_loses_tiles(monkeypatch):
    """AMD aiter's remap: with a grid that is no multiple of 8 tiles are lost and repeated."""
    monkeypatch.setattr(grid, "neighbours", lambda w, n, least: w % 8 * (n // 8) + w // 8)
    assert is_bijection(Walk(together=True), 4, 24)
    assert not is_bijection(Walk(together=True), 4, 25)


def test_neighbours_share_an_xcd():
    """What one XCD runs is one row of consecutive tiles."""
    for count in (8, 100, 257):
        for xcd in range(8):
            mine = [grid.neighbours(w, count) for w in range(xcd, count, 8)]
            assert mine == list(range(mine[0], mine[0] + len(mine)))


# What the chooser takes, and what is refused.

DSV3, GPT_OSS = (7168, 256, 256, 8), (2880, 2880, 128, 4)


def chosen(shape, tokens, block, token=E2M1):
    """The cut of both GEMMs of a layer."""
    hidden, inter, experts, topk = shape
    problem = Problem(tokens, hidden, inter, experts, topk)
    return [
        choose.cut(partial(Gemm, GFX950, E2M1, token, "cdna_n16", *sizes), block, problem)
        for sizes in ((2, inter, hidden), (1, hidden, inter))
    ]


def test_chooser_prefill():
    first, second = chosen(DSV3, 8192, 128)
    assert (first.tokens, first.blocks, second.blocks, first.ring) == (128, 2, 4, 4)
    assert first.walk.together and not first.streaming and first.k_waves == 1
    assert first.waves_per_eu == 2 and first.lds_bytes <= 80 << 10
    assert chosen(DSV3, 2048, 64)[0].blocks == 4  # 64 tokens of e2m1: 512 rows
    assert chosen(DSV3, 8192, 128, E4M3)[0].waves_per_eu == 1  # LDS holds one workgroup
    assert chosen(DSV3, 8192, 96)[0].sort_tiles == 3
    assert [g.far for g in chosen(DSV3, 1 << 21, 128)] == [True, False]  # 7 GiB of x, 2 of h
    assert [g.far_rows for g in chosen(DSV3, 8192, 128)] == [False, False]
    assert [g.far_rows for g in chosen(DSV3, 1 << 15, 128)] == [False, True]  # 2 GiB of f32 rows


def test_chooser_decode():
    for tokens, waves in ((1, 4), (8, 4), (64, 1)):
        first, second = chosen(DSV3, tokens, 16)
        assert (first.tokens, first.k_waves, first.ring) == (16, waves, 8) and first.streaming
        assert second.k_waves == 1  # I = 256 is one K tile
    assert chosen(GPT_OSS, 1, 16)[0].k_waves == 2  # 12 K tiles: four parts would be 4 4 4 0
    assert not chosen(DSV3, 8, 96)[0].streaming  # weights read by several tiles


def test_chooser_long_k():
    """Scales of all K lie in LDS: fewer tokens where K is long, and a refusal where none fit."""
    assert chosen((32768, 256, 8, 2), 8192, 128, E4M3)[0].tokens == 64
    with pytest.raises(MixMoEError, match="LDS"):
        chosen((1 << 20, 256, 8, 2), 8192, 128)


@pytest.mark.parametrize("fields", [
    {"k_waves": 3}, {"split_k": 0}, {"split_k": 2}, {"walk": {"each": 0}}, {"blocks": 3},
    {"walk": {"each": 2, "groups": 4}}, {"tokens": 128, "k_waves": 4, "blocks": 8},
])
def test_schedules_that_cannot_work_are_refused(fields):
    with pytest.raises(MixMoEError):
        walk = Walk(**fields.pop("walk")) if "walk" in fields else Walk()
        Gemm(GFX950, E4M3, E4M3, "cdna_n16", 1, 7168, 2048, walk=walk, **fields)


# What stage 2 leaves.


def down_of(kind, parts, recipe, block=16):
    """(y, its weighted sum over rows in float64) with what stage 2 leaves of a kind."""
    x, weights, ids, share = parts
    backend, atoms = cdna(), GFX950
    weights = backend.prepare(weights, recipe)
    problem = Problem(len(x), weights.H, weights.I, weights.E, ids.shape[1])
    routed = backend.route(ids, share, problem, None, block)
    h = backend.gemm1(backend.quantise(x, weights, routed, recipe), weights, routed, recipe)
    y = torch.full((len(x), weights.H), float("nan"), dtype=recipe.out_dtype)
    y = stages.down(atoms, h, weights, routed, recipe, y, kind)
    rows = backend.gemm2(h, weights, routed, replace(recipe, out_dtype=torch.float32))
    factor = share if recipe.weight_on == 2 else torch.ones_like(share)
    live = torch.where(ids >= 0, factor, 0.0).double()
    wanted = (rows.double().view(*ids.shape, -1) * live[..., None]).sum(1)
    return y.double(), wanted


@pytest.mark.parametrize(("kind", "bound"), [(RowsOut.SUMS, 2**-8), (RowsOut.CODES, 2**-4)])
@pytest.mark.parametrize("weight_on", [1, 2])
def test_what_stage_2_leaves(kind, bound, weight_on):
    """The error of a row against the float64 sum of float32 rows; skipped routes add nothing."""
    recipe = Recipe.named("a4w4", weight_on=weight_on)
    x, weights, ids, share = layer_parts(recipe, tokens=21, experts=3)
    weights = replace(weights, w2_bias=torch.randn(3, weights.H))
    ids[::4, 1] = -1
    with simulate("random", seed=2) as session:
        y, wanted = down_of(kind, (x, weights, ids, share), recipe)
    assert findings(session) == []
    assert ((y - wanted).norm(dim=1) <= bound * wanted.norm(dim=1)).all()


def test_a_forgotten_weight_is_seen(monkeypatch):
    real = gemm2.build
    monkeypatch.setattr(gemm2, "build", lambda *args: real(*args[:-1], False))
    recipe = Recipe.named("a4w4")
    with simulate():
        y, wanted = down_of(RowsOut.SUMS, layer_parts(recipe, tokens=4), recipe)
    assert ((y - wanted).norm(dim=1) > 2**-4 * wanted.norm(dim=1)).any()


def test_the_door_without_determinism():
    """The public door adds atomically where it may, and says nearly the same."""
    recipe = Recipe.named("a4w4")
    x, weights, ids, share = layer_parts(recipe, tokens=6)
    with simulate() as session:
        packed = prepare(weights, recipe, backend="cdna")
        plain, added = (
            moe(x, packed, ids, share, recipe=recipe, backend="cdna", deterministic=free)
            for free in (True, False)
        )
    assert findings(session) == [] and any("sums" in launch.name for launch in session.launches)
    assert ((plain - added).double().norm(dim=1) <= 2**-7 * plain.double().norm(dim=1)).all()


def test_atomics_only_where_order_is_free():
    few, many = Problem(8, *DSV3), Problem(8192, *DSV3)
    assert choose.rows_for(few, 16, deterministic=True) is RowsOut.ROWS
    assert choose.rows_for(few, 16, deterministic=False) is RowsOut.SUMS
    assert choose.rows_for(many, 128, deterministic=False) is RowsOut.ROWS
