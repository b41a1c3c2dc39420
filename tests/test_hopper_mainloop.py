"""The dequantisers of the Hopper kernels, their PTX interpreted, and the order they read."""

import inspect
import re

import pytest
import torch

pytest.importorskip("triton")

from mixmoe.backends.hopper import mainloop
from mixmoe.backends.hopper.slots import SlotRows, padded
from mixmoe.fold import fold_table
from mixmoe.formats import Quantised, fp8_token, mxfp4
from mixmoe.preshuffle import HOPPER_SLOTS, Fold, HopperTile, hopper_fp4

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def asm_of(kernel) -> str:
    """The inline PTX of a Gluon function."""
    return re.search(r'"""(\{.*?\})"""', inspect.getsource(kernel.fn), re.S).group(1)


def run_ptx(text: str, *operands: int) -> tuple[int, int]:
    """Interpret straight-line PTX on 32-bit registers; $0, $1 are results, $2 .. operands."""
    registers = {f"${i + 2}": operand for i, operand in enumerate(operands)}

    def read(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    def permute(a: int, b: int, select: int) -> int:
        data = (a | b << 32).to_bytes(8, "little")
        nibbles = [select >> 4 * i & 15 for i in range(4)]
        assert all(n < 8 for n in nibbles), "prmt would replicate a sign"
        return int.from_bytes(bytes(data[n] for n in nibbles), "little")

    table = {
        "mad.lo": lambda a, b, c: a * b + c,
        "and": lambda a, b: a & b,
        "dp2a.lo": lambda a, b, c: (a & 0xFFFF) * (b & 255) + (a >> 16) * (b >> 8 & 255) + c,
        "shl": lambda a, b: a << b,
        "prmt": permute,
        "lop3": lambda a, b, c, lut: {0xEA: a & b | c}[lut],
        "setp.eq": lambda a, b: int(a == b),
        "selp": lambda a, b, p: a if p else b,
    }
    for line in text.strip("{} \n").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, operands = line.strip().split(None, 1)
        target, *sources = [part.strip() for part in operands.split(",")]
        what = ".".join(part for part in name.split(".") if part not in ("u32", "b32"))
        registers[target] = table[what](*map(read, sources)) & 0xFFFFFFFF
    return registers["$0"], registers["$1"]


def word_of(codes: list[int]) -> int:
    """Eight e2m1 codes as the module's docstring lays them out."""
    word = 0
    for i, code in enumerate(codes):
        sign = 8 * i + 7 if i < 4 else 8 * (i - 4) + 3
        word |= (code & 7) << 4 * i | (code >> 3) << sign
    return word


def decoded(text: tuple[str, str], codes: list[int], scale: int) -> torch.Tensor:
    """What `tables` and `look_up` make of eight codes and a scale byte."""
    low, high = run_ptx(text[1], word_of(codes), *run_ptx(text[0], scale))
    raw = (low | high << 32).to_bytes(8, "little")
    return torch.tensor(list(raw), dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def wrong(text: tuple[str, str], fold: Fold) -> int:
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


CASES = [(mainloop.tables, Fold.NARROW), (mainloop.tables_wide, Fold.WIDE)]


@pytest.mark.parametrize(("tables", "fold"), CASES)
def test_decode_is_exact(tables, fold):
    assert wrong((asm_of(tables), asm_of(mainloop.look_up)), fold) == 0


@pytest.mark.parametrize(("tables", "fold"), CASES)
def test_every_constant_matters(tables, fold):
    texts = asm_of(tables), asm_of(mainloop.look_up)
    for i, text in enumerate(texts):
        for constant in set(re.findall(r"0x[0-9a-f]{8}", text)):
            broken = list(texts)
            broken[i] = text.replace(constant, f"0x{int(constant, 16) ^ 0x00000400:08x}")
            assert wrong((broken[0], broken[1]), fold) > 0, constant


@pytest.mark.parametrize("gate_up", [False, True])
def test_the_packed_order_is_the_one_documented(gate_up):
    rows, k = 64, 192
    codes = torch.randint(0, 16, (2, rows, k), dtype=torch.uint8)
    exponents = torch.randint(-5, 7, (2, rows, k // 32))
    codes[..., :64:32], exponents[..., 0], exponents[..., 1] = 1, -5, 6  # the fold's base is 1
    packed = hopper_fp4(HopperTile(gate_up=gate_up, warps=1)).pack(weights_of(codes, exponents))
    words = packed.codes.view(2, rows // 16, 2, 2, 8, 4, 4)  # unit row, unit column, r8, g, q, j
    scales = packed.scales.view(2, rows // 16, 2, 2, 8, 4)
    assert torch.equal(packed.row_scale, torch.ones(2, rows))
    places = [(0, 0, 0, 0, 0, 0, 0), (1, 2, 0, 0, 5, 3, 2), (0, 3, 1, 1, 7, 1, 1)]
    for e, u, c, r8, g, q, j in places:
        row = r8 * rows // 2 + u * 8 + g if gate_up else u * 16 + r8 * 8 + g
        first = c * 128 + 32 * q + 8 * j
        eight = [int(v) for v in codes[e, row, first : first + 8]]
        assert int(words[e, u, c, r8, g, q, j]) & 0xFFFFFFFF == word_of(eight)
        assert int(scales[e, u, c, r8, g, q]) == 8 * (int(exponents[e, row, first // 32]) + 5)
    assert not words[:, :, 1, :, :, 2:].any(), "columns past K are zero words"


def weights_of(codes: torch.Tensor, exponents: torch.Tensor) -> Quantised:
    """mxfp4 of codes (.., K), one a byte, and exponents (.., K / 32)."""
    pairs = codes[..., 0::2] | codes[..., 1::2] << 4
    return Quantised(pairs, (exponents + 127).to(torch.uint8), mxfp4)


def fragments_of(packed, fold: Fold) -> torch.Tensor:
    """The A operand (R, slots) as the lanes of a warp hold it, by wgmma's m64k32 register map.

    PTX ISA, wgmma A fragment: register lohi of lane 4g + q and half r8 is row 8 r8 + g, k
    16 lohi + 4q .. + 3 of each step of 32. A word is one step's two registers.
    """
    units, groups = packed.shape[1] // 16, -(-packed.shape[2] // 128)
    words = packed.codes.view(units, groups, 2, 8, 4, 4).to(torch.int64) & 0xFFFFFFFF
    scales = packed.scales.view(units, groups, 2, 8, 4).to(torch.int64)
    lut = fold_table().view(torch.float8_e4m3fn).double()[scales // fold.step + fold.lowest + 8]
    a = torch.zeros(units, 2, 8, groups, 4, 32, dtype=torch.float64)  # u r8 g | group, step, slot
    for q in range(4):
        for lohi in range(2):
            for by in range(4):
                code = 4 * lohi + by
                index = words[..., q, :] >> 4 * code & 7
                sign = words[..., q, :] >> (8 * by + 7 - 4 * lohi) & 1
                value = torch.gather(lut[:, :, :, :, q], -1, index) * (1 - 2 * sign)
                a[..., 16 * lohi + 4 * q + by] = value.permute(0, 2, 3, 1, 4)
    return a.reshape(units * 16, groups * 128)


@pytest.mark.parametrize("fold", Fold)
@pytest.mark.parametrize("k", [256, 352])
def test_words_times_slots_is_the_product(fold, k):
    """Packed words by the hardware's register map, times rows in slot order, in float64."""
    make = torch.Generator().manual_seed(k)
    codes = torch.randint(0, 16, (1, 48, k), dtype=torch.uint8, generator=make)
    exponents = torch.randint(fold.lowest, 7, (1, 48, k // 32), generator=make)
    w = weights_of(codes, exponents)
    packed = hopper_fp4(HopperTile(warps=1), fold).pack(w)
    x = torch.randint(-8, 9, (5, k), generator=make).float()
    rows = Quantised(x.to(torch.float8_e4m3fn), torch.ones(5, 1), fp8_token)
    slots = SlotRows.of(rows)
    assert slots.codes.shape == (5, padded(k)) and torch.equal(
        slots.natural(k).codes.view(torch.uint8), rows.codes.view(torch.uint8)
    )
    a = fragments_of(packed, fold) * packed.row_scale[0].double()[:, None]
    want = w[0].dequantise(torch.float64) @ x.double().T
    assert torch.equal(a @ slots.codes.double().T, want)
    natural = torch.nn.functional.pad(x.double(), (0, padded(k) - k))
    assert not torch.equal(a @ natural.T, want), "the order of the rows matters"
    turned = slots.codes.double().unflatten(1, (-1, 4, 4, 2, 4)).transpose(2, 3).flatten(1)
    assert not torch.equal(a @ turned.T, want), "and not only by blocks"


def test_the_slot_order_is_stated_once():
    """Layout, torch reordering and the kernels' `column_of` agree on where a column goes."""
    k = 352
    place = HOPPER_SLOTS.layout(1, k)
    column = torch.arange(padded(k))
    slot = torch.tensor([place(0, int(c)) for c in column])
    assert torch.equal(mainloop.column_of.fn(slot), column)
    assert not torch.equal(mainloop.column_of.fn(column), column)
    ramp = torch.randint(0, 120, (3, k), dtype=torch.uint8).view(torch.float8_e4m3fn)
    got = SlotRows.of(Quantised(ramp, torch.ones(3, 1), fp8_token)).codes.view(torch.uint8)
    whole = torch.nn.functional.pad(ramp.view(torch.uint8), (0, padded(k) - k))
    assert torch.equal(got[:, slot], whole)
    out = torch.empty(1, 3, padded(k), dtype=torch.uint8)
    HOPPER_SLOTS.pack([ramp.view(torch.uint8)], out)
    assert torch.equal(out[0], got)
