"""The cache of dequantized weights that packed layers share."""

from __future__ import annotations

import pytest
import torch

from qdiff.errors import UserError
from qdiff.kernels.packed_weight import WeightCache


@torch.no_grad()
def outputs(qnn, given, calls=3):
    """Several calls of a trajectory: the second one finds what the first one put into a cache."""
    with qnn.quantized(), qnn.trajectory():
        return [qnn(given[0] * (1 + 0.05 * i), given[1]) for i in range(calls)]


def visit(cache, names, size=25):
    """Ask for weights of 4·size bytes; return which had to be made."""
    made = []
    for name in names:

        def make(name=name):
            made.append(name)
            return torch.full((size,), float(ord(name)))

        assert cache.get(OWNERS[name], make)[0] == ord(name)
        assert cache.held <= cache.limit
    return "".join(made)


OWNERS = {name: object() for name in "abcdefgh"}


def test_nothing_is_kept_without_a_limit():
    cache = WeightCache(0)
    assert visit(cache, "aab") == "aab" and cache.held == 0


def test_what_fits_is_kept():
    cache = WeightCache(800)
    assert visit(cache, "abcdefghabcdefgh") == "abcdefgh"
    assert (cache.held, cache.hits, cache.misses) == (800, 8, 8)
    cache.clear()
    assert visit(cache, "a") == "a" and cache.held == 100


def test_a_round_of_calls_finds_what_fits():
    """Giving up the least recently used one at once would find nothing at all, round after round."""
    cache = WeightCache(399)  # three of eight
    visit(cache, "abcdefgh")
    assert [visit(cache, "abcdefgh") for _ in range(3)] == ["defgh"] * 3


def test_the_least_recently_used_goes_first():
    cache = WeightCache(200)
    visit(cache, "abcab")  # a and b are kept
    assert visit(cache, "c") == "c"  # both were used since c came last
    assert visit(cache, "acac") == "cc"[:1], "b, unused since c came last, made room for it"
    assert visit(cache, "b") == "b"


def test_too_large_for_the_cache():
    cache = WeightCache(200)
    visit(cache, "ab")
    assert visit(cache, "cc", size=51) == "cc"
    assert visit(cache, "ab") == ""


def test_a_negative_limit(calibrated):
    qnn = calibrated(weight_bits=4)
    with pytest.raises(UserError, match="-1 bytes; give 0 or more"):
        qnn.pack_weights(cache_bytes=-1)
    assert not qnn.is_packed


def test_layers_share_one_cache(calibrated, held_out):
    qnn = calibrated(weight_bits=4)
    weights = sum(layer.weight.numel() * 4 for layer in qnn.layers().values())
    qnn.pack_weights(cache_bytes=weights // 2)
    outputs(qnn, held_out, calls=4)
    cache = qnn.layers()["conv_in"].packed.cache
    assert weights // 4 < cache.held <= weights // 2
    assert cache.hits > cache.misses / 3
    qnn.pack_weights()  # again: without one
    outputs(qnn, held_out)
    assert qnn.layers()["conv_in"].packed.cache.held == 0
