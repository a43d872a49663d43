"""Repositories of Unsloth that leave layers in 16 bits: which names stand for them, and what they take."""

from __future__ import annotations

import pytest

import peftplan
from peftplan.datafiles import load
from peftplan.job.configs.read import read_text
from tests.memory.test_kernels import QLORA, UNSLOTH

SOURCE = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("NAME", max_seq_length=2048, SETTINGS)
model = FastLanguageModel.get_peft_model(model, r=16)
SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=2, max_steps=60)).train()
"""
PHI_4 = ("lm_head", *(f"model.layers.{n}.mlp" for n in (1, 2, 3)), *(f"model.layers.{n}.self_attn.o_proj" for n in (37, 39)))


@pytest.mark.parametrize(
    ("name", "settings", "known"),
    [
        ("unsloth/Phi-4", "", True),
        ("microsoft/phi-4", "", True),
        ("unsloth/phi-4-unsloth-bnb-4bit", "", True),
        ("unsloth/Phi-4", "load_in_4bit=False", False),
        ("unsloth/Phi-4", "use_exact_model_name=True", False),
    ],
)
def test_layers_that_a_repository_leaves_in_16_bits(name: str, settings: str, known: bool) -> None:
    """Where the repository of a name publishes them. Loaded otherwise, all layers are as the file says."""
    plan = read_text(SOURCE.replace("NAME", name).replace("SETTINGS", settings), file="a.py")
    skipped = plan.options.get("quant_skip_modules", ())
    assert (set(PHI_4) <= set(skipped)) is known  # type: ignore[arg-type]
    assert "quantization_config.llm_int8_skip_modules" not in plan.unsupported


@pytest.mark.parametrize(
    ("name", "assumed"),
    [("unsloth/Meta-Llama-3.1-8B", False), ("unsloth/Llama-3.1-8B", True), ("meta-llama/Llama-3.1-8B-Instruct", True)],
)
def test_weights_under_a_new_name_are_assumed_to_be_stored_as_before(name: str, assumed: bool) -> None:
    """The published layers are those of the former name; Unsloth's mapper has a repository for each name."""
    plan = read_text(SOURCE.replace("NAME", name).replace("SETTINGS", ""), file="a.py")
    assert "model.layers.1.mlp" in plan.options["quant_skip_modules"]  # type: ignore[operator]
    assert ("quant_skip_modules" in plan.assumed) is assumed
    assert not plan.unsupported


@pytest.mark.parametrize(("model", "kept"), [("microsoft/phi-4", True), ("llama-3.2-1b", False)])
def test_layers_in_16_bits_are_those_of_the_file_s_model(model: str, kept: bool) -> None:
    plan = read_text(SOURCE.replace("NAME", "unsloth/Phi-4").replace("SETTINGS", ""), file="a.py")
    result = peftplan.estimate(model, config=plan)
    assert ("quant_skip_modules" in result.assumptions) is kept


def test_the_experts_of_gpt_oss_are_linear_layers_in_4_bits() -> None:
    """Measured on an A6000 with Unsloth 2026.6, 14.931 GiB while kbit preparation casts the head, as AegisLM's
    docs/FINETUNING_EXPERIMENT_PLAN.md has it, with 8.1 MiB of cuBLAS's workspace: within 0.1 %, a third of an expert in 16 bits.
    """
    plan = read_text(SOURCE.replace("NAME", "unsloth/gpt-oss-20b").replace("SETTINGS", ""), file="a.py")
    assert "quantization_config.llm_int8_skip_modules" not in plan.unsupported
    result = peftplan.estimate(config=plan)
    lines = result.to_dict()["memory"]["lines"]
    base = sum(line["bytes"] for line in lines if line["category"] in ("weights", "quant_state"))
    embedding = 201_088 * 2880
    biases = 24 * (32 * (5760 + 2880) + 4096 + 2 * 512 + 2880)
    routers, norms, sinks = 24 * 32 * (2880 + 1), (2 * 24 + 1) * 2880, 24 * 64
    cast = base + 2 * (embedding + biases + routers + norms + sinks) + 4 * embedding
    assert cast + 8.12 * 2**20 == pytest.approx(14.931 * 2**30, rel=1e-3)


REPOSITORIES = {row["repository"]: row["in_16_bits"] for row in load("configs/unsloth.json", dict)["repositories"]}


def test_a_repository_has_the_elements_that_unsloth_printed() -> None:
    """nb/Llama3.1_(8B)-GRPO.ipynb, Unsloth 2025.3.8: a packed byte is one element, so two parameters of 4 bits are one."""
    result = in_4_bits("llama-3.1-8b", REPOSITORIES["unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit"], r=32)
    assert result.total_parameters - result.assumptions["quantized_parameters"] // 2 == 4_712_566_784


@pytest.mark.parametrize(
    ("model", "repository", "adapters", "gib"),
    [
        ("llama-3.1-8b", "unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit", 0, 5.5976),
        ("llama-3.2-1b", "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", 0, 1.0453),
        ("qwen2.5-1.5b", "unsloth/Qwen2.5-1.5B-unsloth-bnb-4bit", 0, 1.3190),
        ("qwen2.5-3b", "unsloth/Qwen2.5-3B-Instruct-unsloth-bnb-4bit", 0, 2.2160),
        ("phi-4", "unsloth/phi-4-unsloth-bnb-4bit", 65_536_000, 10.043),
        ("phi-4", None, 0, 8.4920),
        ("qwen3-4b", "unsloth/Qwen3-4B-unsloth-bnb-4bit", 66_060_288, 3.6),
        ("gemma-3-4b-it", "unsloth/gemma-3-4b-it-unsloth-bnb-4bit", 14_901_248 // 2, 4.283),
        ("qwen2.5-vl-7b-instruct", "unsloth/Qwen2.5-VL-7B-Instruct-unsloth-bnb-4bit", 20_185_088 // 2, 6.5295),
    ],
)
def test_a_repository_takes_what_was_measured(model: str, repository: str | None, adapters: int, gib: float) -> None:
    """vLLM's "model weights took" in the outputs that name each list, and in nb/Phi_4_(14B)-GRPO.ipynb, there with all layers
    in 4 bits; what nb/Phi_4-Conversational.ipynb and nb/Gemma3_(4B).ipynb had reserved before they trained, with adapters in
    fp32, Gemma's in 16 bits. vLLM's first engine counts weights alone, its second the place of an adapter in 16 bits too, of rank
    64 for Qwen3 (0.15) and of rank 8 for Qwen2.5-VL (0.10.2, kgaero/RL_GSPO_Qwen2.5_7B:error.txt), half of what it takes in fp32.
    vLLM and the allocator take more, of layers in 4 bits too; without the list, 5 to 31 % would be missing.
    """
    result = in_4_bits(model, None if repository is None else REPOSITORIES[repository])
    counted = result.static.bytes(("weights", "quant_state")) + 4 * adapters
    assert 0.98 < counted / 2**30 / gib < 1


def test_a_layer_in_16_bits_adds_what_a_rehearsal_had_more() -> None:
    """Unsloth 2026.10.9, Llama 3.2 1B with adapters of rank 16, 2 rows of 1,024 tokens on an emulated A100, with this layer among
    those that it leaves out and without: 1,572,950,528 - 1,498,257,920 in forward, as much more in backward and in the step.
    """
    with_it, without = (
        peftplan.estimate(
            *("llama-3.2-1b",),
            **{**UNSLOTH, **QLORA, "kernels": "unsloth", "batch_size": 2, "seq_len": 1024, "quant_skip_modules": skipped},
        ).peaks
        for skipped in (("lm_head", "model.layers.1.mlp"), ("lm_head",))
    )
    assert with_it is not None
    assert without is not None
    more = {phase: with_it.by_phase[phase] - without.by_phase[phase] for phase in ("forward", "backward", "step")}
    assert set(more.values()) == {74_692_608}


def in_4_bits(model: str, skipped: list[str] | None, r: int = 16) -> peftplan.Estimate:
    """A model as Unsloth stores it."""
    projections = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    options = {"quant_skip_modules": skipped} if skipped else {}
    if model != "phi-4":
        options["target_modules"] = projections.split(",")
    return peftplan.estimate(model, method="qlora", double_quant=True, r=r, kbit_prepare=False, **options)


QWEN = "unsloth/Qwen3-14B-unsloth-bnb-4bit"


def _stored(shape: tuple[int, int], *, packed: bool) -> list[int]:
    """A bias is left out. bitsandbytes, functional.py (`QuantState.as_dict`): absmax in 8 bits for 64 numbers each, fp32 for 256
    of these, both code tables, and a state of some 170 characters."""
    numel = shape[0] * shape[1]
    return [numel // 2, numel // 64, -(-numel // 64 // 256) * 4, 1024, 64, 170] if packed else [2 * numel]


def _files(tensors: list[int], limit: float) -> list[float]:
    """Sizes in GB as huggingface_hub's `split_state_dict_into_shards_factory` makes them, in the order of the tensors."""
    files = [0]
    for nbytes in tensors:
        if files[-1] + nbytes > limit:
            files.append(0)
        files[-1] += nbytes
    return [nbytes / 1e9 for nbytes in files]


def test_a_repository_has_files_of_the_sizes_that_a_notebook_printed() -> None:
    """Headers of files, 0.0006 GB each, and norms are left out, and biases but for those of experts, 1.6 MB a layer."""
    table = [2 * 201_088 * 2880]
    attention = [(4096, 2880), (512, 2880), (512, 2880), (2880, 4096)]
    layer = [n for shape in attention for n in _stored(shape, packed=True)] + _stored((128, 2880), packed=False)
    for shape in ((5760, 2880), (2880, 2880)):
        layer += 128 * [*_stored(shape, packed=True), 2 * shape[0]]
    assert _files([*table, *36 * layer, *table], 4e9) == pytest.approx([4.0] * 15 + [2.14], abs=0.0056)
    assert REPOSITORIES["unsloth/gpt-oss-120b-unsloth-bnb-4bit"] == ["lm_head"]

    table = [2 * 151_936 * 5120]
    attention = [(5120, 5120), (1024, 5120), (1024, 5120), (5120, 5120)]
    mlp = [(17_408, 5120), (17_408, 5120), (5120, 17_408)]
    layers = [
        _stored(shape, packed=shape in attention or f"model.layers.{number}.mlp" not in REPOSITORIES[QWEN])
        for number in range(40)
        for shape in (*attention, *mlp)
    ]
    assert _files([*table, *(n for layer in layers for n in layer), *table], 5e9) == pytest.approx([4.97, 4.59, 1.56], abs=0.005)


def test_how_much_of_a_vision_model_a_repository_leaves_in_16_bits() -> None:
    """Qwen3-VL 8B in the order of its modules: of whole MLPs and attentions beside the tower, one and four alone make the sizes
    that nb/Qwen3_VL_(8B)-Vision-GRPO.ipynb printed."""
    width, merged, inner = 1152, 4 * 1152, 4304
    block = [4 * width, 3 * width * (width + 1), width * (width + 1), inner * (width + 1), width * (inner + 1)]
    merger = [merged * (merged + 1), 4096 * (merged + 1)]
    tower = [2 * n for n in (width * (3 * 2 * 16 * 16 + 1), 2304 * width, *27 * block, *4 * merger)]
    table = [2 * 151_936 * 4096]
    attention, mlp = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)], [(12_288, 4096), (12_288, 4096), (4096, 12_288)]

    def files(mlps: int, attentions: int) -> list[float]:
        layers = [
            n
            for layer in range(36)
            for shapes, apart in ((attention, range(3, 3 + attentions)), (mlp, range(1, 1 + mlps)))
            for shape in shapes
            for n in _stored(shape, packed=layer not in apart)
        ]
        return _files([*tower, *table, *layers, *table], 5e9)

    printed = pytest.approx([4.98, 2.72], abs=0.006)
    assert [(mlps, attentions) for mlps in range(4) for attentions in range(9) if files(mlps, attentions) == printed] == [(1, 4)]
    of_layers = [name.rpartition(".")[2] for name in REPOSITORIES["unsloth/Qwen3-VL-8B-Instruct-unsloth-bnb-4bit"][2:]]
    assert of_layers == ["mlp", *4 * ["self_attn"]]


def test_how_much_of_gemma_3_two_repositories_leave_in_16_bits() -> None:
    """Files of 4,562,294,331 and 4,375,543,541 bytes, nb/Gemma3_(4B)-Vision-GRPO.ipynb and nb/Gemma3_(4B)-Vision.ipynb: the first
    is known to leave six MLPs and one attention. An MLP has as many weights as five attentions; a matrix in 4 bits has five
    tensors besides, of which the header of the file names each in some 145 bytes."""
    attention, mlp = [(2048, 2560), (1024, 2560), (1024, 2560), (2560, 2048)], [(10_240, 2560), (10_240, 2560), (2560, 10_240)]

    def more(mlps: int, attentions: int) -> int:
        apart = mlps * mlp + attentions * attention
        return sum(sum(_stored(shape, packed=False)) - sum(_stored(shape, packed=True)) - 5 * 145 for shape in apart)

    less = 4_562_294_331 - 4_375_543_541
    counts = [(mlps, attentions) for mlps in range(35) for attentions in range(35)]
    assert [both for both in counts if more(6, 1) - more(*both) == pytest.approx(less, abs=3000)] == [(4, 3)]
    of_layers = [name.rpartition(".")[2] for name in REPOSITORIES["unsloth/gemma-3-4b-pt-unsloth-bnb-4bit"][2:]]
    assert of_layers == [*4 * ["mlp"], *3 * ["self_attn"]]


@pytest.mark.parametrize(
    ("model", "repository", "printed"),
    [
        ("llama-3.1-8b", "Meta-Llama-3.1-8B-Instruct", 5.96),
        ("llama-3.2-3b-instruct", "Llama-3.2-3B-Instruct", 2.35),
        ("qwen2.5-3b-instruct", "Qwen2.5-3B-Instruct", 2.36),
        ("qwen2.5-vl-7b-instruct", "Qwen2.5-VL-7B-Instruct", 6.90),
        ("gemma-3-4b-it", "gemma-3-4b-it", 4.56),
        ("gemma-3-4b-pt", "gemma-3-4b-pt", 4.38),
        ("qwen3-14b", "Qwen3-14B", 4.97 + 4.59 + 1.56),
        ("qwen3-vl-8b-instruct", "Qwen3-VL-8B-Instruct", 4.98 + 2.72),
    ],
)
def test_files_of_repositories_are_as_large_as_notebooks_printed(model: str, repository: str, printed: float) -> None:
    """GB; unslothai/notebooks@bdda2efc, files that Llama3.1_(8B)-GRPO, Meta_Synthetic_Data_Llama3_2_(3B), Qwen2.5_(3B)-GRPO,
    Qwen2_5_7B_VL_GRPO, Gemma3_(4B)-Vision-GRPO, Gemma3_(4B)-Vision, Qwen3_(14B)-Reasoning-Conversational and
    Qwen3_VL_(8B)-Vision-GRPO load, to two digits each."""
    result = in_4_bits(model, REPOSITORIES[f"unsloth/{repository}-unsloth-bnb-4bit"])
    lines = result.to_dict()["memory"]["lines"]
    base = sum(line["bytes"] for line in lines if line["category"] in ("weights", "quant_state"))
    assert base / 1e9 == pytest.approx(printed, abs=0.006)


def test_which_mlps_are_in_16_bits_changes_little() -> None:
    """The sizes of the files say how many, of which the first is in layers 0 to 16 and two in 18 to 39."""
    plan = read_text(SOURCE.replace("NAME", "unsloth/Qwen3-14B").replace("SETTINGS", ""), file="a.py")
    assert not plan.unsupported
    assert "which layers have them is not known" in plan.assumed["quant_skip_modules"]
    peaks = peftplan.estimate(config=plan).peaks
    assert peaks is not None
    for places, drift in (((0, 20, 30), 0.002), ((3, 38, 39), 0.004)):
        skipped = ["lm_head", *(f"model.layers.{place}.mlp" for place in places)]
        other = peftplan.estimate(config=plan, quant_skip_modules=skipped).peaks
        assert other is not None
        assert (other.allocated, other.reserved) == pytest.approx((peaks.allocated, peaks.reserved), rel=drift)
