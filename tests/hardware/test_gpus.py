"""The catalogue: figures known by hand from public listings, names, and what must hold for every row."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict

import pytest

from peftplan.datafiles import load
from peftplan.errors import InputError, UnknownNameError
from peftplan.hardware.gpus import Gpu, find_gpu, gpus

IDS = [gpu.id for gpu in gpus()]

SHARED_DRIVER_NAMES = {  # the driver's name → the card that it means here, the smallest of its name
    "NVIDIA GeForce RTX 2060": "rtx-2060",
    "NVIDIA GeForce RTX 3080": "rtx-3080",
    "NVIDIA GeForce RTX 3080 Laptop GPU": "rtx-3080-laptop-8gb",
    "NVIDIA GeForce RTX 4060 Ti": "rtx-4060-ti-8gb",
    "NVIDIA GeForce RTX 5060 Ti": "rtx-5060-ti-8gb",
    "AMD Instinct MI50": "mi50-16gb",
}


def _records(gpu: Gpu) -> list[int]:
    return sorted(record.mib for record in gpu.cuda_total_mib)


def test_catalogue_size_and_unique_ids() -> None:
    assert len(IDS) == 155
    assert len(set(IDS)) == len(IDS)


@pytest.mark.parametrize(
    ("name", "gpu_id"),
    [
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("geforce rtx4090", "rtx-4090"),
        (" 4090 ", "rtx-4090"),
        ("a100-80gb", "a100-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("H100 80GB HBM3", "h100-80gb"),
        ("h100", "h100-80gb"),
        ("T4", "t4"),
        ("Tesla T4", "t4"),
        ("Tesla V100 16GB", "v100-16gb"),
        ("NVIDIA GB10", "dgx-spark"),
        ("amd instinct mi300x", "mi300x"),
        ("MI300X", "mi300x"),
        ("a100", "a100-40gb"),  # documented in the row's notes
        ("rtx 4060 ti", "rtx-4060-ti-8gb"),
        ("RTX 4060 Ti 16GB", "rtx-4060-ti-16gb"),
    ],
)
def test_names_people_write(name: str, gpu_id: str) -> None:
    assert find_gpu(name).id == gpu_id


def test_every_id_alias_and_driver_name_resolves_to_its_card() -> None:
    for gpu in gpus():
        for name in (gpu.id, *gpu.aliases, gpu.name):
            assert find_gpu(name) == find_gpu(SHARED_DRIVER_NAMES.get(name, gpu.id)), name


def test_no_two_cards_share_an_id_or_alias() -> None:
    owners = defaultdict(set)
    for gpu in gpus():
        for name in (gpu.id, *gpu.aliases):
            owners["".join(c for c in name.lower() if c.isalnum() or c == "+")].add(gpu.id)
    assert {name: ids for name, ids in owners.items() if len(ids) > 1} == {}


def test_shared_driver_names_mean_the_smallest_card() -> None:
    by_name = defaultdict(list)
    for gpu in gpus():
        by_name[gpu.name].append(gpu)
    shared = {name: cards for name, cards in by_name.items() if len(cards) > 1}
    assert shared.keys() == SHARED_DRIVER_NAMES.keys()
    for name, cards in shared.items():
        assert find_gpu(name).marketed_gb == min(card.marketed_gb or 0 for card in cards)


@pytest.mark.parametrize("name", ["rtx 4900", "", "gpu", "24", "-24GiB", "24 TiB"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UnknownNameError):
        find_gpu(name)


def test_unknown_name_shows_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean rtx-4090"):
        find_gpu("RTX 4900")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24GiB", 25_769_803_776),  # 24 × 2³⁰
        ("24 gib", 25_769_803_776),
        ("40000MiB", 41_943_040_000),  # 40,000 × 1,048,576
        ("24000MB", 24_000_000_000),
        ("23.5 GiB", 25_232_932_864),  # 23.5 × 2³⁰
    ],
)
def test_a_capacity_is_an_anonymous_card(text: str, num_bytes: int) -> None:
    gpu = find_gpu(text)
    assert (gpu.name, gpu.capacity_bytes, gpu.vendor) == (text, num_bytes, None)


@pytest.mark.parametrize("text", ["24GB", "24G", "24 gb", "24g"])
def test_a_size_in_gb_is_a_card_sold_as_such(text: str) -> None:
    gpu = find_gpu(text)
    assert (gpu.id, gpu.name, gpu.sold_gb, gpu.capacity_bytes) == (text, text, 24, None)


def test_a_capacity_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="above zero"):
        find_gpu("0GiB")


@pytest.mark.parametrize(
    ("name", "marketed_gb", "total_mib", "records", "capability"),
    [  # nvidia-smi listings and device totals that anyone with the card can print
        ("rtx-4090", 24, 24564, [24080, 24082, 24210, 24217, 24563], "8.9"),
        ("a100-80gb", 80, 81920, [81038], "8.0"),
        ("a100-pcie-80gb", 80, 81920, [81154], "8.0"),
        ("h100-80gb", 80, 81559, [81081, 81116], "9.0"),
        ("t4", 16, 15360, [14912, 15095, 15102, 15110], "7.5"),
        ("rtx-3090", 24, 24576, [24121, 24126, 24265, 24268], "8.6"),
        ("mi250", 64, None, [], "gfx90a"),  # two devices of 64 GB on one card
        ("b300", 288, 275040, [274073], "10.3"),  # 267.7 GiB as printed: (267.65 × 1024 = 274,073.6)
    ],
)
def test_known_cards(name: str, marketed_gb: int, total_mib: int | None, records: list[int], capability: str) -> None:
    gpu = find_gpu(name)
    assert (gpu.marketed_gb, gpu.total_mib, gpu.compute_capability) == (marketed_gb, total_mib, capability)
    assert _records(gpu) == records


def test_sizes_are_ordered() -> None:
    """CUDA's total ≤ nvidia-smi's ≤ the marketed GB read as GiB: no card is an exception."""
    for gpu in gpus():
        marketed_mib = (gpu.marketed_gb or 0) * 1024
        assert (gpu.total_mib or 0) <= marketed_mib, gpu.id
        assert all(mib <= (gpu.total_mib or marketed_mib) for mib in _records(gpu)), gpu.id


FAR_BELOW_MARKETED = {"mi300a", "strix-halo-128gb"}
"""Memory shared with the CPU, of which a program gets a part that the system sets."""


def test_no_size_is_far_from_the_marketed_one() -> None:
    """A slipped digit or a vGPU slice would show: at least 91 % of the marketed size (T4: 14,912 of 16,384 = 91.02 %)."""
    far = {gpu.id for gpu in gpus() for mib in _records(gpu) if mib < 0.91 * 1024 * (gpu.marketed_gb or 0)}
    far |= {gpu.id for gpu in gpus() if gpu.total_mib and gpu.total_mib < 0.91 * 1024 * (gpu.marketed_gb or 0)}
    assert far == FAR_BELOW_MARKETED


def test_every_row_and_figure_has_its_source() -> None:
    legend = load("gpus.json", dict)["cited"]
    for gpu in gpus():
        assert gpu.sources, gpu.id
        assert (gpu.total_mib is None) == (gpu.total_mib_source is None), gpu.id
        assert (gpu.bandwidth_gb_per_s is None) == (gpu.bandwidth_source is None), gpu.id
        assert all(record.source and record.how for record in gpu.cuda_total_mib), gpu.id
        assert all(variant.source for variant in gpu.total_mib_variants), gpu.id
        for source in gpu.sources:
            package = " ".join(source.split()[:2])
            assert package in legend or ":" in source, source


def test_flags_follow_compute_capability_on_nvidia() -> None:
    """bf16 from 8.0 (Ampere), fp8 from 8.9 (Ada and Hopper), in hardware."""
    for gpu in gpus():
        if gpu.vendor == "NVIDIA":
            capability = tuple(int(part) for part in (gpu.compute_capability or "").split("."))
            assert (gpu.bf16, gpu.fp8) == (capability >= (8, 0), capability >= (8, 9)), gpu.id
        else:
            assert (gpu.compute_capability or "").startswith("gfx"), gpu.id


def test_import_reads_no_data_and_no_heavy_library() -> None:
    code = (
        "import sys; import peftplan.hardware.gpus, peftplan.hardware.usable, peftplan.hardware.context;"
        "from peftplan.datafiles import parsed; assert parsed.cache_info().currsize == 0;"
        "assert not {'torch', 'transformers', 'pydantic', 'rich', 'click', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
