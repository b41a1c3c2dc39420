"""How long a grouped GEMM takes on MI355X for a tile: bytes, matrix work, LDS, workgroups.

A physical model with few constants. A workgroup multiplies a tile of ``tokens`` routes by ``rows``
weight rows (of each half) over all K, or its waves share K. Four things bound a launch:

* memory: the bytes of the experts that are hit, once, the tokens' and the results' bytes, at the
  rate at which memory delivers, or at what the loads in flight can ask for in one latency;
* the path from L2 into a CU: what its workgroups load;
* LDS: each wave reads all the tokens of its tile;
* the matrix cores: products of the tile, padding included, at the pace at which they are issued.

They overlap in part: a norm joins them, between their sum and the largest. Launch, first loads and
epilogue come on top. Constants marked *fitted* are least squares on the logarithms of AMD's own
times for DeepSeek-V3 (aiter's tuned tables, MI355X, a4w4, 22 GEMMs); gpt-oss and Kimi-K2 were held
out. ``tests/test_cdna_cost.py`` states how well it does. The fitted 52 cycles for a product of 16
agree with the simulator, which gives upstream's stage-1 kernel 54.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, exp, lgamma, log, log1p, sqrt

from mixmoe.spec import Problem

TILE_K = 256  # K of a step of the main loop
OTHER_REGISTERS = 100  # of a wave: operands on their way, addresses
LARGE = 4000.0  # expected routes from which a block is lost to rounding on average: half of one


@dataclass(frozen=True, slots=True)
class Device:
    """MI355X unless stated. Cycles are of the clock; rates in bytes a us, of one CU but for memory.

    ``memory``: what a plain read reaches (vLLM #56488: 7.2 TB/s). ``path``: from L2, 64 bytes a
    cycle; ``lds``: 128 (CDNA3 white paper). ``mfma``: cycles of a 16 x 16 x 128 product by bits of
    the wider operand (data sheet: 10.1, 5.0 and 2.5 PFLOP/s dense).
    """

    cus: int = 256
    simds: int = 4
    cycles: float = 2400.0  # per us
    memory: float = 7.2e6
    path: float = 64 * 2400.0
    lds: float = 128 * 2400.0
    mfma: tuple[tuple[int, float], ...] = ((4, 16), (8, 32), (16, 64))
    lds_bytes: int = 160 << 10
    registers: int = 512
    most_waves: int = 2  # of a SIMD (fitted)
    launch: float = 6.2  # us: start, first loads, epilogue (fitted)
    latency: float = 0.53  # us a load takes when memory is busy (fitted)
    ahead: float = 3.4  # steps whose weights are in flight (fitted)
    read: float = 0.94  # of ``memory``, that weights are read at (fitted)
    result: float = 0.66  # of ``memory``, that results are written and read again at (fitted)
    issue: float = 52.0  # cycles of a SIMD for an MFMA and what is issued with it (fitted)
    overlap: float = 1.55  # power of the norm that joins the terms; 1: none overlap (fitted)

    def product(self, bits: int) -> float:
        """Cycles of a SIMD for one 16 x 16 x 128 product."""
        return max(self.issue, next(cycles for width, cycles in self.mfma if bits <= width))


MI355X = Device()
# Data sheet and CDNA3 white paper; what is fitted for MI355X is taken over. ``memory`` in the same
# proportion to the data sheet as there. No MFMA of gfx942 takes 4-bit codes: they become 8 bits.
MI300X = replace(
    MI355X, cus=304, cycles=2100.0, memory=4.77e6, path=64 * 2100.0, lds=128 * 2100.0,
    mfma=((8, 64), (16, 128)), lds_bytes=64 << 10,
)  # fmt: skip
# These kernels on MI355X: cycles of a product in the main loop as simulated (docs/cdna.md).
OURS = replace(MI355X, issue=18.0)
DEVICES = {"gfx950": MI355X, "gfx942": MI300X}


@dataclass(frozen=True, slots=True)
class Work:
    """One grouped GEMM of a layer: ``tokens`` T choose ``topk`` of ``experts`` each, uniformly;
    ``halves * rows`` weight rows of ``k``; bits of a weight and a token with their scales; bytes of
    a result value, written once and read again ``reread`` times before the layer is done."""

    tokens: int
    topk: int
    experts: int
    halves: int
    rows: int
    k: int
    weight_bits: float
    token_bits: float
    result_bytes: float
    reread: float = 0.0

    @property
    def routes(self) -> int:
        """Rows of the result."""
        return self.tokens * self.topk

    @property
    def hit(self) -> float:
        """Experts that at least one token chooses, expected."""
        if self.topk >= self.experts:
            return float(self.experts)
        missed = exp(self.tokens * log1p(-self.topk / self.experts))
        return self.experts * (1 - missed)

    def blocks(self, tile: int) -> float:
        """Tiles of that many routes, expected: each expert's last one is padded."""
        return self.experts * tiles_of(self.tokens, self.topk / self.experts, tile)

    def bits(self) -> int:
        """Width of the wider operand's codes."""
        return int(max(self.weight_bits, self.token_bits))


@dataclass(frozen=True, slots=True)
class Cut:
    """A workgroup: ``tokens x rows``, rows of each half; ``waves`` share them, or ``split`` groups
    of waves a share of K each."""

    tokens: int
    rows: int
    waves: int = 4
    split: int = 1

    def resident(self, device: Device, work: "Work") -> int:
        """Workgroups that fit a CU: by results in registers, by two K steps of tokens in LDS."""
        lds = 2 * self.tokens * TILE_K * self.split * work.token_bits / 8
        results = self.tokens * self.rows * work.halves * self.split / (64 * self.waves)
        waves = min(device.most_waves, int(device.registers / (results + OTHER_REGISTERS)))
        return max(1, min(int(device.lds_bytes / lds), device.simds * waves // self.waves))


@dataclass(frozen=True, slots=True)
class Cost:
    """Predicted time, and what it is made of: all in us."""

    us: float
    memory: float
    path: float
    lds: float
    matrix: float

    @property
    def bound(self) -> str:
        """The largest term."""
        terms = ("memory", "path", "lds", "matrix")
        return max(terms, key=lambda name: getattr(self, name))


@cache
def tiles_of(tokens: int, share: float, tile: int) -> float:
    """``E[ceil(n / tile)]`` of one expert's routes, ``n ~ Binomial(tokens, share)``."""
    mean = tokens * share
    if share >= 1 or mean > LARGE:
        return ceil(mean / tile) if share >= 1 else mean / tile + 0.5
    spread = sqrt(mean * (1 - share))
    first, last = max(0, int(mean - 9 * spread) - 1), min(tokens, int(mean + 9 * spread) + 9)

    def chance(n: int) -> float:
        choose = lgamma(tokens + 1) - lgamma(n + 1) - lgamma(tokens - n + 1)
        return exp(choose + n * log(share) + (tokens - n) * log1p(-share))

    return sum(chance(n) * ceil(n / tile) for n in range(first, last + 1))


def predict(device: Device, work: Work, cut: Cut) -> Cost:
    """Time of one launch. See the module's text for the terms."""
    steps = ceil(work.k / TILE_K / cut.split)
    blocks = work.blocks(cut.tokens)
    groups = max(1.0, blocks * ceil(work.rows / cut.rows))
    rows = min(cut.rows, work.rows) * work.halves
    weight_tile = rows * work.k * work.weight_bits / 8
    loaded = weight_tile + cut.tokens * work.k * work.token_bits / 8

    weights = work.hit * work.halves * work.rows * work.k * work.weight_bits / 8
    tokens = work.tokens * work.k * work.token_bits / 8
    results = work.routes * work.rows * work.result_bytes * (1 + work.reread)
    running = min(groups, device.cus * cut.resident(device, work))
    in_flight = running * min(1.0, device.ahead / steps) * weight_tile
    rate = min(device.read * device.memory, in_flight / device.latency)
    memory = (weights + tokens) / rate + results / (device.result * device.memory)

    a_cu = max(groups / device.cus, 1.0)  # workgroups of a CU
    path = a_cu * loaded / device.path
    shared = cut.tokens * work.k * work.token_bits / 8 * (1 + cut.waves / cut.split)
    lds = a_cu * shared / device.lds
    products = cut.tokens / 16 * rows / 16 * work.k / 128
    simd = max(groups * cut.waves / (device.cus * device.simds), 1.0)  # waves of a SIMD
    matrix = simd * products / cut.waves * device.product(work.bits()) / device.cycles
    terms = (memory, path, lds, matrix)
    joined = sum(term**device.overlap for term in terms) ** (1 / device.overlap)
    return Cost(device.launch + joined, *terms)


def ranked(device: Device, work: Work, cuts: list[Cut]) -> list[tuple[Cut, Cost]]:
    """Cuts by predicted time, the shortest first; of equal ones the first given."""
    return sorted(((cut, predict(device, work, cut)) for cut in cuts), key=lambda pair: pair[1].us)


def works_of(
    problem: Problem, weight_bits: float = 4.25, token_bits: float = 8.25
) -> tuple[Work, Work]:
    """Both GEMMs of a layer. What sorts the routes does not know the formats: by default e2m1
    weights and 8-bit tokens, with their scales."""
    p = problem
    routed, bits = (p.tokens, p.topk, p.experts), (weight_bits, token_bits)
    return (
        Work(*routed, 2, p.intermediate, p.hidden, *bits, token_bits / 8),
        Work(*routed, 1, p.hidden, p.intermediate, *bits, 2.0, 1.0),
    )


def choose(device: Device, works: tuple[Work, ...], cuts: Mapping[int, tuple[Cut, ...]]) -> int:
    """The block of sorted routes whose GEMMs take least together: ``cuts[block]`` are their tiles,
    in the order of ``works``; of equal ones the first given."""

    def us(block: int) -> float:
        return sum(predict(device, w, c).us for w, c in zip(works, cuts[block], strict=True))

    return min(cuts, key=us)
