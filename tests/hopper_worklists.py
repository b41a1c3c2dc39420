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
FEW = [(8, 512, 2), (7, 1000, 3), (256, 256, 8), (1, 40, 1), (5, 3, 1)]  # a list takes 30 ms here
SEGMENTS = [(shape, skew, 40) for shape in FEW for skew in SKEWS]
SEGMENTS += [(shape, skew, 17) for shape in FEW for skew in ("uniform", "zipf")]
SEGMENTS += [((256, 8192, 8), "uniform", 264), ((384, 8192, 8), "zipf", 264)]


def routed(experts: int, tokens: int, topk: int, skew: str) -> Routed:
    """Lists of so many routes, with only counts and offsets filled in."""
    torch.manual_seed(experts)
    routes = tokens * topk
    weight = torch.ones(experts)
    if skew == "zipf":
        weight = torch.arange(1, experts + 1).float() ** -1
    if skew == "one expert":
        weight = (torch.arange(experts) == experts // 2).float()
    ids = torch.multinomial(weight, routes, replacement=True)
    counts = ids.bincount(minlength=experts).int() * (skew != "none")
    offsets = torch.zeros(experts + 1, dtype=torch.int32)
    offsets[1:] = ((counts + 31) // 32 * 32).cumsum(0)
    problem = Problem(tokens, 64, 64, experts, topk)
    nothing = torch.zeros(problem.padded_routes(32), dtype=torch.int32)
    valid = torch.tensor([int(offsets[-1]), tokens], dtype=torch.int32)
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


@pytest.mark.parametrize("shape, skew, ctas", SEGMENTS, ids=str)
def test_segments_cover_blocks(
    shape: tuple[int, int, int], skew: str, ctas: int, dirty: None
) -> None:
    r = routed(*shape, skew)
    total, room = int(r.expert_offsets[-1]) // 32, 20
    made = worklist.segments(r, worklist.Split(ctas, room, 700))
    assert not made.counters.any()
    seen = torch.zeros(total, dtype=torch.int32)
    for mine in made.records.tolist():
        live = mine[: [record[0] for record in mine].index(-1)]
        assert sum(blocks for _, _, blocks, _ in live) <= room
        for expert, block, blocks, routes in live:
            end = int(r.expert_offsets[expert] + r.expert_counts[expert])
            assert routes == min(end, (block + blocks) * 32) - block * 32, "without padding"
            assert blocks > 0 and int(r.expert_offsets[expert]) <= block * 32
            assert (block + blocks) * 32 <= int(r.expert_offsets[expert + 1])
            seen[block : block + blocks] += 1
    assert bool((seen == 1).all())


def test_parts_are_as_short_as_the_ctas_allow() -> None:
    """40 CTAs for 16 experts of about eight blocks, none of which is as long as a CTA's room."""
    r = routed(16, 512, 8, "uniform")
    records = worklist.segments(r, worklist.Split(40, 9, 700)).records
    blocks = (r.expert_counts + 31) // 32
    longest = int((records[:, 0, 2] * (records[:, 0, 0] >= 0)).max())
    shorter, parts = (int((-(-blocks // most)).sum()) for most in (longest - 1, longest))
    assert shorter > 40 >= parts and longest < int(blocks.max()) <= 9


@pytest.mark.parametrize(
    "field, match", [((3, 0, -1), None), ((3, 3, 64), "without padding")],
    ids=["a lost block", "rows of padding"],
)  # fmt: skip
def test_cover_check_sees(
    field: tuple[int, int, int], match: str | None, monkeypatch: pytest.MonkeyPatch, dirty: None
) -> None:
    """The checks above fail when a list is short of a record, and when a field counts padding."""
    honest = worklist.segments
    cta, at, value = field

    def spoiled(*args: object) -> worklist.Segments:
        made = honest(*args)
        assert int(made.records[cta, 0, at]) != value
        made.records[cta, 0, at] = value
        return made

    monkeypatch.setattr(worklist, "segments", spoiled)
    with pytest.raises(AssertionError, match=match):
        test_segments_cover_blocks((8, 512, 2), "uniform", 16, dirty)


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
