"""Usable bytes: hand sums for each rule, and that no answer is above any public record of the card."""

from __future__ import annotations

import pytest

from peftplan.hardware.gpus import Gpu, find_gpu, gpus
from peftplan.hardware.usable import usable_bytes

MIB = 1_048_576


@pytest.mark.parametrize(
    ("name", "mib"),
    [  # rule 1: the smallest record that is not from Windows
        ("rtx-4090", 24080),
        ("t4", 14912),
        ("a100-80gb", 81038),
        ("h100-80gb", 81081),
        ("a100-40gb", 40514),  # 40,654 MiB was seen too, under Windows
        ("mi300a", 98304),  # 96 GiB of the 128 GiB that the CPU shares
        # rule 2: floor(nvidia-smi total × reported / total of the worst card with at least half of it)
        ("rtx-5090", 31635),  # 32,607 × 15,825 / 16,311 = 31,635.4 (RTX 5060 Ti 16 GB, 2.98 % missing)
        ("h100-pcie", 80278),  # 81,559 × 48,380 / 49,152 = 80,278.0 (Quadro RTX 8000, 1.57 %)
        ("rtx-3060", 11714),  # 12,288 × 7,806 / 8,188 = 11,714.7 (RTX 4060 Laptop, 4.67 %); its two records are Windows'
        # rule 3: floor(marketed × 1024 × reported / marketed of the vendor's worst card)
        ("tesla-p40", 22368),  # 24,576 × 14,912 / 16,384 = 22,368.0 (T4, 8.98 %)
        ("mi250", 64138),  # 65,536 × 32,069 / 32,768 = 64,138.0 (MI50 32 GB, 2.13 %)
    ],
)
def test_by_hand(name: str, mib: int) -> None:
    assert usable_bytes(find_gpu(name)).bytes == mib * MIB


def _reported(gpu: Gpu) -> int | None:
    return min([record.mib for record in gpu.cuda_total_mib if record.os != "windows"], default=None)


def _worst(vendor: str, *, base: str) -> tuple[float, str]:
    """Share that is missing, and the card, over the vendor's cards with their own memory: straight from the data."""
    shares = []
    for gpu in gpus():
        size = gpu.total_mib if base == "total" else (gpu.marketed_gb or 0) * 1024
        if gpu.vendor == vendor and not gpu.unified and (reported := _reported(gpu)) and size:
            shares.append((1 - reported / size, gpu.id))
    return max(shares)


def test_the_fallback_shares_are_the_worst_in_the_catalogue() -> None:
    assert _worst("NVIDIA", base="marketed") == (pytest.approx(0.0898, abs=5e-5), "t4")
    assert _worst("AMD", base="marketed") == (pytest.approx(0.0213, abs=5e-5), "mi50-32gb")
    assert _worst("NVIDIA", base="total") == (pytest.approx(0.0796, abs=5e-5), "rtx-a2000-laptop")


def test_the_share_missing_shrinks_with_size_so_rule_2_compares_like_with_like() -> None:
    """Below 8 GiB CUDA leaves out more than 4.5 %, from 40 GB on less than 1.6 %."""
    small, large = [], []
    for gpu in gpus():
        if gpu.vendor == "NVIDIA" and not gpu.unified and gpu.total_mib and (reported := _reported(gpu)):
            group = small if gpu.total_mib < 8192 else large if gpu.total_mib >= 40_000 else None
            if group is not None:
                group.append(1 - reported / gpu.total_mib)
    assert len(small) >= 3
    assert len(large) >= 10
    assert max(large) < 0.016
    assert min(small) > 0.045


def test_never_above_a_public_record_or_the_nvidia_smi_total() -> None:
    for gpu in gpus():
        bounds = [record.mib for record in gpu.cuda_total_mib if record.os != "windows"]
        bounds += [gpu.total_mib] if gpu.total_mib else [(gpu.marketed_gb or 0) * 1024 * 1.001]
        assert 0 < usable_bytes(gpu).bytes <= min(bounds) * MIB, gpu.id


def test_why_names_the_evidence_and_says_what_was_not_measured() -> None:
    assert "24080 MiB" in usable_bytes(find_gpu("rtx-4090")).why
    for name in ("rtx-5090", "tesla-p40"):
        assert "not measured on this card" in usable_bytes(find_gpu(name)).why
    assert "rtx-5060-ti-16gb: 15825 of 16311 MiB" in usable_bytes(find_gpu("rtx-5090")).why
    assert "with ECC on nvidia-smi shows 46068 MiB" in usable_bytes(find_gpu("rtx-a6000")).why
    assert usable_bytes(find_gpu("mi300x")).why.startswith("HIP reports")


def test_a_capacity_is_usable_as_given() -> None:
    assert usable_bytes(find_gpu("24GiB")).bytes == 25_769_803_776


def test_a_size_in_gb_is_what_the_least_card_sold_with_it_gives() -> None:
    # Of the cards sold as 24 GB the A10 and the A10G show least in nvidia-smi, 23,028 MiB, of which a program gets 22,175;
    # the L4 gives 22,693 MiB, the RTX 4090 24,080, the RTX 3090 24,121. The Tesla P40 has no recorded total.
    usable = usable_bytes(find_gpu("24GB"))
    assert usable.bytes == usable_bytes(find_gpu("a10")).bytes < 22_693 * 2**20
    assert "sold as 24 GB" in usable.why
    assert usable_bytes(find_gpu("24G")) == usable
    for card in gpus():
        if card.marketed_gb == 24 and card.vendor == "NVIDIA":
            assert usable.bytes <= usable_bytes(card).bytes


def test_a_size_that_no_card_is_sold_with_is_read_as_gib_less_the_largest_share() -> None:
    # T4: 14,912 MiB of 16 GB; 7.5 × 1,024 × 14,912 / 16,384 = 6,990
    assert not [card.id for card in gpus() if card.marketed_gb == 7.5]
    assert usable_bytes(find_gpu("7.5GB")).bytes == 6_990 * 2**20
