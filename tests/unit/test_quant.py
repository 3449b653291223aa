"""The casts, against literal values and against definitions in other arithmetic (Python floats, fractions)."""

from __future__ import annotations

import math

import pytest
import torch

import deepep.quant as quant
from deepep.errors import InvalidArgument
from deepep.quant import SfFormat, fp8_cast, fp8_uncast, logfmt_cast, logfmt_roundtrip, logfmt_uncast

ALL_FORMATS = list(SfFormat)


def wide_values(*shape: int, octaves: float = 20.0, seed: int = 0) -> torch.Tensor:
    """bf16 values of both signs whose magnitudes spread over `octaves` powers of two below 1."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (sign * torch.exp2(-octaves * torch.rand(shape, generator=generator)) * 0.99).to(torch.bfloat16)


class TestFp8:
    def test_literal_scale_and_payload(self) -> None:
        x = torch.zeros(1, 128, dtype=torch.bfloat16)
        x[0, :4] = torch.tensor([896.0, -448.0, 1.0, 3.0])
        payload, sf = fp8_cast(x)
        assert sf.tolist() == [[2.0]]
        assert payload.dtype == torch.float8_e4m3fn
        assert payload[0, :5].float().tolist() == [448.0, -224.0, 0.5, 1.5, 0.0]

    def test_zero_group_uses_the_clamped_amax(self) -> None:
        payload, sf = fp8_cast(torch.zeros(2, 256))
        amax = torch.tensor(1e-4)
        assert torch.equal(sf, (amax / torch.tensor(448.0)).expand(2, 2))
        assert payload.float().abs().max() == 0

    def test_scale_is_the_correctly_rounded_quotient(self) -> None:
        x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
        _, sf = fp8_cast(x)
        amax = x.view(64, 4, 128).abs().amax(-1)
        # A float64 quotient of two float32 numbers rounds to the correctly rounded float32 quotient.
        assert torch.equal(sf, (amax.double() / 448).float())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("sf_format", ALL_FORMATS)
    def test_roundtrip_error(self, sf_format: SfFormat, dtype: torch.dtype) -> None:
        x = torch.randn(16, 1024, generator=torch.Generator().manual_seed(2)).to(dtype)
        back = fp8_uncast(*fp8_cast(x, sf_format), dtype=torch.float32)
        amax = x.float().view(16, -1, 128).abs().amax(-1, keepdim=True)
        scale = amax / 448 * (1 if sf_format is SfFormat.FLOAT32 else 2)
        # e4m3: half an ulp is 2**-4 of the value, and 2**-10 of the scale among subnormals.
        bound = torch.maximum(x.float().view(16, -1, 128).abs() * 2**-4, scale * 2**-10) * 1.001
        assert ((back - x.float()).view(16, -1, 128).abs() <= bound).all()

    def test_pow2_scales_are_rounded_up(self) -> None:
        x = torch.zeros(5, 128)
        x[:, 7] = torch.tensor([448.0, 449.0, 0.0, 224.0, 3.0])
        _, sf = fp8_cast(x, SfFormat.POW2)
        # 1e-4 / 448 = 2.2e-7 lies between 2**-23 and 2**-22.
        assert sf.flatten().tolist() == [1.0, 2.0, 2.0**-22, 0.5, 2.0**-7]

    def test_ue8m0_packs_little_endian(self) -> None:
        x = torch.zeros(1, 512)
        x[0, [0, 128, 256, 384]] = torch.tensor([448.0, 896.0, 1792.0, 224.0])
        payload, sf = fp8_cast(x, SfFormat.UE8M0)
        assert sf.dtype == torch.int32
        assert sf.shape == (1, 1)
        assert sf.item() == 127 | 128 << 8 | 129 << 16 | 126 << 24
        assert payload[0, [0, 128, 256, 384]].float().tolist() == [448.0] * 4

    def test_ue8m0_equals_pow2(self) -> None:
        x = wide_values(8, 1024)
        packed, unpacked = fp8_cast(x, SfFormat.UE8M0), fp8_cast(x, SfFormat.POW2)
        assert torch.equal(packed[0].view(torch.uint8), unpacked[0].view(torch.uint8))
        assert torch.equal(quant.ue8m0_to_float(packed[1]), unpacked[1])
        assert torch.equal(fp8_uncast(*packed), fp8_uncast(*unpacked))

    def test_ue8m0_high_exponents_do_not_spill_into_the_sign(self) -> None:
        x = torch.full((1, 512), 1e30)
        _, sf = fp8_cast(x, SfFormat.UE8M0)
        assert torch.equal(quant.ue8m0_to_float(sf), fp8_cast(x, SfFormat.POW2)[1])
        assert quant.ue8m0_to_float(torch.tensor([[255 | 127 << 8]], dtype=torch.int32))[0, :3].tolist()[1:] == [
            1,
            2**-127,
        ]

    def test_column_major_scales(self) -> None:
        x = wide_values(4, 1024)
        for sf_format in ALL_FORMATS:
            payload, sf = fp8_cast(x, sf_format)
            assert torch.equal(fp8_uncast(payload, sf.t().contiguous().t()), fp8_uncast(payload, sf))

    def test_shapes(self) -> None:
        for lead in [(), (0,), (3,), (2, 3)]:
            payload, sf = fp8_cast(torch.ones(*lead, 512), SfFormat.UE8M0)
            assert payload.shape == (*lead, 512)
            assert sf.shape == (*lead, 1)
            assert fp8_uncast(payload, sf).shape == (*lead, 512)

    def test_flags(self) -> None:
        assert SfFormat.from_flags(False, False) is SfFormat.FLOAT32
        assert SfFormat.from_flags(True, False) is SfFormat.POW2
        assert SfFormat.from_flags(True, True) is SfFormat.UE8M0
        with pytest.raises(InvalidArgument, match="round_scale"):
            SfFormat.from_flags(False, True)

    def test_bad_input(self) -> None:
        with pytest.raises(InvalidArgument, match="multiple of 128"):
            fp8_cast(torch.zeros(1, 100))
        with pytest.raises(InvalidArgument, match="multiple of 512"):
            fp8_cast(torch.zeros(1, 128), SfFormat.UE8M0)
        with pytest.raises(InvalidArgument, match="int64"):
            fp8_cast(torch.zeros(1, 128, dtype=torch.int64))
        payload, sf = fp8_cast(torch.zeros(1, 256))
        with pytest.raises(InvalidArgument, match="scale factors"):
            fp8_uncast(payload, sf[:, :1])
        with pytest.raises(InvalidArgument, match="float16"):
            fp8_uncast(payload, sf.half())


class TestLogFmt:
    def test_literal_codes(self) -> None:
        x = torch.zeros(1, 128, dtype=torch.bfloat16)
        # Four octaves: 2**-1 .. 2**-5, 510 / 4 = 127.5 codes per octave (ties to even).
        x[0, :7] = torch.tensor([0.5, 0.25, -0.125, 0.0625, 0.03125, 0.0, -0.0])
        words, amin_amax = logfmt_cast(x)
        assert amin_amax.tolist() == [[[0.03125, 0.5]]]
        assert words[0, :7].tolist() == [511, 1 + 382, 512 | 256, 1 + 128, 1, 0, 512]
        back = logfmt_uncast(words, amin_amax)
        assert back[0, [0, 2, 4]].tolist() == [0.5, -0.125, 0.03125]
        assert torch.equal(back[0, 5:7].view(torch.int16), x[0, 5:7].view(torch.int16))

    @pytest.mark.parametrize("octaves", [0.5, 4.0, 10.0, 20.0, 31.0])
    def test_relative_error(self, octaves: float) -> None:
        x = wide_values(64, 1024, octaves=octaves)
        error = (logfmt_roundtrip(x).float() - x.float()).abs() / x.float().abs()
        assert error.max() <= 2 ** (octaves / 1020) - 1 + 2**-8

    def test_extremes_and_zero_are_exact(self) -> None:
        x = wide_values(32, 128, octaves=30.0, seed=3)
        x[:, ::5] = 0
        back = logfmt_roundtrip(x)
        magnitude = x.abs().float()
        extreme = (magnitude == magnitude.amax(-1, keepdim=True)) | (
            magnitude == magnitude.masked_fill(x == 0, 2.0).amin(-1, keepdim=True)
        )
        assert torch.equal(back[extreme], x[extreme])
        assert torch.equal(back == 0, x == 0)

    def test_large_or_not_finite_groups_stay_bf16(self) -> None:
        x = wide_values(1, 512)
        x[0, 0], x[0, 130], x[0, 300] = 1.0, math.inf, math.nan
        words, _ = logfmt_cast(x)
        assert torch.equal(words[0, :384], x.view(torch.int16)[0, :384])
        assert torch.equal(logfmt_roundtrip(x).view(torch.int16)[0, :384], x.view(torch.int16)[0, :384])
        assert ((words[0, 384:] >= 0) & (words[0, 384:] < 1 << quant.LOGFMT_BITS)).all()

    def test_far_below_the_largest(self) -> None:
        x = torch.zeros(1, 128, dtype=torch.bfloat16)
        x[0, :4] = torch.tensor([0.5, 2.0**-33, 1.5 * 2.0**-34, 2.0**-36])
        assert logfmt_roundtrip(x)[0, :4].tolist() == [0.5, 2.0**-33, 2.0**-33, 0.0]

    def test_constant_and_zero_groups(self) -> None:
        x = torch.zeros(2, 128, dtype=torch.bfloat16)
        x[1] = -0.3
        assert torch.equal(logfmt_roundtrip(x), x)
        assert logfmt_cast(x)[0].unique().tolist() == [0, 512 | 1]

    def test_subnormals_become_zero(self) -> None:
        x = torch.zeros(1, 128, dtype=torch.int16)
        x[0, :2] = torch.tensor([0x007F, 0x0080], dtype=torch.int16)
        assert logfmt_roundtrip(x.view(torch.bfloat16)).view(torch.int16)[0, :3].tolist() == [0, 0x0080, 0]

    def test_every_magnitude_is_its_own_logarithm(self) -> None:
        magnitude = torch.arange(0x80, 0x7F80, dtype=torch.int32)
        assert torch.equal(quant._magnitude_of(quant._log_of(magnitude)), magnitude)

    def test_tables_are_far_from_rounding_ties(self) -> None:
        for m in range(256):
            exact = 65536 * math.log2(1 + m / 256)
            assert abs(exact - math.floor(exact) - 0.5) > 1e-4

    def test_shapes_and_errors(self) -> None:
        for lead in [(), (0,), (2, 3)]:
            words, amin_amax = logfmt_cast(torch.zeros(*lead, 256, dtype=torch.bfloat16))
            assert words.shape == (*lead, 256)
            assert amin_amax.shape == (*lead, 2, 2)
            assert logfmt_uncast(words, amin_amax).shape == (*lead, 256)
        with pytest.raises(InvalidArgument, match="bfloat16"):
            logfmt_cast(torch.zeros(1, 128))
        with pytest.raises(InvalidArgument, match="multiple of 128"):
            logfmt_cast(torch.zeros(1, 96, dtype=torch.bfloat16))
        with pytest.raises(InvalidArgument, match="amin_amax"):
            logfmt_uncast(words, amin_amax[..., :1, :])
