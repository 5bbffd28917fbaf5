"""FP8, UE8M0, bf16 and LogFMT of the shared headers against torch's conversions and the reference backend's codecs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

fp8 = pytest.importorskip("deepep_reference.fp8", reason="the package deepep-reference is not installed")
logfmt = pytest.importorskip("deepep_reference.logfmt", reason="the package deepep-reference is not installed")

if TYPE_CHECKING:
    from .conftest import Compile

BLOCK = 128
Codec = Callable[[str, np.ndarray], bytes]
EVERY_BF16 = np.arange(1 << 16, dtype=np.uint16)


@pytest.fixture(scope="module")
def codec(compile_program: Compile, tmp_path_factory: pytest.TempPathFactory) -> Codec:
    """``codec(name, array)``: the bytes that the program makes of the array's bytes."""
    program = compile_program("codecs.cpp", sanitizers="undefined")
    folder: Path = tmp_path_factory.mktemp("codecs")

    def run(name: str, values: np.ndarray) -> bytes:
        source, result = folder / "input", folder / "output"
        source.write_bytes(np.ascontiguousarray(values).tobytes())
        program.check(name, source, result)
        return result.read_bytes()

    return run


def bits(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)


def bf16(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)


def random_blocks(num_blocks: int, *, octaves: float, seed: int) -> torch.Tensor:
    """bf16 ``[num_blocks, 128]`` of both signs, magnitudes over so many octaves, some zeros."""
    random = np.random.default_rng(seed)
    exponent = random.uniform(-octaves, 0, (num_blocks, BLOCK)) + random.integers(-40, 40, (num_blocks, 1))
    sign = random.choice([-1.0, 1.0, 1.0, 0.0], exponent.shape, p=[0.45, 0.3, 0.2, 0.05])
    return torch.from_numpy(sign * 2.0**exponent).to(torch.bfloat16)


def blocks_of_every_magnitude() -> torch.Tensor:
    """bf16 ``[n, 128]``: one block for each finite magnitude, which is its largest, among random smaller ones."""
    largest = EVERY_BF16[:0x7F80]
    random = np.random.default_rng(3)
    values = (random.random((largest.size, BLOCK)) * (largest[:, None] + 1.0)).astype(np.uint16)
    values[np.arange(largest.size), random.integers(0, BLOCK, largest.size)] = largest
    return bf16(values | random.choice(np.array([0, 0x8000], dtype=np.uint16), values.shape))


def every_finite_value() -> torch.Tensor:
    """bf16 ``[510, 128]``: all finite values, neighbours in one block."""
    x = bf16(EVERY_BF16)
    return x[x.isfinite()].unflatten(0, (-1, BLOCK))


def around_every_e4m3() -> np.ndarray:
    """float32: every finite e4m3 number, every midpoint of two neighbours, what is next to either, of both signs."""
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    values = np.concatenate([table, (table[1:] + table[:-1]) / 2, np.float32([2.0**-130, 1e-30, 449, 464, 480, 1e30])])
    near = np.concatenate([np.nextafter(values, np.float32(np.inf)), values, np.nextafter(values, np.float32(-np.inf))])
    return np.concatenate([near, -near]).astype(np.float32)


def test_every_bf16_becomes_its_float32(codec: Codec) -> None:
    ours = np.frombuffer(codec("bf16_to_float", EVERY_BF16), np.uint32)
    assert np.array_equal(ours, EVERY_BF16.astype(np.uint32) << 16)


def test_float32_rounds_to_bf16_as_torch_does(codec: Codec) -> None:
    low_halves = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    values = (EVERY_BF16.astype(np.uint32)[:, None] << 16 | low_halves).reshape(-1).view(np.float32)
    ours = np.frombuffer(codec("float_to_bf16", values), np.uint16)
    expected = bits(torch.from_numpy(values.copy()).to(torch.bfloat16))
    is_nan = np.isnan(values)
    assert np.array_equal(ours[~is_nan], expected[~is_nan])
    assert (ours[is_nan] == 0x7FFF).all()


def test_every_e4m3_becomes_its_float32(codec: Codec) -> None:
    codes = np.arange(256, dtype=np.uint8)
    ours = np.frombuffer(codec("e4m3_to_float", codes), np.float32)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(ours, expected, equal_nan=True)
    assert np.array_equal(np.signbit(ours), np.signbit(expected))


def test_float32_rounds_to_e4m3_as_torch_does(codec: Codec) -> None:
    every_bf16 = (EVERY_BF16.astype(np.uint32) << 16).view(np.float32)
    values = np.concatenate([around_every_e4m3(), every_bf16])
    ours = np.frombuffer(codec("float_to_e4m3", values), np.uint8)
    expected = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    is_nan = np.isnan(values)
    assert np.array_equal(ours[~is_nan], expected[~is_nan])
    assert (ours[is_nan] == 0x7F).all()


@pytest.mark.parametrize("round_scale", [False, True], ids=["exact-scale", "power-of-two-scale"])
@pytest.mark.parametrize(
    "blocks",
    [every_finite_value, blocks_of_every_magnitude, lambda: random_blocks(8192, octaves=12, seed=5)],
    ids=["neighbours", "every-amax", "random"],
)
def test_fp8_blocks_equal_the_reference(codec: Codec, round_scale: bool, blocks: Callable[[], torch.Tensor]) -> None:
    x = blocks()
    num_blocks = x.shape[0]
    raw = codec("fp8_rounded" if round_scale else "fp8", bits(x))
    q = np.frombuffer(raw, np.uint8, x.numel())
    scale = np.frombuffer(raw, np.uint32, num_blocks, offset=x.numel())
    expected_q, expected_scale = fp8.cast(x, round_scale=round_scale)
    assert np.array_equal(scale, expected_scale[:, 0].numpy().view(np.uint32))
    different = np.flatnonzero(q != expected_q.view(torch.uint8).numpy().reshape(-1))
    assert different.size == 0, (
        f"first of {different.size}: block {different[0] // BLOCK}, value {different[0] % BLOCK}"
    )
    if round_scale:
        words = np.frombuffer(raw, np.uint32, offset=x.numel() + 4 * num_blocks)
        in_fours = expected_scale[: num_blocks // 4 * 4].reshape(-1, 4)
        assert np.array_equal(words, fp8.pack_ue8m0(in_fours)[:, 0].numpy().view(np.uint32))


@pytest.mark.parametrize("bad", [float("nan"), float("-nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["fp8", "fp8_rounded"])
def test_an_fp8_block_with_nan_or_infinity_decodes_to_nan(codec: Codec, name: str, bad: float) -> None:
    x = random_blocks(BLOCK, octaves=4, seed=6)
    x[torch.arange(BLOCK), torch.arange(BLOCK)] = bad
    raw = codec(name, bits(x))
    q = torch.frombuffer(bytearray(raw[: x.numel()]), dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    scale = torch.frombuffer(bytearray(raw), dtype=torch.float32, count=BLOCK, offset=x.numel())
    assert (q.unflatten(0, (-1, BLOCK)) * scale[:, None]).isnan().all()
    codes = np.frombuffer(raw, np.uint8, x.numel())
    assert 0xFF not in codes  # the only NaN that the cast makes is 0x7f


@pytest.mark.parametrize(
    "blocks",
    [
        every_finite_value,
        blocks_of_every_magnitude,
        lambda: random_blocks(4096, octaves=0.01, seed=7),
        lambda: random_blocks(4096, octaves=9, seed=8),
        lambda: random_blocks(4096, octaves=60, seed=9),
        lambda: torch.zeros(4, BLOCK, dtype=torch.bfloat16),
        lambda: torch.full((4, BLOCK), -1.5, dtype=torch.bfloat16),
    ],
    ids=["neighbours", "every-high", "one-value", "normal", "beyond-the-span", "zeros", "equal"],
)
def test_logfmt_equals_the_reference_within_one_level(codec: Codec, blocks: Callable[[], torch.Tensor]) -> None:
    x = blocks()
    check_logfmt(codec("logfmt", bits(x)), x)


def check_logfmt(raw: bytes, x: torch.Tensor) -> None:
    codes = np.frombuffer(raw, np.uint16, x.numel()).reshape(-1, BLOCK).astype(np.int32)
    extremes = np.frombuffer(raw, np.uint16, 2 * x.shape[0], offset=2 * x.numel()).reshape(-1, 2)
    decoded = np.frombuffer(raw, np.float32, offset=2 * x.numel() + 4 * x.shape[0]).reshape(-1, BLOCK)
    expected = logfmt.encode(x)
    level, expected_level = codes & 511, expected.level[:, 0].numpy().astype(np.int32)
    assert np.array_equal(extremes[:, 0], bits(expected.low)[:, 0])
    assert np.array_equal(extremes[:, 1], bits(expected.high)[:, 0])
    # What no logarithm decides is exact.
    assert np.array_equal(codes >> 9 != 0, expected.is_negative[:, 0].numpy())
    assert np.array_equal(level == 0, expected_level == 0)
    assert np.abs(level - expected_level).max() <= 1
    # Only values that lie nearly half-way between two levels may take either, and those are rare.
    assert (level != expected_level).mean() < 0.001
    # The reference's decoder makes the same of our codes, up to the rounding of its power of two.
    ours = logfmt.Encoded(
        level=torch.from_numpy(level.astype(np.int16))[:, None],
        is_negative=expected.is_negative,
        low=expected.low,
        high=expected.high,
    )
    np.testing.assert_allclose(decoded, logfmt.decode(ours).numpy(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_logfmt_block_with_nan_or_infinity_decodes_to_nan(codec: Codec, bad: float) -> None:
    x = random_blocks(BLOCK, octaves=4, seed=10)
    x[torch.arange(BLOCK), torch.arange(BLOCK)] = bad
    raw = codec("logfmt", bits(x))
    assert np.isnan(np.frombuffer(raw, np.float32, offset=2 * x.numel() + 4 * BLOCK)).all()


FP8_MISTAKES = {
    "the conversion truncates": ("codec/bits.hpp", "magnitude + 0x7ffffu + (magnitude >> 20 & 1)", "magnitude"),
    "ties go up": ("codec/bits.hpp", "magnitude + 0x7ffffu + (magnitude >> 20 & 1)", "magnitude + 0x80000u"),
    "the scale is a division": (
        "codec/fp8.hpp",
        "multiply_rn(bounded, kInverseMaxE4m3)",
        "divide_rn(bounded, kMaxE4m3)",
    ),
    "the factor is a reciprocal": (
        "codec/fp8.hpp",
        "divide_rn(kMaxE4m3, bounded)",
        "multiply_rn(kMaxE4m3, divide_rn(1.0f, bounded))",
    ),
    "there is no least amax": ("codec/fp8.hpp", "max_magnitude(amax, kMinAmax)", "amax"),
}


@pytest.mark.parametrize("name", FP8_MISTAKES)
def test_a_wrong_fp8_cast_is_found(compile_program: Compile, mutant_of: type, tmp_path: Path, name: str) -> None:
    header, old, new = FP8_MISTAKES[name]
    mutant = mutant_of(name=name, header=header, old=old, new=new)
    x = blocks_of_every_magnitude()
    (tmp_path / "input").write_bytes(bits(x).tobytes())
    compile_program("codecs.cpp", "-O0", mutant=mutant).check("fp8", tmp_path / "input", tmp_path / "output")
    q, scale = fp8.cast(x)
    assert (tmp_path / "output").read_bytes() != q.view(torch.uint8).numpy().tobytes() + scale.numpy().tobytes()


LOGFMT_MISTAKES = {
    "levels are truncated": ("rintf(divide_rn(", "floorf(divide_rn("),
    "values below the span are all lost": ("size < scale.low / 2", "size < scale.low"),
    "there are 510 steps too many": ("kTopLevel - 1)};", "2 * kTopLevel - 1)};"),
    "packing loses the upper bits": (
        "words[bit / 32 + 1] |= static_cast<uint32_t>(codes[i]) >>",
        "words[bit / 32 + 1] |= 0 >>",
    ),
}


@pytest.mark.parametrize("name", LOGFMT_MISTAKES)
def test_a_wrong_logfmt_is_found(compile_program: Compile, mutant_of: type, tmp_path: Path, name: str) -> None:
    old, new = LOGFMT_MISTAKES[name]
    program = compile_program(
        "codecs.cpp", "-O0", mutant=mutant_of(name=name, header="codec/logfmt.hpp", old=old, new=new)
    )
    x = random_blocks(512, octaves=60, seed=11)
    (tmp_path / "input").write_bytes(bits(x).tobytes())
    if program.run("logfmt", tmp_path / "input", tmp_path / "output").returncode == 0:
        with pytest.raises(AssertionError):
            check_logfmt((tmp_path / "output").read_bytes(), x)
