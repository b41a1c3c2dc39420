"""The rings of decode and prefill, played through on paper: no deadlock and nothing stale.

Neither a compiler nor Triton's interpreter runs warp-specialised kernels on the CPU, and a GPU
shows a wrong wait only when the timing is bad. So the roles' waits and arrivals are restated here,
as the kernels make them, with the mbarrier of the PTX ISA (phase, arrivals, bytes under way), and
stepped in random order; TMA lands late and in any order. Every read is compared with what it
should be.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hopper_mbarrier import Barrier, Role

from mixmoe.backends.hopper import choose
from mixmoe.backends.hopper.prefill_cut import Cut
from mixmoe.spec import Problem, Tile


@dataclass
class Ring:
    """Stages with their barriers, what lies in each, and copies under way."""

    stages: int
    full: list[Barrier]
    empty: list[Barrier]
    weights: list[object] = field(default_factory=list)
    rows: list[object] = field(default_factory=list)
    copies: list[Callable[[], None]] = field(default_factory=list)

    @classmethod
    def of(cls, stages: int, filled_by: int, read_by: int) -> "Ring":
        return cls(
            stages, [Barrier(filled_by) for _ in range(stages)],
            [Barrier(read_by) for _ in range(stages)], [None] * stages, [None] * stages,
        )  # fmt: skip

    def tma(self, stage: int, what: object) -> None:
        """expect, then a box that lands at some time."""
        self.full[stage].flying += 1
        self.full[stage].arrive()

        def land() -> None:
            self.weights[stage] = what
            self.full[stage].land()

        self.copies.append(land)


@dataclass
class Sums:
    """Double buffer of the teams' totals, as `decode_gemm.make_sums` lays it out."""

    slots: list[list[object]] = field(default_factory=lambda: [[None, None], [None, None]])
    ready: list[Barrier] = field(default_factory=lambda: [Barrier(2), Barrier(2)])
    taken: list[Barrier] = field(default_factory=lambda: [Barrier(1), Barrier(1)])


def play(roles: list[Role], ring: Ring, seed: int, patience: int = 400) -> None:
    """Steps roles and landings in random order; TimeoutError where nothing can move any more."""
    rng = random.Random(seed)
    waiting = [next(role, None) for role in roles]
    idle = 0
    while any(waiting):
        choice = rng.randrange(len(roles) + 1)
        if choice == len(roles):
            if ring.copies:
                ring.copies.pop(rng.randrange(len(ring.copies)))()
                idle = 0
        elif (condition := waiting[choice]) is not None and condition():
            waiting[choice] = next(roles[choice], None)
            idle = 0
        idle += 1
        if idle > patience and not ring.copies:
            raise TimeoutError("deadlock")


def stream(ring: Ring, tiles: int, steps: int) -> Role:
    """`gemm2_decode.stream` and `decode_gemm.stream_weights`: every step of every tile in order."""
    stage, phase = 0, 1
    for tile in range(tiles):
        for step in range(steps):
            yield ring.empty[stage].done(phase)
            ring.tma(stage, (tile, step))
            stage, phase = (stage + 1) % ring.stages, phase ^ (stage + 1 == ring.stages)


def alternate(team: int, ring: Ring, tiles: int, steps: int) -> Role:
    """`gemm2_decode.multiply`: every second tile; the next stage is read before one is freed."""
    at = team * steps
    if team < tiles:
        yield ring.full[at % ring.stages].done(at // ring.stages & 1)
        assert ring.weights[at % ring.stages] == (team, 0), "stale"
    for tile in range(team, tiles, 2):
        for step in range(steps):
            stage = at % ring.stages
            last = step + 1 == steps
            at += 1 + (steps if last else 0)
            if not last or tile + 2 < tiles:
                yield ring.full[at % ring.stages].done(at // ring.stages & 1)
                expected = (tile + 2, 0) if last else (tile, step + 1)
                assert ring.weights[at % ring.stages] == expected, "stale"
            ring.empty[stage].arrive()


def gather(ring: Ring, tiles: int, steps: int, lag: int) -> Role:
    """`decode_gemm.gather_rows`: copies of a step are announced `lag` steps later."""
    stage, phase, late, issued = 0, 1, 0, 0
    for tile in range(tiles):
        for step in range(steps):
            yield ring.empty[stage].done(phase)
            ring.rows[stage] = (tile, step)
            stage, phase = (stage + 1) % ring.stages, phase ^ (stage + 1 == ring.stages)
            issued += 1
            if issued > lag:
                ring.full[late].arrive()
                late = (late + 1) % ring.stages
    for _ in range(min(issued, lag)):
        ring.full[late].arrive()
        late = (late + 1) % ring.stages


def together(team: int, ring: Ring, sums: Sums | None, tiles: int, steps: int) -> Role:
    """`decode_gemm.tile_total`: both teams read every stage; a tile's totals go to the epilogue, or
    (sums None) stay with teams that have rows of their own."""
    total, stage, phase = tiles * steps, 0, 0
    yield ring.full[0].done(0)
    for i in range(total):
        ahead, ahead_phase = (stage + 1) % ring.stages, phase ^ (stage + 1 == ring.stages)
        tile, step = divmod(i, steps)
        assert ring.rows[stage] == (tile, step), "stale rows"
        if i + 1 < total:
            yield ring.full[ahead].done(ahead_phase)
            assert ring.weights[ahead] == divmod(i + 1, steps), "stale"
        ring.empty[stage].arrive()
        stage, phase = ahead, ahead_phase
        if step + 1 == steps and sums is not None:
            yield sums.taken[tile & 1].done((tile >> 1 & 1) ^ 1)
            sums.slots[tile & 1][team] = tile
            sums.ready[tile & 1].arrive()


def by_token(ring: Ring, parts: list[int], steps: int, blind: bool = False) -> Role:
    """`multiply_tokens` of either stage: `parts` tiles of a token after the other. Nothing is read
    ahead over a token's end; blind: nor is its first stage waited for."""
    stage, phase, first = 0, 0, 0
    for tiles in parts:
        if not blind:
            yield ring.full[stage].done(phase)
        assert ring.weights[stage] == (first, 0), "stale"
        for i in range(tiles * steps):
            ahead, ahead_phase = (stage + 1) % ring.stages, phase ^ (stage + 1 == ring.stages)
            if i + 1 < tiles * steps:
                yield ring.full[ahead].done(ahead_phase)
                tile, step = divmod(i + 1, steps)
                assert ring.weights[ahead] == (first + tile, step), "stale"
            ring.empty[stage].arrive()
            stage, phase = ahead, ahead_phase
        first += tiles


def epilogue(sums: Sums, tiles: int, hasty: bool = False) -> Role:
    """`activate_tiles` and `store_tiles`; hasty: the buffer is given back before it is read."""
    for tile in range(tiles):
        yield sums.ready[tile & 1].done(tile >> 1 & 1)
        if hasty:
            sums.taken[tile & 1].arrive()
        yield lambda: True
        assert sums.slots[tile & 1] == [tile, tile], "stale totals"
        if not hasty:
            sums.taken[tile & 1].arrive()


def gather_tiles(ring: Ring, factors: list[object], tiles: int, steps: int) -> Role:
    """`prefill.gather`: the factors of a tile before its first stage, rows that land late."""
    stage, phase = 0, 1

    def landing(stage: int, what: object) -> Callable[[], None]:
        def land() -> None:
            ring.rows[stage] = what
            ring.full[stage].arrive()

        return land

    for tile in range(tiles):
        yield ring.empty[stage].done(phase)
        factors[tile % 2] = tile
        for step in range(steps):
            yield ring.empty[stage].done(phase)
            ring.tma(stage, (tile, step))
            ring.copies.append(landing(stage, (tile, step)))
            stage, phase = (stage + 1) % ring.stages, phase ^ (stage + 1 == ring.stages)


def run_tiles(
    ring: Ring, factors: list[object], tiles: int, steps: int, blind: bool = False, span: int = 1
) -> Role:
    """`prefill.consume`: the record once the first stage is full (blind: before), the factors in
    the epilogue, which ends before the next tile's first stage is waited for. span: stages that are
    given back together, once the one after them is full (`multiply_pairs`: 2)."""
    stage, phase = 0, 0
    held: list[int] = []
    for tile in range(tiles):
        if not blind:
            yield ring.full[stage].done(phase)
        assert factors[tile % 2] == tile, "stale factors"
        yield ring.full[stage].done(phase)
        for step in range(steps):
            assert ring.weights[stage] == ring.rows[stage] == (tile, step), "stale"
            ahead, ahead_phase = (stage + 1) % ring.stages, phase ^ (stage + 1 == ring.stages)
            if step + 1 < steps:
                yield ring.full[ahead].done(ahead_phase)
            held.append(stage)
            if step % span == span - 1 or step + 1 == steps:
                while held:
                    ring.empty[held.pop()].arrive()
            stage, phase = ahead, ahead_phase
        yield lambda: True
        assert factors[tile % 2] == tile, "stale factors"


def tiled(
    stages: int, tiles: int, steps: int, seed: int, blind: bool = False, span: int = 1
) -> None:
    """The prefill GEMM: two teams share every stage and the factors of two tiles."""
    ring, factors = Ring.of(stages, 2, 2), [None, None]
    teams = [run_tiles(ring, factors, tiles, steps, blind, span) for _ in range(2)]
    play([gather_tiles(ring, factors, tiles, steps), *teams], ring, seed)


def resident(stages: int, tiles: int, steps: int, seed: int) -> None:
    """Stage 2 of rows that stay: the teams take turns in tiles."""
    ring = Ring.of(stages, 1, 1)
    teams = [alternate(team, ring, tiles, steps) for team in range(2)]
    play([stream(ring, tiles, steps), *teams], ring, seed)


def lag_of(stages: int) -> int:
    """`LAG` of `decode_gemm.gather_rows`."""
    return 3 if stages > 4 else stages - 2


def gathered(
    stages: int, tiles: int, steps: int, lag: int, seed: int, hasty: bool = False, own: bool = False
) -> None:
    """Stage 1, and stage 2 of long rows: both teams share every stage; own: not the rows."""
    ring, sums = Ring.of(stages, 2, 2), None if own else Sums()
    roles = [stream(ring, tiles, steps), gather(ring, tiles, steps, lag)]
    roles += [together(team, ring, sums, tiles, steps) for team in range(2)]
    play(roles if sums is None else [*roles, epilogue(sums, tiles, hasty)], ring, seed)


def steps_of(tile: Tile, k: int) -> int:
    """`decode.Stream.steps`: K columns take so many stages, those of all slices in each."""
    return -(-k // (tile.k * tile.split_k))


@pytest.mark.parametrize("inter", [32, 192, 256, 320, 384, 512])
@pytest.mark.parametrize("block", [1, 8, 16, 32])
def test_rings_of_rows_that_stay(inter: int, block: int) -> None:
    tile = choose.decode_rows(Problem(64, 2880, inter, 32, 4), block)
    for seed in range(6):
        for tiles in (1, 2, 7):
            resident(tile.stages, tiles, steps_of(tile, inter), seed)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("k", [416, 768, 2048, 2880, 7168])
def test_rings_of_gathered_rows(k: int, block: int) -> None:
    tile = choose.decode_stream(block)
    steps, lag, own = steps_of(tile, k), lag_of(tile.stages), tile.split_k == 1
    for seed in range(3):
        for tiles in (1, 2, 5):
            gathered(tile.stages, tiles, steps, lag, seed, own=own)


@pytest.mark.parametrize("stages", range(3, 17))
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_any_ring_of_three_stages_serves(stages: int, steps: int) -> None:
    for seed in range(4):
        gathered(stages, 5, steps, lag_of(stages), seed)


@pytest.mark.parametrize("inter", [192, 256, 384, 2048, 2880])
@pytest.mark.parametrize("parts", [[1], [2], [1, 2], [3, 1, 1]])
def test_rings_of_tokens(inter: int, parts: list[int]) -> None:
    _, tile = choose.few_tokens(Problem(1, 2880, inter, 32, 4))
    steps = -(-inter // (tile.k * 2))  # two warps an expert
    for seed in range(20):
        ring = Ring.of(tile.stages, 1, 1)
        play([stream(ring, sum(parts), steps), by_token(ring, parts, steps)], ring, seed)
    with pytest.raises(AssertionError, match="stale"):
        for seed in range(50):
            ring = Ring.of(tile.stages, 1, 1)
            play([stream(ring, sum(parts), steps), by_token(ring, parts, steps, True)], ring, seed)


@pytest.mark.parametrize(("hidden", "inter"), [(256, 256), (2880, 2880), (4096, 256), (4096, 2880)])
def test_rings_of_tokens_in_stage1(hidden: int, inter: int) -> None:
    tile, _ = choose.few_tokens(Problem(1, hidden, inter, 32, 4))
    steps = steps_of(tile, hidden)
    for seed in range(20):
        for parts in ([1], [2], [1, 3], [1, 1, 1]):
            ring = Ring.of(tile.stages, 1, 1)
            play([stream(ring, sum(parts), steps), by_token(ring, parts, steps)], ring, seed)
    with pytest.raises(AssertionError, match="stale"):
        for seed in range(50):
            ring = Ring.of(tile.stages, 1, 1)
            play([stream(ring, 4, steps), by_token(ring, [1, 3], steps, True)], ring, seed)


@pytest.mark.parametrize("k", [192, 256, 384, 512, 2048, 2880])
@pytest.mark.parametrize("tokens", [1024, 2048, 4096, 5440, 8192])
def test_rings_of_tiles(k: int, tokens: int) -> None:
    for precise in (False, True):
        cut = Cut.of(Problem(tokens, k, 256, 256, 8), precise)
        for seed in range(5):
            tiled(cut.options(k)["STAGES"], 5, -(-k // 128), seed, span=cut.added(k) // 128 or 1)


def test_factors_of_tiles_shorter_than_the_ring_are_lost() -> None:
    with pytest.raises(AssertionError, match="stale factors"):
        for seed in range(50):
            tiled(8, 6, 3, seed)


def test_pairs_of_stages_need_a_third() -> None:
    with pytest.raises(TimeoutError):
        tiled(2, 2, 4, 0, span=2)


def test_a_record_read_before_its_stage_is_full_is_stale() -> None:
    with pytest.raises(AssertionError, match="stale factors"):
        for seed in range(50):
            tiled(4, 4, 6, seed, blind=True)


def test_a_ring_shorter_than_a_tile_reads_stale_words() -> None:
    with pytest.raises(AssertionError, match="stale|too many"):
        for seed in range(200):
            resident(8, 6, 8, seed)


def test_a_lag_as_long_as_the_ring_deadlocks() -> None:
    with pytest.raises(TimeoutError):
        gathered(4, 3, 9, 3, 0)


def test_totals_given_back_too_soon_are_lost() -> None:
    with pytest.raises(AssertionError, match="stale totals"):
        for seed in range(50):
            gathered(6, 6, 1, 3, seed, hasty=True)
