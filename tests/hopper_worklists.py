"""The work lists of the prefill kernels, under Triton's interpreter: every route exactly once.

Run by test_hopper_prefill.py in a process of its own: `TRITON_INTERPRET=1 pytest <this file>`.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run me through test_hopper_prefill.py"

import interpreted  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from mixmoe.backends.hopper import worklist  # noqa: E402
from mixmoe.spec import Problem, Routed  # noqa: E402

interpreted.mend()
torch.set_num_threads(1)
SHAPES = [(256, 8192, 8), (8, 512, 2), (7, 1000, 3), (384, 8192, 8), (1, 40, 1), (5, 3, 1)]
SKEWS = ["uniform", "one expert", "zipf", "none"]
FEW = [(8, 512, 2), (7, 1000, 3), (90, 128, 8), (1, 40, 1), (5, 3, 1)]
# With the CTAs and the blocks that each has room for; a list takes 60 ms here. The last ones are an
# eighth of a ring of DeepSeek-V3 TP8 (T 2048, 8192), of Kimi-K2 TP8 and of Qwen3 TP4.
SEGMENTS = [(shape, skew, 20, 20) for shape in FEW for skew in SKEWS]
SEGMENTS += [(shape, skew, 6, 20) for shape in FEW for skew in ("uniform", "zipf")]
SEGMENTS += [
    (shape, skew, 33, room)
    for shape, room in [
        ((32, 256, 8), 9), ((32, 1024, 8), 9), ((48, 1024, 8), 10), ((16, 512, 8), 6),
    ]
    for skew in ("uniform", "zipf")
]


def routed(experts: int, tokens: int, topk: int, skew: str) -> Routed:
    """Lists of so many routes."""
    torch.manual_seed(experts)
    routes = tokens * topk
    weight = torch.ones(experts)
    if skew == "zipf":
        weight = torch.arange(1, experts + 1).float() ** -1
    if skew == "one expert":
        weight = (torch.arange(experts) == experts // 2).float()
    ids = torch.multinomial(weight, routes, replacement=True)
    counts = ids.bincount(minlength=experts).int() * (skew != "none")
    return counted(counts, Problem(tokens, 64, 64, experts, topk))


def counted(counts: torch.Tensor, problem: Problem) -> Routed:
    """Lists with only counts and offsets filled in."""
    offsets = torch.zeros(problem.experts + 1, dtype=torch.int32)
    offsets[1:] = ((counts + 31) // 32 * 32).cumsum(0)
    nothing = torch.zeros(problem.padded_routes(32), dtype=torch.int32)
    valid = torch.tensor([int(offsets[-1]), problem.tokens], dtype=torch.int32)
    return Routed(
        nothing, nothing.float(), nothing[::32], valid, offsets, counts.int(), 32, problem
    )


@pytest.fixture
def dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of threes, so that what is not written shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(3))


def covering(made: worklist.Tiles, r: Routed, most: int) -> torch.Tensor:
    """The list's records, which cover every route once, at most so many a tile."""
    count = int(made.count[0])
    assert count <= made.room
    records = made.records[:count]
    seen = torch.zeros(r.sorted_token_ids.shape[0], dtype=torch.int32)
    for expert, start, routes, _ in records.tolist():
        first = int(r.expert_offsets[expert])
        assert 0 < routes <= most
        assert first <= start and start + routes <= first + int(r.expert_counts[expert])
        seen[start : start + routes] += 1
    assert int(seen.sum()) == int(r.expert_counts.sum()) and int(seen.max()) <= 1
    return records


def adjacent(records: torch.Tensor) -> bool:
    """Whether the tiles of every expert follow one another."""
    return len(records[:, 0].unique_consecutive()) == len(records[:, 0].unique())


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("main, extra", [(256, 32), (128, 64)])
def test_tiles_cover_routes(
    shape: tuple[int, int, int], skew: str, main: int, extra: int
) -> None:
    r = routed(*shape, skew)
    records = covering(worklist.tiles(r, main, extra), r, main + extra)
    blocks = (records[:, 2] + 31) // 32
    assert bool((blocks[:-1] >= blocks[1:]).all()), "largest first"


@pytest.mark.parametrize("skew", ["zipf", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_of_an_expert_are_adjacent(
    shape: tuple[int, int, int], skew: str, dirty: None
) -> None:
    r = routed(*shape, skew)
    made = worklist.tiles_by_expert(r, 128, 700)
    assert adjacent(covering(made, r, 128))
    assert len(made.counters) == 700 and not made.counters.any() and int(made.count[1]) == 0


def test_counters_are_dirty_before(dirty: None) -> None:
    """Or the zeros above would prove nothing."""
    empty = worklist.Tiles.empty(routed(8, 512, 2, "zipf"), 128, 700)
    assert bool((empty.counters == 3).all())


def test_adjacency_check_sees_other_orders() -> None:
    r = routed(8, 512, 2, "zipf")
    assert not adjacent(covering(worklist.tiles(r, 128, 0), r, 128))


Lists = list[list[list[int]]]


def segments(r: Routed, ctas: int, room: int) -> Lists:
    """The records of each CTA, which cover every block once."""
    made = worklist.segments(r, worklist.Split(ctas, room, 700))
    assert not made.counters.any()
    lists = [mine[: [record[0] for record in mine].index(-1)] for mine in made.records.tolist()]
    seen = torch.zeros(int(r.expert_offsets[-1]) // 32, dtype=torch.int32)
    for mine in lists:
        assert sum(blocks for _, _, blocks, _ in mine) <= room
        for expert, block, blocks, routes in mine:
            end = int(r.expert_offsets[expert] + r.expert_counts[expert])
            assert routes == min(end, (block + blocks) * 32) - block * 32, "without padding"
            assert blocks > 0 and int(r.expert_offsets[expert]) <= block * 32
            assert (block + blocks) * 32 <= int(r.expert_offsets[expert + 1])
            seen[block : block + blocks] += 1
    assert bool((seen == 1).all()), "every block once"
    return lists


def cells(lists: Lists) -> int:
    """Of the slowest CTA: its blocks, and one more for every segment."""
    return max(sum(blocks + 1 for _, _, blocks, _ in mine) for mine in lists)


def least_cells(r: Routed, ctas: int) -> int:
    """Those of the slowest CTA if no expert were cut and all CTAs were equal."""
    return -(-int(((r.expert_counts + 31) // 32 + (r.expert_counts > 0)).sum()) // ctas)


@pytest.mark.parametrize("shape, skew, ctas, room", SEGMENTS, ids=str)
def test_segments_cover_blocks(
    shape: tuple[int, int, int], skew: str, ctas: int, room: int, dirty: None
) -> None:
    """And the slowest CTA has at most one cell more than must be, if there is room for as much."""
    r = routed(*shape, skew)
    lists, least = segments(r, ctas, room), least_cells(r, ctas)
    assert least > room or cells(lists) <= least + 1, "the slowest CTA"


@pytest.mark.parametrize(
    "shape, skew, room, least",
    [
        ((32, 1024, 8), "uniform", 9, True), ((32, 512, 8), "zipf", 9, True),
        ((16, 512, 8), "uniform", 6, False),
    ],
)  # fmt: skip
def test_rests_are_not_cut(
    shape: tuple[int, int, int], skew: str, room: int, least: bool
) -> None:
    """CTAs have whole rests, or parts of the same length, and no cell more than must be in some."""
    r = routed(*shape, skew)
    lists = segments(r, 33, room)
    longest = max(blocks for mine in lists for _, _, blocks, _ in mine)
    fewest = int((((r.expert_counts + 31) // 32 + longest - 1) // longest).sum())
    assert sum(map(len, lists)) == fewest
    assert cells(lists) == least_cells(r, 33) + (not least)


@pytest.mark.parametrize("seed", range(8))
def test_segments_fill_all_the_room(seed: int, dirty: None) -> None:
    """Experts of many sizes, whose blocks are as many as all CTAs have room for: no block is lost,
    though the cells are more."""
    torch.manual_seed(seed)
    ctas, room, experts = 3 + seed % 3, (4, 9)[seed % 2], 5 + seed
    cuts = torch.randint(0, ctas * room + 1, (experts - 1,)).sort().values
    ends = torch.tensor([0, *cuts.tolist(), ctas * room])
    r = counted(ends.diff() * 32, Problem(ctas * room * 32, 64, 64, experts, 1))
    lists = segments(r, ctas, room)
    assert all(sum(blocks for _, _, blocks, _ in mine) == room for mine in lists)


def cut_by_blocks(r: Routed, split: worklist.Split) -> worklist.Segments:
    """As many blocks a CTA, however many segments they are."""
    made = worklist.Segments.empty(split, r.expert_counts.device)
    made.counters.zero_()
    total = int(r.expert_offsets[-1]) // 32
    for cta, mine in enumerate(made.records):
        low, high = cta * total // split.ctas, (cta + 1) * total // split.ctas
        i = 0
        for expert in range(r.problem.experts):
            first, end = (int(at) // 32 for at in r.expert_offsets[expert : expert + 2])
            a, b = max(low, first), min(high, end)
            if a < b:
                last = int(r.expert_offsets[expert] + r.expert_counts[expert])
                mine[i] = torch.tensor([expert, a, b - a, min(last, b * 32) - a * 32])
                i += 1
        mine[i, 0] = -1
    return made


def test_cells_check_sees_cuts_by_blocks(monkeypatch: pytest.MonkeyPatch, dirty: None) -> None:
    """A cut that does not count segments leaves a CTA with many small experts."""
    monkeypatch.setattr(worklist, "segments", cut_by_blocks)
    with pytest.raises(AssertionError, match="the slowest CTA"):
        test_segments_cover_blocks((32, 512, 8), "zipf", 33, 9, dirty)


@pytest.mark.parametrize(
    "field, match", [((3, 0, -1), "every block once"), ((3, 3, 64), "without padding")],
    ids=["a lost block", "rows of padding"],
)  # fmt: skip
def test_cover_check_sees(
    field: tuple[int, int, int], match: str, monkeypatch: pytest.MonkeyPatch, dirty: None
) -> None:
    """The checks above fail when a list is short of a record, and when a field counts padding."""
    honest = worklist.segments
    cta, at, value = field

    def spoiled(*args: object) -> worklist.Segments:
        made = honest(*args)
        assert int(made.records[cta, 0, at]) != value, "not spoiled"
        made.records[cta, 0, at] = value
        return made

    monkeypatch.setattr(worklist, "segments", spoiled)
    with pytest.raises(AssertionError, match=match):
        test_segments_cover_blocks((8, 512, 2), "uniform", 16, 20, dirty)


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_one_launch_lists_all(shape: tuple[int, int, int], dirty: None) -> None:
    """Tiles of both stages, and tiles with segments, are those that are listed alone."""
    r, split = routed(*shape, "zipf"), worklist.Split(17, 20, 60)
    both = worklist.work_lists(r, 256, 32, 128, None, 700)
    assert both.others is not None and not both.others.counters.any()
    mixed = worklist.work_lists(r, 64, 32, 0, split)
    pairs = [
        (both.tiles, worklist.tiles(r, 256, 32)), (both.others, worklist.tiles_by_expert(r, 128)),
        (mixed.tiles, worklist.tiles(r, 64, 32)),
    ]  # fmt: skip
    for got, want in pairs:
        assert got is not None and torch.equal(got.count, want.count)
        count = int(want.count[0])
        assert torch.equal(got.records[:count, :3], want.records[:count, :3])
        assert count and int(want.count[1]) == 0, "nothing is drawn yet"
    alone = worklist.segments(r, split)
    assert mixed.segments is not None
    for mine, want in zip(mixed.segments.records.tolist(), alone.records.tolist(), strict=True):
        end = [record[0] for record in want].index(-1)
        assert mine[:end] == want[:end]
        assert mine[end][0] == -1
    assert not mixed.segments.counters.any()
