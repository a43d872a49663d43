"""What files of ms-swift mean."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.errors import RefusedError
from peftplan.job.configs.plan import bound
from peftplan.job.configs.read import read_text
from peftplan.planning.configs import of_plan
from tests.job.configs.files import SWIFT, read
from tools.config_page import Case, refused_by


def test_keys_of_swifts_rollouts_are_known() -> None:
    """They stand in rlhf_trainers/args_mixin.py."""
    rollout = {"use_vllm": True, "vllm_mode": "colocate", "vllm_server_port": 8000, "sleep_level": 1, "reward_funcs": "accuracy"}
    plan = read({"model": "Qwen/Qwen2.5-7B-Instruct", "rlhf_type": "grpo", **rollout}, kind="command", program="swift rlhf")
    assert not plan.unsupported
    expected = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.9, "vllm_enable_sleep_mode": True}
    assert expected.items() <= plan.options.items()


def test_ranks_share_a_row_by_their_heads() -> None:
    """Qwen2.5 0.5B has two heads of keys: two ranks share a row of 4 x 1,024 tokens by Ulysses, four would need a ring."""
    values = {**SWIFT, "model": "Qwen/Qwen2.5-0.5B", "padding_free": True, "attn_impl": "flash_attn", "max_length": 1024}
    values |= {"per_device_train_batch_size": 4}
    of_ranks = [({**values, "sequence_parallel_size": ranks}, str(max(2, ranks))) for ranks in (1, 2, 4)]
    plans = [read(each, kind="command", program="swift sft", NPROC_PER_NODE=processes) for each, processes in of_ranks]
    assert [sorted(plan.unsupported) for plan in plans] == [[], [], ["sequence_parallel_size"]]
    assert [plan.options["seq_len"] for plan in plans[:2]] == [4096, 2048]
    assert [plan.options.get("loss") for plan in plans[:2]] == [None, "shared-rows"]
    shared = {**values, "sequence_parallel_size": 2}
    with_prompts = read({**shared, "rlhf_type": "grpo"}, kind="command", program="swift rlhf", NPROC_PER_NODE="2")
    assert "sequence_parallel_size" in with_prompts.unsupported
    for processes in ("1", "3"):  # no mesh of two has so many (sequence_parallel.py, `_init_device_mesh`)
        of_others = read(shared, kind="command", program="swift sft", NPROC_PER_NODE=processes)
        assert "sequence_parallel_size" in of_others.unsupported
    pictures = {**shared, "model": "Qwen/Qwen2.5-VL-7B-Instruct"}
    assert "sequence_parallel_size" in read(pictures, kind="command", program="swift sft", NPROC_PER_NODE="2").unsupported


def test_a_distillation_is_read_with_its_teacher() -> None:
    gkd = {**SWIFT, "model": "Qwen/Qwen2.5-7B", "tuner_type": "full", "rlhf_type": "gkd", "deepspeed": "zero3"}
    gkd |= {"teacher_model": "Qwen/Qwen2.5-14B-Instruct", "teacher_deepspeed": "zero3_offload"}
    plan = read(gkd, kind="command", program="swift rlhf")
    assert not plan.unsupported
    assert (plan.options["trainer"], plan.options["teacher_model"]) == ("swift-gkd", "Qwen/Qwen2.5-14B-Instruct")
    from_data = read({**gkd, "lmbda": 0}, kind="command", program="swift rlhf")
    assert from_data.options["trainer"] == "swift-gkd-of-data"
    own = read({**gkd, "teacher_model": "Qwen/Qwen2.5-7B", "tuner_type": "lora"}, kind="command", program="swift rlhf")
    assert own.unsupported.keys() == {"teacher_model"}
    without = read({**gkd, "teacher_model": None}, kind="command", program="swift rlhf")
    assert without.unsupported.keys() == {"rlhf_type"}


GRPO = {**SWIFT, "model": "Qwen/Qwen2.5-7B-Instruct", "tuner_type": "full", "rlhf_type": "grpo", "deepspeed": "zero3"}
SERVED = {"use_vllm": True, "vllm_mode": "server"}


@pytest.mark.parametrize(
    ("values", "effect"),
    [
        ({"teacher_model": "Qwen/Qwen2.5-14B-Instruct"}, "raises"),
        ({**SERVED, "move_model_batches": 8}, "lowers"),
        ({**SERVED, "enable_flattened_weight_sync": False}, "lowers"),
        ({"ds3_gather_for_generation": False}, "lowers"),
        ({"max_new_tokens": 4096}, "unknown"),
        ({"response_length": 4096}, "unknown"),
    ],
    ids=lambda values: next(reversed(values), "") if isinstance(values, dict) else "",
)
def test_what_changes_generation_has_no_exact_peak(values: dict[str, object], effect: str) -> None:
    """A teacher of GRPO lies on the GPU too; other parts of the weights are gathered or copied,
    and completions are longer."""
    plan = read({**GRPO, **values}, kind="command", program="swift rlhf")
    (key,) = plan.unsupported
    assert (key, plan.unsupported[key].effect) == (next(reversed(values)), effect)


def test_text_generated_in_evaluation_needs_data() -> None:
    """`predict_with_generate` is read where validation data are (trainers/seq2seq_trainer.py:34, `prediction_step`)."""
    values = {**SWIFT, "model": "Qwen/Qwen2.5-VL-7B-Instruct", "max_length": 2048}
    both = (values, values | {"predict_with_generate": True})
    alone, beside = (read(each, kind="command", program="swift sft") for each in both)
    assert beside.unsupported == alone.unsupported == {}
    assert beside.options == alone.options
    data = read({**both[1], "split_dataset_ratio": 0.1}, kind="command", program="swift sft")
    assert data.unsupported["predict_with_generate"].effect == "raises"


def test_flat_copies_and_chunks_of_another_size_have_no_peak() -> None:
    """Both sizes are told to ms-swift in its environment alone."""
    sized = [("SWIFT_UPDATE_WEIGHTS_BUCKET_SIZE", 4096, GRPO | SERVED, "swift rlhf", "vllm_mode")]
    shared = {**SWIFT, "model": "Qwen/Qwen2.5-0.5B", "packing": True, "attn_impl": "flash_attn", "sequence_parallel_size": 2}
    sized += [("CELOSS_PARALLEL_SIZE", size, shared, "swift sft", "sequence_parallel_size") for size in (1024, 4096)]
    for name, size, values, program, key in sized:
        launch = {"kind": "command", "program": program, "NPROC_PER_NODE": 2}
        assert read(values, **launch).unsupported == {}
        assert read(values, **launch, **{name: size}).unsupported.keys() == {key}
    chunked = read(shared, kind="command", program="swift sft", NPROC_PER_NODE=2, CELOSS_PARALLEL_SIZE=2048)
    assert (chunked.options["loss"], chunked.unsupported) == ("shared-rows-chunked", {})


@pytest.mark.parametrize(
    ("changed", "of_chunk", "peak"),
    [({}, 2048, True), ({"tuner_type": "full"}, 2048, False), ({}, 0, False), ({"model": "Qwen/Qwen3-30B-A3B"}, 2048, False)],
)
def test_parts_of_keys_go_round_where_they_are_fewer_than_ranks(changed: dict[str, object], of_chunk: int, peak: bool) -> None:
    """Qwen2.5 3B has two heads of keys: 8 ranks are four pairs in a ring. It was rehearsed with LoRA and a loss in chunks."""
    values = {**SWIFT, "model": "Qwen/Qwen2.5-3B-Instruct", "attn_impl": "flash_attn", "padding_free": True, "max_length": 65536}
    launch = {"kind": "command", "program": "swift sft", "NPROC_PER_NODE": 8, "CELOSS_PARALLEL_SIZE": of_chunk or 1024}
    plan = read({**values, "per_device_train_batch_size": 4, "sequence_parallel_size": 8, **changed}, **launch)
    assert (plan.unsupported == {}) is peak
    assert (plan.options["seq_len"] == 4 * 65536 // 8) is peak


MOE = "Qwen/Qwen3-30B-A3B-Instruct-2507"


@pytest.mark.parametrize("values", [{}, {"target_modules": "all-linear"}, {"experts_impl": "grouped_mm"}])
def test_swift_adapts_no_experts_and_may_drop(values: dict[str, object]) -> None:
    """It lists names of linear layers; its dropout is 0.05. 48 layers of q, k, v and o at rank 8, as peft counts them."""
    plan = read({**SWIFT, "model": MOE, **values}, kind="command", program="swift sft")
    assert not plan.unsupported
    result = peftplan.estimate(config=plan)
    assert result.trainable_parameters == 48 * 8 * (2 * (2048 + 4096) + 2 * (2048 + 512)) == 6_684_672
    assert result.bound is None


@pytest.mark.parametrize(
    ("model", "trainable"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", 28 * 8 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", 48 * 8 * (2 * (2048 + 4096) + 2 * (2048 + 512))),
        ("google/gemma-4-E4B-it", 19_439_616),
        ("google/gemma-4-26B-A4B", 9_999_360),
        ("Qwen/Qwen3.5-4B", 16_232_448),
        ("OpenGVLab/InternVL3-2B-hf", 9_232_384),
        ("meta-llama/Llama-4-Scout-17B-16E", 27_918_336),
        ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", 46_202_880),
        ("meta-llama/Llama-3.2-11B-Vision", 26_214_400),
    ],
)
def test_swift_trains_the_language_model_alone(model: str, trainable: int) -> None:
    """`get_multimodal_target_regex`: `freeze_vit` and `freeze_aligner` are on (utils/transformers_utils.py:208). The numbers are
    those of linear layers that it named of these models on the meta device."""
    plan = read({**SWIFT, "model": model, "freeze_aligner": True}, kind="command", program="swift sft")
    assert not plan.unsupported
    assert peftplan.estimate(config=plan).trainable_parameters == trainable
    full = read({**SWIFT, "model": model, "tuner_type": "full"}, kind="command", program="swift sft")
    assert full.options["method"] == "partial"  # `_init_multimodal_full`
    before_4 = {"model": model, "train_type": "full", "torch_dtype": "bfloat16"}
    assert read(before_4, kind="command", program="swift sft").options["trainable"] == full.options["trainable"]
    tower = read({**SWIFT, "model": model, "freeze_vit": False}, kind="command", program="swift sft")
    assert tower.unsupported.keys() == {"freeze_vit"}


@pytest.mark.parametrize(
    ("values", "key", "where"),
    [
        ({"optimizer": "muon"}, "optimizer", "optimizers/muon.py:15"),
        ({"rope_scaling": "yarn"}, "rope_scaling", "model/register.py:232"),
        ({"init_weights": "lora-ga"}, "init_weights", "train/tuner.py:218"),
        ({"quant_method": "hqq", "quant_bits": 8}, "quant_method", "quantizers/base.py:290"),
    ],
)
def test_what_swift_itself_raises_is_said(values: dict[str, object], key: str, where: str) -> None:
    """All but LoRA-GA's were rehearsed with ms-swift 4.6.0 (hqq 0.2.8): that ends in `from peft.tuners import BoneModel`."""
    plan = read({**SWIFT, **values}, kind="command", program="swift sft")
    assert plan.unsupported.keys() == {key}
    case = Case("run.sh", plan, of_plan(plan))
    assert case.entry.total_parameters is not None
    assert where in (refused_by(case) or "")


@pytest.mark.parametrize("values", [{"galore_optim_per_parameter": True}, {"galore_quantization": True}])
def test_swift_makes_no_galore(values: dict[str, object]) -> None:
    """transformers' Trainer calls `create_optimizer`; ms-swift's GaLore hangs on `create_optimizer_and_scheduler`."""
    plain = {"model": "Qwen/Qwen2.5-7B-Instruct", "tuner_type": "full"}
    plan, of_adamw = (
        read({**plain, **more}, kind="command", program="swift sft") for more in ({"use_galore": True, **values}, {})
    )
    assert not plan.unsupported
    assert "GaLore" in plan.assumed["optim"]
    assert plan.options == of_adamw.options


def test_layers_of_lisa_take_turns_on_one_gpu() -> None:
    """Under DeepSpeed they were not rehearsed."""
    values = {"model": "Qwen/Qwen2.5-7B-Instruct", "tuner_type": "full", "lisa_activated_layers": 2}
    plan = read(values, kind="command", program="swift sft")
    assert (plan.options["method"], plan.options["n_layers"], plan.unsupported) == ("lisa", 2, {})
    shared = read(values | {"deepspeed": "zero2"}, kind="command", program="swift sft", NPROC_PER_NODE="2")
    assert bound(shared.unsupported) == "at_most"


def test_files_of_swift_that_sample_or_run_megatron_are_told_apart() -> None:
    """Arguments of `swift sample`, and of Megatron under Ray (megatron/arguments/megatron_args.py)."""
    assert read({**SWIFT, "sampler_engine": "vllm", "num_return_sequences": 4}).kind == "other"
    plan = read({**SWIFT, "rlhf_type": "grpo", "micro_batch_size": 2, "global_batch_size": 16, "lr": 1e-6})
    assert Case("run.yaml", plan, of_plan(plan)).kind == "Megatron"


def test_other_experts_are_not_known() -> None:
    plan = read({**SWIFT, "model": MOE, "experts_impl": "eager"}, kind="command", program="swift sft")
    assert plan.unsupported.keys() == {"experts_impl"}


@pytest.mark.parametrize(
    ("ranks", "gpus", "nodes"), [("list(range(0, 4))", 4, None), (16, 8, 2), ("list(range(8, 12))", 4, None)]
)
def test_ray_starts_the_ranks_that_the_file_says(ranks: object, gpus: int, nodes: int | None) -> None:
    groups = {"nproc_per_node": 8 if ranks == 16 else 4, "default": {"device": "GPU", "ranks": ranks, "workers": ["default"]}}
    plan = read({**SWIFT, "deepspeed": "zero3", "use_ray": True, "device_groups": groups})
    assert not plan.unsupported
    assert (plan.options["gpus"], plan.options.get("nodes")) == (gpus, nodes)


@pytest.mark.parametrize("ranks", ["sorted({0, 1})", 6, "list(range(4, 4))"])
def test_ranks_of_ray_that_are_not_known_or_fill_no_nodes_are_said(ranks: object) -> None:
    groups = {"nproc_per_node": 4, "default": {"device": "GPU", "ranks": ranks, "workers": ["default"]}}
    assert read({**SWIFT, "deepspeed": "zero3", "device_groups": groups}).unsupported.keys() == {"device_groups"}


@pytest.mark.parametrize(("model", "unsupported"), [(SWIFT["model"], set()), ("meta-llama/Llama-3.2-1B", {"new_special_tokens"})])
def test_new_tokens_fit_where_the_embedding_has_rows_to_spare(model: str, unsupported: set[str]) -> None:
    """Qwen's tokenizers use at most 151,669 of 151,936 rows; Llama's use all of theirs."""
    plan = read({**SWIFT, "model": model, "new_special_tokens": "tokens.txt"}, kind="command", program="swift sft")
    assert plan.unsupported.keys() == unsupported
    assert ("new_special_tokens" in plan.assumed) is (not unsupported)


def test_a_placeholder_that_the_reader_fills_in_is_assumed() -> None:
    values = {**SWIFT, "task_type": "seq_cls", "num_labels": "<num-labels>"}
    plan = read(values, kind="command", program="swift sft")
    assert not plan.unsupported
    assert (plan.options["num_labels"], plan.assumed["num_labels"]) == (2, "the file has a placeholder; 2 is assumed")


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({}, {"trainer": "swift-dpo"}),
        ({"rlhf_type": "dpo", "beta": 0.2, "loss_type": "ipo"}, {"trainer": "swift-dpo", "beta": 0.2, "loss_type": "ipo"}),
        ({"rlhf_type": "orpo"}, {"trainer": "swift-orpo"}),
        ({"rlhf_type": "grpo", "max_length": 1000}, {"trainer": "swift-grpo", "seq_len": 1512, "max_completion_length": 512}),
        ({"rlhf_type": "grpo", "max_completion_length": 4000}, {"seq_len": 6048, "max_completion_length": 4000}),
        ({"rlhf_type": "grpo", "max_length": None}, {"seq_len": 2048 + 512, "max_completion_length": 512}),
    ],
)
def test_swift_names_its_trainer(values: dict[str, object], options: dict[str, object]) -> None:
    """`swift rlhf` trains by DPO unless told otherwise. GRPO's max_length is that of a prompt."""
    plan = read({**SWIFT, **values}, kind="command", program="swift rlhf")
    assert not plan.unsupported
    assert options.items() <= plan.options.items()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rlhf_type": "ppo"}, "rlhf_type"),
        ({"rlhf_type": "kto", "packing": True}, "packing"),
        ({"rlhf_type": "grpo", "padding_free": True}, "padding_free"),
        ({"rlhf_type": "simpo", "cpo_alpha": 0}, "cpo_alpha"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"rlhf_type": "grpo", "use_liger_kernel": True}, "use_liger_kernel"),
        # rehearsed: 7.28 GB, and 7.20 GB where completions alone have labels
        ({"rlhf_type": "grpo", "loss_scale": "all"}, "loss_scale"),
        ({"rlhf_type": "grpo", "num_generations": 1, "loss_type": "fipo"}, "loss_type"),
        ({"rlhf_type": "dpo", "loss_type": "sigmoid bco_pair sft"}, "loss_type"),
    ],
)
def test_of_swifts_trainers_some_are_not_read(values: dict[str, object], key: str) -> None:
    assert read({**SWIFT, **values}, kind="command", program="swift rlhf").unsupported.keys() == {key}


@pytest.mark.parametrize("name", ["gspo", "gspo_vlm", "grpo_vlm"])
def test_gspo_is_grpo_with_ratios_of_sequences(name: str) -> None:
    script = "--model_name_or_path Qwen/Qwen3-0.6B --num_generations 8 --beta 0.0 --importance_sampling_level sequence"
    plan = read_text(f"accelerate launch --num_processes 2 examples/scripts/{name}.py {script}\n", file="run.sh")
    assert (plan.options["trainer"], plan.options["beta"], dict(plan.unsupported)) == ("trl-grpo", 0.0, {})


def test_long_lora_of_swift_raises() -> None:
    """`fa2_forward() got an unexpected keyword argument 'past_key_values'`, of its own code in Llama of transformers 5.19."""
    plan = read({"model": "LLM-Research/Meta-Llama-3.1-8B-Instruct", "tuner_type": "longlora", "attn_impl": "flash_attn"})
    assert " raises TypeError" in plan.unsupported["tuner_type"].why


def test_reft_raises() -> None:
    """`unhashable type: 'ModelKeys'`, with pyreft 0.1.0, the newest that PyPI has."""
    plan = read({"model": "Qwen/Qwen2.5-7B-Instruct", "tuner_type": "reft", "reft_intervention_type": "LoreftIntervention"})
    assert " raises TypeError" in plan.unsupported["tuner_type"].why


@pytest.mark.parametrize(
    ("values", "unsupported"),
    [
        ({}, set()),
        ({"loss_type": "cosine_similarity"}, set()),
        ({"loss_type": "contrastive"}, {"task_type", "loss_type"}),
        ({"padding_free": False}, {"task_type", "loss_type"}),
        ({"tuner_type": "full"}, {"task_type", "loss_type"}),
        ({"deepspeed": "zero3"}, {"task_type", "loss_type"}),
        ({"max_length": None}, {"task_type", "loss_type"}),
    ],
)
def test_embeddings_of_texts_that_share_a_row(values: dict[str, object], unsupported: set[str]) -> None:
    """template/base.py:1908: each example is an anchor and its positive."""
    sizes = {"max_length": 1000, "per_device_train_batch_size": 4, "attn_impl": "flash_attn", "padding_free": True}
    job = {"model": "Qwen/Qwen3-Embedding-0.6B", "task_type": "embedding", "loss_type": "infonce", "deepspeed": "zero2"}
    plan = read({**SWIFT, **job, **sizes, **values}, kind="command", program="swift sft", NPROC_PER_NODE="2")
    assert plan.unsupported.keys() == unsupported
    if not unsupported:
        assert (plan.options["batch_size"], plan.options["seq_len"]) == (1, 2 * 4 * 1000)


@pytest.mark.parametrize(
    ("values", "texts", "expected"),
    [
        ({}, None, {"trainer": "swift-generative-reranker", "batch_size": 2 * 8, "seq_len": 1000}),
        ({}, 3, {"trainer": "swift-generative-reranker", "batch_size": 2 * 4, "seq_len": 1000}),
        ({"padding_free": True}, 1, {"trainer": "swift-generative-reranker-packed", "batch_size": 1, "seq_len": 2 * 2 * 1000}),
        ({"padding_free": True, "max_length": None}, None, {"batch_size": 1, "seq_len": 2 * 8 * 2048}),
        ({"packing": True}, None, {"trainer": "swift-generative-reranker-packed", "batch_size": 1, "seq_len": 2 * 1000}),
        (
            {"padding_free": True, "sequence_parallel_size": 4, "tuner_type": "full", "deepspeed": None},
            None,
            {"trainer": "swift-generative-reranker-shared-rows", "batch_size": 1, "seq_len": 2 * 8 * 1000 // 4},
        ),
    ],
)
def test_a_reranker_reads_all_texts_of_a_list(values: dict[str, object], texts: int | None, expected: dict[str, object]) -> None:
    """template/base.py:1940: one that answers the query, and at most MAX_NEGATIVE_SAMPLES that do not, 7 unless set."""
    sizes = {"max_length": 1000, "per_device_train_batch_size": 2, "attn_impl": "flash_attn", "deepspeed": "zero2"}
    job = {"model": "Qwen/Qwen3-Reranker-0.6B", "task_type": "generative_reranker", "loss_type": "listwise_reranker"}
    environment = {"NPROC_PER_NODE": "4"} | ({"MAX_NEGATIVE_SAMPLES": str(texts)} if texts else {})
    plan = read({**SWIFT, **job, **sizes, **values}, kind="command", program="swift sft", **environment)
    assert not plan.unsupported
    assert expected.items() <= plan.options.items()


def test_grpo_reads_a_row_whose_answer_is_given() -> None:
    """CHORD (rlhf_trainers/utils.py:1633), with weights that wait on the host, as in ms-swift's example."""
    waiting = {"use_vllm": True, "vllm_mode": "colocate", "offload_model": True, "offload_optimizer": True, "sleep_level": 1}
    answers = {"chord_sft_dataset": "a", "chord_sft_per_device_train_batch_size": 1, "chord_mu_peak": 0.9}
    job = {"rlhf_type": "grpo", "tuner_type": "full", "deepspeed": "zero3", "beta": 0.0}
    values = {**SWIFT, **job, **waiting, **answers, "chord_mu_decay_steps": 200, "chord_mu_valley": 0.05}
    plan = read(values, kind="command", program="swift rlhf", NPROC_PER_NODE="8")
    assert not plan.unsupported
    assert (plan.options["trainer"], plan.options["loss_type"]) == ("swift-grpo-reloading", "chord")
    for other in ({"chord_sft_per_device_train_batch_size": 2}, {"deepspeed": "zero2"}, {"chord_enable_phi_function": True}):
        plan = read({**values, **other}, kind="command", program="swift rlhf", NPROC_PER_NODE="8")
        assert {"chord_sft_dataset", "chord_sft_per_device_train_batch_size"} <= plan.unsupported.keys()


def test_texts_that_an_encoder_scores_are_padded() -> None:
    job = {"model": "iic/gte-reranker-modernbert-base", "task_type": "reranker", "loss_type": "listwise_reranker"}
    values = {**SWIFT, **job, "tuner_type": "full", "max_length": 256, "per_device_train_batch_size": 2}
    plan = read(values, kind="command", program="swift sft")
    assert not plan.unsupported
    assert {"task_type": "SEQ_CLS", "num_labels": 1, "padding": True, "batch_size": 2 * 8}.items() <= plan.options.items()
    for other in ({"tuner_type": "lora"}, {"deepspeed": "zero2"}, {"padding_free": True}):
        assert "task_type" in read({**values, **other}, kind="command", program="swift sft").unsupported


@pytest.mark.parametrize(("padding_free", "unsupported"), [(True, set()), (False, {"task_type", "loss_type"})])
def test_a_text_part_gets_a_score(padding_free: bool, unsupported: set[str]) -> None:
    """model/register.py:313, as of `seq_cls`; rows with padding were not rehearsed."""
    job = {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "task_type": "reranker", "loss_type": "pointwise_reranker"}
    sizes = {"max_length": 1000, "per_device_train_batch_size": 2, "attn_impl": "flash_attn", "padding_free": padding_free}
    plan = read({**SWIFT, **job, **sizes}, kind="command", program="swift sft", MAX_NEGATIVE_SAMPLES="1")
    assert plan.unsupported.keys() == unsupported
    if padding_free:
        expected = {"trainer": "swift-text-part", "task_type": "SEQ_CLS", "num_labels": 1, "seq_len": 2 * 2 * 1000}
        assert expected.items() <= plan.options.items()


@pytest.mark.parametrize(
    ("values", "environment"),
    [
        ({"loss_type": "cross_entropy"}, {}),
        ({"quant_bits": 4, "quant_method": "bnb"}, {}),
        ({}, {"MAX_POSITIVE_SAMPLES": "2"}),
        ({}, {"MAX_NEGATIVE_SAMPLES": "few"}),  # was counted as none
        ({}, {"MAX_NEGATIVE_SAMPLES": "-1"}),
    ],
)
def test_rerankers_that_were_not_rehearsed(values: dict[str, object], environment: dict[str, str]) -> None:
    job = {"model": "Qwen/Qwen3-Reranker-0.6B", "task_type": "generative_reranker", "loss_type": "pointwise_reranker"}
    plan = read({**SWIFT, **job, **values}, kind="command", program="swift sft", **environment)
    assert "task_type" in plan.unsupported


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rlhf_type": "kto"}, {"trainer": "swift-kto"}),
        ({"rlhf_type": "cpo", "loss_type": "hinge"}, {"trainer": "swift-cpo", "loss_type": "hinge"}),
        ({"rlhf_type": "simpo", "beta": 2.5}, {"trainer": "swift-cpo", "loss_type": "simpo", "beta": 2.5}),
        ({"rlhf_type": "rm"}, {"trainer": "swift-reward", "task_type": "SEQ_CLS", "num_labels": 1}),
        ({"rlhf_type": "dpo"}, {"trainer": "swift-dpo", "batch_size": 4, "seq_len": 1000}),
        ({"rlhf_type": "dpo", "padding_free": True}, {"trainer": "swift-dpo-packed", "batch_size": 1, "seq_len": 2 * 4 * 1000}),
        ({"rlhf_type": "dpo", "packing": True}, {"trainer": "swift-dpo-packed", "batch_size": 1, "seq_len": 4 * 1000}),
    ],
)
def test_trainers_of_preferences(values: dict[str, object], expected: dict[str, object]) -> None:
    """arguments/rlhf_args.py: `_init_simpo`, `_init_rm`; padding-free rows hold both completions of each pair."""
    sizes = {"max_length": 1000, "per_device_train_batch_size": 4, "attn_impl": "flash_attn"}
    plan = read({**SWIFT, **sizes, **values}, kind="command", program="swift rlhf")
    assert not plan.unsupported
    assert expected.items() <= plan.options.items()


@pytest.mark.parametrize(
    ("values", "environment", "reentrant"),
    [
        ({}, {}, True),
        ({}, {"NPROC_PER_NODE": "2"}, None),
        ({"deepspeed": "zero2"}, {"NPROC_PER_NODE": "2"}, True),
        ({"gradient_checkpointing_kwargs": '{"use_reentrant": false}'}, {}, False),
        ({"gradient_checkpointing": False}, {}, None),
    ],
)
def test_checkpoints_are_reentrant_but_under_ddp(
    values: dict[str, object], environment: dict[str, str], reentrant: bool | None
) -> None:
    """trainers/mixin.py:949: `is_dist() and not is_deepspeed_enabled and not is_fsdp_enabled` makes them not reentrant."""
    plan = read({**SWIFT, **values}, kind="command", program="swift sft", **environment)
    assert plan.options.get("use_reentrant") is reentrant


@pytest.mark.parametrize(
    ("model", "dtype"), [("facebook/opt-125m", "fp16"), ("EleutherAI/pythia-160m", "fp16"), ("bert-base-cased", "bf16")]
)
def test_the_dtype_that_the_config_of_a_model_names(model: str, dtype: str) -> None:
    """model/utils.py:247: the dtype in config.json, else bf16; the configs of OPT and Pythia name float16, BERT's none."""
    plan = read({"model": model, "tuner_type": "lora"}, kind="command", program="swift sft")
    assert (plan.options["dtype"], plan.options["autocast"]) == (dtype, dtype)


def test_unsloth_loads_the_model_for_swift_and_returns_all_logits() -> None:
    """`UNSLOTH_RETURN_LOGITS` (model/register.py:48): 2,048 tokens of Qwen2.5 in 16 bits, and accelerate's copy in fp32."""
    values = {"model": "Qwen/Qwen2.5-7B-Instruct", "tuner_type": "lora", "tuner_backend": "unsloth"}
    plan = read(values, kind="command", program="swift sft")
    assert not plan.unsupported
    peaks = peftplan.estimate(config=plan, seq_len=2048).peaks
    assert peaks is not None
    of_logits = [line for line in peaks.ledgers["forward"] if line.shape == (1, 2048, 152_064)]
    assert sum(line.bytes() for line in of_logits) == 2048 * 152_064 * (2 + 4)
    others: list[dict[str, object]] = [{"tuner_type": "full"}, {"model": "Qwen/Qwen3-8B"}, {"packing": True}, {"quant_bits": 4}]
    for other in others:
        assert "tuner_backend" in read({**values, **other}, kind="command", program="swift sft").unsupported


def test_completions_that_are_used_again_cost_no_more() -> None:
    """`old_policy()`: they are scored once more without gradients before the step."""
    plain = {**SWIFT, "rlhf_type": "grpo", "use_vllm": True, "vllm_mode": "server"}
    again = {**plain, "num_iterations": 2, "early_stop_interval": 5}
    plan, of_plain = (read(values, kind="command", program="swift rlhf") for values in (again, plain))
    assert not plan.unsupported
    assert plan.options == of_plain.options


@pytest.mark.parametrize(
    ("values", "instead", "where"),
    [
        ({"loss_type": "loss_scale"}, {}, "mixin.py:1115"),
        ({"quant_method": "hqq", "quant_bits": 4}, {"quant_method": "bnb", "quant_bits": 4}, "quantizers/base.py:290"),
        ({"rlhf_type": "grpo", "loss_type": "real"}, {"rlhf_type": "grpo"}, "grpo_trainer.py:1032"),
    ],
)
def test_what_swift_raises_for_has_the_peak_of_a_change_that_runs(
    values: dict[str, object], instead: dict[str, object], where: str
) -> None:
    """Each change was rehearsed (tests/rehearse/swift.jsonl): labels are weighted without the name of a loss, which ms-swift no
    longer has, bitsandbytes quantizes to 4 bits in place of hqq, and GRPO has the loss that is its default."""
    program = "swift rlhf" if "rlhf_type" in values else "swift sft"
    plan, changed = (read({**SWIFT, **each}, kind="command", program=program) for each in (values, instead))
    assert (plan.unsupported, plan.options) == ({}, changed.options)
    assert where in "".join(plan.refusals())
    assert of_plan(plan).peak_allocated == of_plan(changed).peak_allocated is not None


@pytest.mark.parametrize("method", ["bnb", "hqq"])
def test_trainer_refuses_quantized_weights_without_an_adapter(method: str) -> None:
    """transformers 5.24, trainer_utils.py:133; a peak in 16 bits was stated."""
    values = {**SWIFT, "tuner_type": "full", "quant_method": method, "quant_bits": 4}
    assert "quant_method" in read(values, kind="command", program="swift sft").unsupported


def test_positions_of_yarn_are_named_as_transformers_5_reads_them() -> None:
    """The packed row of ms-swift's example of 512,000 tokens: eight ranks share it, with weights on the host."""
    shared = {
        "sequence_parallel_size": 8,
        "deepspeed": "zero3_offload",
        "packing": True,
        "max_length": 512_000,
        "rope_scaling": "yarn",
        "max_model_len": 512_000,
        "use_liger_kernel": True,
        "attn_impl": "flash_attn",
    }
    values = {**SWIFT, "model": "Qwen/QwQ-32B", **shared}
    plan = read(values, kind="command", program="swift sft", NPROC_PER_NODE="8", CELOSS_PARALLEL_SIZE="2048")
    assert plan.refused["rope_scaling"].instead == {"rope_scaling": None, "rope_scaling.rope_type": "yarn"}
    assert (plan.unsupported, plan.options["seq_len"]) == ({}, 64_000)
    assert (of_plan(plan).peak_allocated is None, of_plan(plan).peak_reserved) == (False, None)
    for other in ({"deepspeed": "zero3"}, {"use_liger_kernel": False}, {"tuner_type": "full"}):
        more = read({**values, **other}, kind="command", program="swift sft", NPROC_PER_NODE="8", CELOSS_PARALLEL_SIZE="2048")
        assert "sequence_parallel_size" in more.unsupported


@pytest.mark.parametrize(
    ("visible", "processes", "divided"),
    [("0,1", None, True), ("0,1,2,3", "2", False), ("0,1,2", "2", True), ("0,1", "2", False)],
)
def test_a_process_of_swift_with_several_gpus_divides_the_model(visible: str, processes: str | None, divided: bool) -> None:
    """`get_default_device_map` (model/utils.py:242) is `auto` where a process has two GPUs or more (`is_mp`, utils/env.py:71)."""
    environment = {"CUDA_VISIBLE_DEVICES": visible, **({"NPROC_PER_NODE": processes} if processes else {})}
    plan = read(SWIFT, kind="command", program="swift sft", **environment)
    assert ("CUDA_VISIBLE_DEVICES" in plan.unsupported) is divided
    assert (of_plan(plan).peak_allocated is None) is divided
    assert [" raises TypeError" in row.why for row in plan.refused.values()] == [True] * (visible == "0,1,2,3")  # as rehearsed
    if plan.refused:
        assert plan.options == read(SWIFT, kind="command", program="swift sft", NPROC_PER_NODE="4").options
    beside = read({**SWIFT, "deepspeed": "zero2"}, kind="command", program="swift sft", **environment)
    assert not beside.refused


ASLEEP = {"use_vllm": True, "vllm_mode": "colocate", "sleep_level": 1, "offload_model": True, "offload_optimizer": True}


def test_weights_that_waited_on_the_host_lie_beside_the_flat_ones() -> None:
    """Qwen2.5 7B in 16 bits over eight ranks, once more until the step: 7,615,616,512 parameters."""
    kept, away = (
        read({**GRPO, **ASLEEP, "offload_model": waits, "max_length": 512}, kind="command", program="swift rlhf")
        for waits in (False, True)
    )
    assert not kept.unsupported
    assert not away.unsupported
    of_both = [peftplan.estimate(config=plan, gpus=8).peaks for plan in (kept, away)]
    forwards = [peaks.by_phase["forward"] for peaks in of_both if peaks is not None]
    assert abs(forwards[1] - forwards[0] - 2 * 7_615_616_512 // 8) < 2**22


@pytest.mark.parametrize(
    ("values", "unsupported"),
    [
        ({"deepspeed": "zero2"}, ("offload_model", "offload_optimizer")),
        ({"vllm_mode": "server"}, ()),  # which nothing is offloaded for (rlhf_trainers/rollout_mixin.py:377, :443)
        ({"deepspeed": "zero3_offload"}, ()),
        ({"log_entropy": True}, ("log_entropy",)),
        ({"multi_turn_scheduler": "math_tip_trick", "vllm_max_model_len": 2048}, ()),
        ({"multi_turn_scheduler": "math_tip_trick"}, ("multi_turn_scheduler",)),
    ],
    ids=str,
)
def test_where_weights_on_the_host_were_rehearsed(values: dict[str, object], unsupported: tuple[str, ...]) -> None:
    """Under ZeRO-2 the weights are views of a flat buffer, from which the tool takes them; beside entropies they were not."""
    assert read({**GRPO, **ASLEEP, **values}, kind="command", program="swift rlhf").unsupported.keys() == set(unsupported)


def test_entropies_keep_two_copies_of_the_logits() -> None:
    """Log-probabilities and probabilities of 2 x 512 tokens of 152,064 in 16 bits, beside a copy of the logits, and of 128 tokens
    their product; either key asks for them."""
    served = {**GRPO, **SERVED, "deepspeed": "zero2", "max_completion_length": 512, "per_device_train_batch_size": 2}
    plans = [
        read({**served, **values}, kind="command", program="swift rlhf")
        for values in ({}, {"log_entropy": True}, {"top_entropy_quantile": 0.2})
    ]
    assert [sorted(plan.unsupported) for plan in plans] == [[], [], []]
    of_each = [peftplan.estimate(config=plan, gpus=2).peaks for plan in plans]
    without, logged, chosen = (peaks.by_phase["forward"] for peaks in of_each if peaks is not None)
    assert logged == chosen
    assert abs(logged - without - 2 * 152_064 * (3 * 2 * 512 + 128)) < 2**12


@pytest.mark.parametrize(
    ("values", "key", "raised"),
    [
        ({"tuner_type": "bone"}, "tuner_type", "ImportError"),
        ({"rlhf_type": "grpo", "loss_type": "fipo"}, "loss_type", "ValueError"),
    ],
)
def test_what_swift_raises_for_is_a_refusal(values: dict[str, object], key: str, raised: str) -> None:
    plan = read({**SWIFT, **values}, kind="command", program="swift sft")
    assert f" raises {raised}: " in plan.unsupported[key].why
    assert refused_by(Case("a.sh", plan, of_plan(plan))) is not None


def test_muonclip_keeps_one_buffer_of_an_adapter() -> None:
    plan = read({**SWIFT, "optimizer": "muonclip", "optim_args": "qk_clip_threshold=10000"}, kind="command", program="swift sft")
    assert not plan.unsupported
    result = peftplan.estimate(config=plan)
    states = sum(line.bytes() for line in result.ledger if line.category == "optimizer_states")
    assert 0 <= states - 4 * result.trainable_parameters < 2**20
    assert "optimizer" in read({**SWIFT, "optimizer": "muonclip", "tuner_type": "full"}).unsupported


def test_noise_lies_beside_the_embeddings() -> None:
    """2,048 tokens x 3,584 in 16 bits: the leaf that has a gradient is not the input of the first layer."""
    plain, noisy = (
        peftplan.estimate(config=read({**SWIFT, **values}, kind="command", program="swift sft")).peaks
        for values in ({}, {"neftune_noise_alpha": 15})
    )
    assert plain is not None
    assert noisy is not None
    assert noisy.by_phase["backward"] - plain.by_phase["backward"] == 2 * 2048 * 3584
    assert noisy.by_phase["load"] == plain.by_phase["load"]


def test_noise_that_is_not_counted_has_no_peak() -> None:
    """A trace ran without it, and so did the formulas of models with an encoder and a decoder."""
    job: dict[str, Any] = {"method": "lora", "noisy_embeddings": True, "seq_len": 64}
    assert "noise on the embeddings of an encoder" in peftplan.estimate("t5-base", **job).not_modelled[0]
    with pytest.raises(RefusedError, match="trace adds no noise"):
        peftplan.estimate("smollm2-135m", engine="trace", **job)


def test_an_adapter_of_swift_is_a_bottleneck_behind_each_mlp() -> None:
    """28 layers of 2 x 128 x 3,584 weights with biases of both, as the tool counted."""
    plan = read({**SWIFT, "tuner_type": "adapter"}, kind="command", program="swift sft")
    assert not plan.unsupported
    assert peftplan.estimate(config=plan).trainable_parameters == 28 * (2 * 128 * 3584 + 128 + 3584) == 25_794_048
    assert "tuner_type" in read({**SWIFT, "tuner_type": "adapter", "adapter_act": "relu"}).unsupported


def test_a_student_without_its_adapter_is_its_own_teacher() -> None:
    """Qwen3 4B is there once, and logits are of completions alone: 4 x 2,049 rows of 151,936 in 16 bits for each of both."""
    values = {**SWIFT, "model": "Qwen/Qwen3-4B", "rlhf_type": "gkd", "teacher_model": "Qwen/Qwen3-4B", "deepspeed": "zero0"}
    values |= {"lmbda": 1.0, "use_vllm": True, "vllm_mode": "colocate", "sleep_level": 1, "max_completion_length": 2048}
    values |= {"max_length": 8192, "per_device_train_batch_size": 4}
    plan = read(values, kind="command", program="swift rlhf")
    assert not plan.unsupported
    assert plan.options["trainer"] == "swift-gkd-of-itself"
    result = peftplan.estimate(config=plan, gpus=8)
    assert result.peaks is not None
    assert not [line.name for line in result.ledger if line.name.startswith("teacher")]
    of_both = [line for line in result.peaks.ledgers["forward"] if line.name.endswith("lm_head linear")]
    assert sum(line.bytes() for line in of_both) == 2 * 2 * 4 * 2049 * 151_936
    for other in ({"lmbda": 0.5}, {"sft_alpha": 0.1}, {"use_vllm": False}):
        assert read({**values, **other}, kind="command", program="swift rlhf").unsupported


def test_liger_leaves_the_positions_of_glm_4_to_the_model() -> None:
    values = {**SWIFT, "model": "ZhipuAI/GLM-4-9B-0414", "use_liger_kernel": True}
    plan = read(values, kind="command", program="swift sft")
    assert not plan.unsupported
    result = peftplan.estimate(config=plan)
    assert result.bound is None
    assert result.peaks is not None


def test_a_distillation_with_labels_keeps_their_log_probabilities() -> None:
    """Of a packed row of 4,096 tokens of 151,936 in fp32; `sft_alpha` 0 asks for none."""
    values = {**SWIFT, "model": "Qwen/Qwen3-8B-Base", "tuner_type": "full", "rlhf_type": "gkd", "teacher_model": "Qwen/Qwen3-8B"}
    values |= {"deepspeed": "zero3", "packing": True, "attn_impl": "flash_attn", "max_length": 4096, "lmbda": 0}
    plain, labelled = (read({**values, "sft_alpha": alpha}, kind="command", program="swift rlhf") for alpha in (0, 0.1))
    assert not plain.unsupported
    assert not labelled.unsupported
    of_both = [peftplan.estimate(config=plan, gpus=4).peaks for plan in (plain, labelled)]
    forwards = [peaks.by_phase["forward"] for peaks in of_both if peaks is not None]
    assert abs(forwards[1] - forwards[0] - 4096 * 151_936 * 4) < 2**20
    assert "sft_alpha" in read({**values, "sft_alpha": 0.1, "deepspeed": None}, kind="command", program="swift rlhf").unsupported


@pytest.mark.parametrize(
    ("stated", "mode", "grow"),
    [
        ("expandable_segments:True", None, True),
        ("max_split_size_mb:512,expandable_segments:True", "server", True),
        ("expandable_segments:False", None, False),
        ("expandable_segments:True", "colocate", None),  # ms-swift turns it off before vLLM wakes (rollout_mixin.py:1212)
    ],
)
def test_the_allocator_is_set_by_the_environment(stated: str, mode: str | None, grow: bool | None) -> None:
    values = {**SWIFT, "vllm_mode": mode} if mode else SWIFT
    plan = read(values, kind="command", program="swift sft", PYTORCH_CUDA_ALLOC_CONF=stated)
    assert plan.options.get("expandable_segments") is grow


def test_groups_of_weights_are_one_or_more() -> None:
    values = {"rlhf_type": "grpo", "model": "Qwen/Qwen2.5-7B-Instruct", "use_vllm": True, "deepspeed": "zero3_offload"}
    plan = read(values | {"move_model_batches": 0}, kind="command", program="swift rlhf", NPROC_PER_NODE="4")
    assert "ZeroDivisionError" in plan.unsupported["move_model_batches"].why


def test_nothing_is_sent_where_ranks_hold_whole_weights() -> None:
    """A loop of GRPO that gathers nothing has no tensors of its own."""
    options: dict[str, Any] = {"trainer": "swift-grpo", "strategy": "zero2", "gpus": 2, "use_vllm": True, "vllm_mode": "colocate"}
    assert peftplan.estimate("qwen2.5-0.5b", method="full", dtype="bf16", **options).peaks is not None


def test_bone_needs_an_older_peft_than_ms_swift_installs() -> None:
    """peft 0.20 has MiSS in its place (`from peft import BoneConfig` raises ImportError)."""
    plan = read({**SWIFT, "tuner_type": "bone"}, kind="command", program="swift sft")
    assert "raises ImportError" in plan.unsupported["tuner_type"].why
