"""The fused fake quantization against the plain composition, bit for bit: interpreted, and as it compiles."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from qdiff.functional import fake_quantize_inference

# Numpy's, which the interpreter computes with: infinities are asked for.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TINY = torch.finfo(torch.float32).tiny
SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, TINY, -TINY, TINY / 4, -1e-45, 3e38, -3e38, 1e30, 65504.0]


@pytest.fixture(scope="module")
def kernel(interpreted):
    return interpreted("fake_quantize_triton")


def run(kernel, x, delta, zero_point, bits, dtype=None):
    """The kernel's result in x's dtype, or in another."""
    out = torch.empty_like(x)
    layout = kernel.layout_of(x, delta, zero_point, out)
    assert layout is not None
    out = torch.empty_like(x, dtype=dtype or x.dtype)
    kernel.launch(x, delta, zero_point, bits, out, layout)
    return out


def plain(x, delta, zero_point, bits, dtype=None):
    """The composition in float32."""
    return fake_quantize_inference(x.float(), delta.float(), zero_point, bits).to(dtype or x.dtype)


def same_bits(a, b):
    """Equal in every bit, signs of zeros included; any NaN is as good as another."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integers = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return bool(((a.view(integers) == b.view(integers)) | (a.isnan() & b.isnan())).all())


def agrees(kernel, x, delta, zero_point, bits):
    # The interpreter cuts bfloat16 off instead of rounding: its results are taken before that.
    dtype = torch.float32 if x.dtype == torch.bfloat16 else None
    found = run(kernel, x, delta, zero_point, bits, dtype)
    return same_bits(found, plain(x, delta, zero_point, bits, dtype))


def edges(delta, zero_point, bits):
    """Values on and beside (k + ½)·δ, around both ends of the range, and specials."""
    k = torch.arange(-40, 41, dtype=torch.float32)
    ends = torch.tensor([-float(zero_point), 2.0**bits - 1 - float(zero_point)])
    k = torch.cat([k, *(e + torch.arange(-3.0, 4.0) for e in ends)])
    halves = (k + 0.5) * delta
    around = [halves, torch.nextafter(halves, halves + 1), torch.nextafter(halves, halves - 1), k * delta]
    return torch.cat([*around, torch.tensor(SPECIAL)])


ZERO_POINTS = {
    "unsigned": lambda bits: 0,
    "symmetric": lambda bits: 2 ** (bits - 1),
    "asymmetric": lambda bits: 2**bits // 3,
    "all below": lambda bits: 2**bits - 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 11, 15, 16])
def test_it_equals_the_composition(kernel, bits, zero_point, dtype):
    z = torch.tensor(ZERO_POINTS[zero_point](bits), dtype=torch.int32)
    generator = torch.Generator().manual_seed(bits)
    for size in (0.1, 1 / 3, 0.5, 1.7e-3, 1e-8, 3e-39):
        delta = torch.tensor(size)
        values = torch.cat([edges(delta, z, bits), torch.randn(2000, generator=generator) * size * 2**bits / 3])
        x = values.to(dtype)
        if dtype == torch.bfloat16:  # whose smallest numbers the interpreter does not read
            x = x[(x.abs() >= TINY) | (x == 0) | x.isnan()]
        assert agrees(kernel, x, delta, z, bits)


FAULTS = {
    "a product with 1/δ": ("tl.div_rn(x, delta)", "x * tl.div_rn(1.0, delta)"),
    "halves away from zero": (
        "(scaled + 12582912.0) - 12582912.0",
        "tl.where(scaled < 0, -tl.floor(-scaled + 0.5), tl.floor(scaled + 0.5))",
    ),
    "halves upwards": ("(scaled + 12582912.0) - 12582912.0", "tl.floor(scaled + 0.5)"),
    "clamped before z is added": ("rounded + zero, 0.0, top", "rounded, 0.0, top"),
    "a fused multiply-add": ("(q - zero) * delta)", "(q * delta - zero * delta))"),
    "one level less": ("zero, 0.0, top,", "zero, 0.0, top - 1,"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_its_arithmetic_is_seen(fault, with_fault):
    faulty = with_fault("fake_quantize_triton", *FAULTS[fault])
    z = torch.tensor(5, dtype=torch.int32)
    steps = [torch.tensor(size) for size in (0.07, 0.3, 1 / 3)]
    assert not all(agrees(faulty, edges(delta, z, 4), delta, z, 4) for delta in steps)


def layouts():
    """Inputs of four dimensions in every kind of memory that networks make."""
    x = torch.randn(3, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    flat = torch.randn(3, 18, 20, generator=torch.Generator().manual_seed(1))
    heads = flat[:, 6:12].reshape(3, 2, 3, 20).transpose(-2, -1)
    last = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(2)).reshape(3, 7, 4, 3).transpose(1, 2)
    return {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.permute(2, 0, 3, 1),
        "slice of channels": x[:, 2:5],
        "slice of channels last": x.contiguous(memory_format=torch.channels_last)[:, 2:5],
        "heads of a convolution": heads,
        "heads of tokens": last,
        "one sample": x[1:2],
        "ones": x[:1, :1],
    }


@pytest.mark.parametrize("differs", [None, 0, 1, 3])
@pytest.mark.parametrize("layout", layouts())
def test_memory_is_read_as_it_lies(kernel, layout, differs):
    """No copy is made, and the result lies as the composition's."""
    x = layouts()[layout]
    shape = [x.shape[d] if d == differs else 1 for d in range(4)] if differs is not None else []
    generator = torch.Generator().manual_seed(5)
    delta = torch.rand(shape, generator=generator) * 0.3 + 0.05
    z = torch.randint(0, 16, shape, generator=generator, dtype=torch.int32)
    expected = plain(x, delta, z, 4)
    found = run(kernel, x, delta, z, 4)
    assert same_bits(found, expected)
    assert all(a == b for a, b, n in zip(found.stride(), expected.stride(), x.shape, strict=True) if n > 1)
    # One of the two may be one for all.
    assert agrees(kernel, x, delta, z.flatten()[0], 4) and agrees(kernel, x, delta.flatten()[0], z, 4)
    if delta.numel() > 1:
        assert not same_bits(found, plain(x, delta.roll(1, differs), z, 4)), "planted: another's range"


def test_what_it_does_not_take(compiled):
    module = compiled("fake_quantize_triton")

    def taken(x, delta, zero_point=None):
        zero_point = torch.zeros(delta.shape, dtype=torch.int32) if zero_point is None else zero_point
        return module.layout_of(x, delta, zero_point, torch.empty_like(x)) is not None

    x = torch.zeros(4, 6, 8)
    assert taken(x, torch.ones(())) and taken(x, torch.ones(8)) and taken(x, torch.ones(6, 1))
    assert not taken(x, torch.ones(6, 8)), "ranges along two dimensions"
    assert not taken(x[:, :, ::2], torch.ones(())), "gaps between single values"
    assert not taken(x.double(), torch.ones(())) and not taken(x, torch.ones((), dtype=torch.float64))
    assert not taken(x[:, :1], torch.ones(6, 1)), "the result would be larger than x"
    assert not taken(x, torch.ones(1, 1, 1, 1))
    assert not taken(x, torch.ones(4, 1, 1), torch.zeros(6, 1, dtype=torch.int32)), "δ and z along two dimensions"
    assert not taken(torch.zeros(8, 6, 4, 2)[:, :3, :2], torch.ones(())), "gaps of two sizes"


def test_empty_and_single_values(kernel):
    one, z = torch.ones(()), torch.zeros((), dtype=torch.int32)
    for shape in [(0,), (3, 0, 2), (), (1,), (1, 1)]:
        assert agrees(kernel, torch.rand(shape) * 9, one, z, 4)


def test_a_row_of_blocks_ends_where_x_ends(kernel):
    """Nothing beyond the last value is written, on a size that is no multiple of a block."""
    around = torch.full((2 * kernel.BLOCK + 7 + 64,), 7.0)
    out = around[: 2 * kernel.BLOCK + 7]
    x, delta, z = torch.rand(out.shape), torch.tensor(0.1), torch.zeros((), dtype=torch.int32)
    kernel.launch(x, delta, z, 4, out, kernel.layout_of(x, delta, z, out))
    assert torch.equal(out, plain(x, delta, z, 4)) and (around[len(out) :] == 7).all()


def test_more_bits_than_it_rounds_are_refused(kernel):
    x, one, z = torch.ones(3), torch.ones(()), torch.zeros((), dtype=torch.int32)
    with pytest.raises(ValueError, match="16 bits"):
        run(kernel, x, one, z, 24)


class _Recorded:
    """Stands for the compiled kernel: notes how it would be launched."""

    def __getitem__(self, grid):
        return lambda *args, **options: setattr(self, "launched", (grid, args, options))


def test_tensors_beyond_two_to_the_31_are_counted_in_64_bits(compiled, monkeypatch):
    module, recorded = compiled("fake_quantize_triton"), _Recorded()
    monkeypatch.setattr(module, "kernel", recorded)
    one, z = torch.ones((), device="meta"), torch.zeros((), dtype=torch.int32, device="meta")
    slice_of_large = torch.empty(64, 2**26, device="meta")[:, : 2**24]
    for x, wide in [
        (torch.empty(2**31 - 2 * module.BLOCK, device="meta"), False),
        (torch.empty(2**31 + 5, device="meta"), True),
        (slice_of_large, True),  # fewer values, but the last one is 2^32 places away
    ]:
        out = torch.empty_like(x)
        module.launch(x, one, z, 8, out, module.layout_of(x, one, z, out))
        (grid,), _, options = recorded.launched
        assert options["IS_WIDE"] is wide and grid * module.BLOCK >= x.numel() > (grid - 1) * module.BLOCK
        assert options["enable_fp_fusion"] is False


KINDS = ["fp32", "fp16", "bf16"]


@pytest.mark.parametrize(("kind", "wide"), list(itertools.product(KINDS, [False, True])))
def test_the_compiled_arithmetic_rounds_as_ieee(compiled, ptx, kind, wide):
    """What the interpreter cannot show: no approximate division, nothing contracted, nothing flushed to 0."""
    module = compiled("fake_quantize_triton")
    integer = "i64" if wide else "i32"
    pointers = {"x_ptr": f"*{kind}", "delta_ptr": "*fp32", "zero_ptr": "*i32", "out_ptr": f"*{kind}"}
    signature = pointers | dict.fromkeys(["size", "row", "row_stride", "step", "count"], integer) | {"top": "fp32"}
    flags = {"HAS_GAPS": True, "ONE_DELTA": False, "ONE_ZERO": False, "IS_WIDE": wide, "BLOCK": module.BLOCK}
    text = ptx(module.kernel, signature, flags)
    instructions = set(re.findall(r"^\s+(?:@%p\d+ )?([a-z]+\S*\.f32\S*)", text, re.MULTILINE))
    assert "div.rn.f32" in instructions
    assert not [
        i for i in instructions if re.match(r"fma|mad|rcp|ex2", i) or ".ftz" in i or "approx" in i or ".full" in i
    ]
    assert {"max.NaN.f32", "min.NaN.f32"} <= instructions
    if kind != "fp32":
        assert re.search(r"cvt\.rn\.(f16|bf16)(x2)?\.f32", text), "halves to even"
    # 64-bit counting shows in the place of a value.
    assert ("rem.s64" in text or "rem.u64" in text) == wide
