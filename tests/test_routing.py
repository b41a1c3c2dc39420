"""Routing: the sorted form against a plain loop, maps, masks, duplicates, empty; gating."""

import pytest
import torch

import mixmoe
from mixmoe import MixMoEError, Problem, Weights
from mixmoe.backends import load
from mixmoe.gating import sigmoid_topk, softmax_topk, topk_softmax, with_shared_expert


def plain_route(ids, weights, experts, block, expert_map=None):
    """What Routed must hold, written as loops."""
    tokens, topk = ids.shape
    lists = [[] for _ in range(experts)]
    for t in range(tokens):
        for s in range(topk):
            e = int(ids[t, s])
            if expert_map is not None:
                e = int(expert_map[e]) if 0 <= e < len(expert_map) else -1
            if 0 <= e < experts:
                lists[e].append((t | s << 24, float(weights[t, s])))
    sorted_ids, sorted_weights, owners, offsets = [], [], [], [0]
    for e, routes in enumerate(lists):
        pad = -len(routes) % block
        sorted_ids += [r for r, _ in routes] + [tokens | topk << 24] * pad
        sorted_weights += [w for _, w in routes] + [0.0] * pad
        owners += [e] * ((len(routes) + pad) // block)
        offsets.append(len(sorted_ids))
    return sorted_ids, sorted_weights, owners, offsets, [len(r) for r in lists]


def compare(routed, want, tokens, topk):
    ids, weights, owners, offsets, counts = want
    n, blocks = len(ids), len(owners)
    assert routed.num_valid_ids.tolist() == [n, tokens]
    assert routed.sorted_token_ids[:n].tolist() == ids
    assert (routed.sorted_token_ids[n:] == (tokens | topk << 24)).all()
    assert torch.equal(routed.sorted_weights[:n], torch.tensor(weights))
    assert routed.sorted_expert_ids[:blocks].tolist() == owners
    assert (routed.sorted_expert_ids[blocks:] == -1).all()
    assert routed.expert_offsets.tolist() == offsets
    assert routed.expert_counts.tolist() == counts
    for tensor in (routed.sorted_token_ids, routed.sorted_expert_ids, routed.expert_offsets):
        assert tensor.dtype == torch.int32


CASES = {
    "uniform": lambda t, k, e: torch.randint(0, e, (t, k)),
    "one expert": lambda t, k, e: torch.full((t, k), e - 1),
    "masked": lambda t, k, e: torch.randint(-1, e, (t, k)),
    "all masked": lambda t, k, e: torch.full((t, k), -1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block", [1, 8, 32])
@pytest.mark.parametrize(
    ("tokens", "topk", "experts"), [(0, 2, 4), (1, 1, 1), (3, 4, 7), (50, 8, 33)]
)
def test_route_is_the_plain_loop(tokens, topk, experts, block, case):
    torch.manual_seed(0)
    ids = CASES[case](tokens, topk, experts)
    weights = torch.rand(tokens, topk)
    problem = Problem(tokens, 64, 64, experts, topk)
    routed = load("cpu").route(ids, weights, problem, None, block)
    compare(routed, plain_route(ids, weights, experts, block), tokens, topk)


def test_route_check_can_fail():
    ids, weights = torch.tensor([[0, 1], [1, 0]]), torch.rand(2, 2)
    routed = load("cpu").route(ids, weights, Problem(2, 64, 64, 2, 2), None, 4)
    want = plain_route(ids.flip(0), weights, 2, 4)
    with pytest.raises(AssertionError):
        compare(routed, want, 2, 2)


def test_expert_map_and_room():
    torch.manual_seed(1)
    ids, weights = torch.randint(-1, 12, (40, 3)), torch.rand(40, 3)
    local = torch.full((12,), -1, dtype=torch.int32)
    local[[3, 7, 8]] = torch.tensor([2, 0, 1], dtype=torch.int32)
    problem = Problem(40, 64, 64, 3, 3)
    routed = load("cpu").route(ids, weights, problem, local, 16)
    compare(routed, plain_route(ids, weights, 3, 16, local), 40, 3)
    assert len(routed.sorted_token_ids) == problem.padded_routes(16)
    # The room suffices for the worst routing: one route on each expert, the rest anywhere.
    for tokens, experts, topk, block in [(1, 9, 4, 32), (5, 2, 3, 8), (7, 300, 8, 64)]:
        p = Problem(tokens, 64, 64, experts, topk)
        spread = torch.arange(tokens * topk).view(tokens, topk) % experts
        r = load("cpu").route(spread, torch.rand(tokens, topk), p, None, block)
        assert int(r.num_valid_ids[0]) <= p.padded_routes(block)


ROUTE_REFUSALS = {
    "float ids": ({"topk_ids": torch.full((4, 2), 1.9)}, "int32 or int64: got torch.float32"),
    "bool ids": ({"topk_ids": torch.ones(4, 2).bool()}, "int32 or int64: got torch.bool"),
    "1-D ids": ({"topk_ids": torch.zeros(4, dtype=torch.int32)}, r"is \(T, topk\)"),
    "whole weights": ({"topk_weights": torch.ones(4, 2).int()}, "topk_weights is .*torch.int32"),
    "complex weights": ({"topk_weights": torch.ones(4, 2) * 1j}, "topk_weights is .*complex64"),
    "shape": ({"topk_weights": torch.ones(4, 1)}, r"of shape \(4, 2\)"),
    "device": ({"topk_weights": torch.ones(4, 2, device="meta")}, "on topk_ids's device"),
    "below -1": ({"topk_ids": torch.full((4, 2), -7)}, "got -7, nearest legal: -1"),
    "too large": ({"topk_ids": torch.full((4, 2), 3)}, "got 3, nearest legal: 2"),
    "map": ({"expert_map": torch.tensor([0, -9])}, "expert_map must .*got -9"),
    "block 2.5": ({"block": 2.5}, "a whole number of routes.*got 2.5"),
    "block 0": ({"block": 0}, "at least one: got 0, nearest legal: 1"),
}


@pytest.mark.parametrize("case", ROUTE_REFUSALS)
def test_route_refusals(case):
    changes, message = ROUTE_REFUSALS[case]
    weights = Weights.from_dense(torch.randn(3, 64, 32), torch.randn(3, 32, 32), "bf16")
    good = {"topk_ids": torch.tensor([[0, -1]] * 4), "topk_weights": torch.rand(4, 2)}
    mixmoe.route(weights=weights, expert_map=torch.tensor([2, -1]), block=3, **good)
    with pytest.raises(MixMoEError, match=message):
        mixmoe.route(weights=weights, **good | changes)


def test_softmax_gating():
    torch.manual_seed(2)
    logits = torch.randn(20, 16)
    ids, weights = softmax_topk(logits, 4)
    probability = torch.softmax(logits, -1)
    for t in range(20):
        best = sorted(range(16), key=lambda e: -probability[t, e])[:4]
        assert ids[t].tolist() == best
        torch.testing.assert_close(weights[t], probability[t, best] / probability[t, best].sum())
    _, raw = softmax_topk(logits, 4, renormalise=False)
    assert (raw.sum(1) < 1).all()
    ids2, weights2 = topk_softmax(logits, 4)
    assert torch.equal(ids, ids2)
    torch.testing.assert_close(weights, weights2)


def test_grouped_sigmoid_gating():
    torch.manual_seed(3)
    logits, bias = torch.randn(30, 16), torch.randn(16)
    ids, weights = sigmoid_topk(logits, 3, bias, groups=4, topk_groups=2, scale=2.5)
    scores = torch.sigmoid(logits)
    for t in range(30):
        biased = scores[t] + bias
        ranks = [biased[4 * g : 4 * g + 4].sort().values[-2:].sum() for g in range(4)]
        groups = sorted(range(4), key=lambda g: -ranks[g])[:2]
        allowed = [e for e in range(16) if e // 4 in groups]
        best = sorted(allowed, key=lambda e: -biased[e])[:3]
        assert ids[t].tolist() == best
        want = scores[t, best] / scores[t, best].sum() * 2.5
        torch.testing.assert_close(weights[t], want)
    plain, _ = sigmoid_topk(logits, 3, None)
    assert not torch.equal(plain, ids)


def test_shared_expert_and_errors():
    ids, weights = softmax_topk(torch.randn(5, 8), 2)
    ids, weights = with_shared_expert(ids, weights, expert=8, weight=0.5)
    assert ids.shape == (5, 3) and (ids[:, 2] == 8).all() and (weights[:, 2] == 0.5).all()
    with pytest.raises(MixMoEError, match="topk must be in 1..E: got 9"):
        softmax_topk(torch.randn(2, 8), 9)
    for choose in (softmax_topk, topk_softmax, sigmoid_topk):
        with pytest.raises(MixMoEError, match="topk must be in 1..E: got 0, nearest legal: 1"):
            choose(torch.randn(2, 8), 0)
    with pytest.raises(MixMoEError, match=r"bias is \(E,\): got \(7,\), nearest legal: \(8,\)"):
        sigmoid_topk(torch.randn(2, 8), 2, bias=torch.zeros(7))
    with pytest.raises(MixMoEError, match="groups"):
        sigmoid_topk(torch.randn(2, 8), 2, groups=3)
    with pytest.raises(MixMoEError, match="fit in the chosen groups"):
        sigmoid_topk(torch.randn(2, 8), 5, groups=4, topk_groups=2)
