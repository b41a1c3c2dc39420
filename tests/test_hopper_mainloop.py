"""The dequantisers of the Hopper kernels, their PTX interpreted, and the order they read."""

import inspect
import re

import pytest
import torch

pytest.importorskip("triton")

from mixmoe.backends.hopper import mainloop
from mixmoe.formats import Quantised, mxfp4
from mixmoe.preshuffle import Fold, HopperTile, hopper_fp4

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def asm_of(kernel) -> str:
    """The inline PTX of a Gluon function."""
    return re.search(r'"""(\{.*?\})"""', inspect.getsource(kernel.fn), re.S).group(1)


def run_ptx(text: str, words: int, scale: int) -> tuple[int, int]:
    """Interpret straight-line PTX on 32-bit registers; $0, $1 are results, $2, $3 operands."""
    registers = {"$2": words, "$3": scale}

    def read(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    def permute(a: int, b: int, select: int) -> int:
        data = (a | b << 32).to_bytes(8, "little")
        nibbles = [select >> 4 * i & 15 for i in range(4)]
        assert all(n < 8 for n in nibbles), "prmt would replicate a sign"
        return int.from_bytes(bytes(data[n] for n in nibbles), "little")

    table = {
        "mad": lambda a, b, c: a * b + c,
        "and": lambda a, b: a & b,
        "shr": lambda a, b: a >> b,
        "shl": lambda a, b: a << b,
        "prmt": permute,
        "lop3": lambda a, b, c, lut: {0xEA: a & b | c}[lut],
        "setp": lambda a, b: int(a == b),
        "selp": lambda a, b, p: a if p else b,
    }
    for line in text.strip("{} \n").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, operands = line.strip().split(None, 1)
        target, *sources = [part.strip() for part in operands.split(",")]
        assert not name.startswith("setp") or name.startswith("setp.eq")
        registers[target] = table[name.split(".")[0]](*map(read, sources)) & 0xFFFFFFFF
    return registers["$0"], registers["$1"]


def word_of(codes: list[int]) -> int:
    """Eight e2m1 codes as the module's docstring lays them out."""
    word = 0
    for i, code in enumerate(codes):
        sign = 8 * i + 7 if i < 4 else 8 * (i - 4) + 3
        word |= (code & 7) << 4 * i | (code >> 3) << sign
    return word


def decoded(text: str, codes: list[int], scale: int) -> torch.Tensor:
    low, high = run_ptx(text, word_of(codes), scale)
    raw = (low | high << 32).to_bytes(8, "little")
    return torch.tensor(list(raw), dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def wrong(text: str, fold: Fold) -> int:
    """How many (exponent, eight codes) the PTX decodes to anything but value * 2^k."""
    generator = torch.Generator().manual_seed(0)
    bad = 0
    for k in range(fold.lowest, 7):
        rows = [list(range(8)), list(range(8, 16))]
        rows += torch.randint(0, 16, (20, 8), generator=generator).tolist()
        for codes in rows:
            exact = torch.tensor([VALUES[c & 7] * (-1.0 if c > 7 else 1.0) * 2.0**k for c in codes])
            got = decoded(text, codes, (k - fold.lowest) * fold.step)
            signs = torch.equal(torch.signbit(got), torch.tensor([c > 7 for c in codes]))
            bad += not (torch.equal(got, exact) and signs)
    return bad


CASES = [(mainloop.dequantise, Fold.NARROW), (mainloop.dequantise_wide, Fold.WIDE)]


@pytest.mark.parametrize(("kernel", "fold"), CASES)
def test_dequantise_is_exact(kernel, fold):
    assert wrong(asm_of(kernel), fold) == 0


@pytest.mark.parametrize(("kernel", "fold"), CASES)
def test_every_constant_matters(kernel, fold):
    text = asm_of(kernel)
    for constant in set(re.findall(r"0x[0-9a-f]{8}", text)):
        broken = text.replace(constant, f"0x{int(constant, 16) ^ 0x00000400:08x}")
        assert wrong(broken, fold) > 0, constant


@pytest.mark.parametrize("gate_up", [False, True])
def test_the_packed_order_is_the_one_documented(gate_up):
    rows, k = 64, 192
    codes = torch.randint(0, 16, (2, rows, k), dtype=torch.uint8)
    exponents = torch.randint(-5, 7, (2, rows, k // 32))
    codes[..., :64:32], exponents[..., 0], exponents[..., 1] = 1, -5, 6  # the fold's base is 1
    pairs = codes[..., 0::2] | codes[..., 1::2] << 4
    packed = hopper_fp4(HopperTile(gate_up=gate_up, warps=1)).pack(
        Quantised(pairs, (exponents + 127).to(torch.uint8), mxfp4)
    )
    words = packed.codes.view(2, rows // 16, 4, 8, 4, 4)  # unit row, unit column, g, q, j
    scales = packed.scales.view(2, rows // 16, 4, 8, 4)
    assert torch.equal(packed.row_scale, torch.ones(2, rows))
    for e, u, c, g, q, j in [(0, 0, 0, 0, 0, 0), (1, 2, 1, 5, 3, 2), (0, 3, 2, 7, 1, 1)]:
        half = j % 2
        row = half * rows // 2 + u * 8 + g if gate_up else u * 16 + half * 8 + g
        first = c * 64 + j // 2 * 32 + 4 * q
        eight = [*codes[e, row, first : first + 4], *codes[e, row, first + 16 : first + 20]]
        assert int(words[e, u, c, g, q, j]) & 0xFFFFFFFF == word_of([int(v) for v in eight])
        block = exponents[e, row, first // 32]
        assert int(scales[e, u, c, g, j]) == 8 * (int(block) + 5)
    assert not words[:, :, 3].any(), "columns past K are zero words"
