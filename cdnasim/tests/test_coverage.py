"""The instruction list is LLVM's; nothing in it is missing, and what is left out says why."""

from __future__ import annotations

import pytest

from cdnasim import isa_list
from cdnasim.coverage import DATA, coverage, try_decode
from cdnasim.legality import bare


@pytest.mark.parametrize('gpu,least', [('gfx942', 1030), ('gfx950', 1120)])
def test_everything_is_implemented_or_explained(gpu: str, least: int) -> None:
    c = coverage(gpu)
    assert not c.missing and not c.forms_missing
    assert len(c.implemented) >= least and all(c.left_out.values())
    assert c.families()['v_mfma'][0] == c.families()['v_mfma'][1] > 25


@pytest.mark.parametrize('gpu', ('gfx942', 'gfx950'))
def test_list_is_what_llvm_says(gpu: str) -> None:
    """The shipped file equals what the installed LLVM disassembles (needs llvm-mc)."""
    found = isa_list.examples(gpu)
    names = {bare(t.split()[0]) for t in found.values()}
    shipped = {
        bare(t.split()[0]) for t in (DATA / f'{gpu}.txt').read_text().splitlines()
    }
    assert names == shipped


def test_unknown_names_are_found() -> None:
    assert try_decode('v_frobnicate_b32 v1, v2', 'gfx950') == 'unknown name'
    assert 'gfx950 only' in try_decode(
        'v_mfma_f32_16x16x128_f8f6f4 v[0:3], v[4:11], v[12:19], v[0:3]', 'gfx942'
    )
