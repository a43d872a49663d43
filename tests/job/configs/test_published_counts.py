"""Trainable parameters that Unsloth printed in its notebooks, against the counts of what is read of the same notebooks."""

from __future__ import annotations

import pytest

import peftplan
from peftplan.arch import catalogue
from tests.job.configs.published import plan, records

OWN_KEYS = "printed with transformers 4.54 or 5.5, where layers that share keys and values had projections of their own too"
OWN_EXPERTS = "gpt-oss, printed by Unsloth 2025.8 to 2025.11, which adapted attention alone; 2026.10 adapts each expert too"
DIFFER = {
    "Gemma4_(E2B)_GRPO.ipynb": "prints what gpt-oss-20b has: its output is another notebook's",
    "Gemma4_(E4B)-Audio.ipynb": "prints both towers' layers too: Unsloth 2026.4 left the switches out where targets are named",
    "Gemma3N_(4B)-Conversational.ipynb": OWN_KEYS,  # 15 layers x 2 modules x (2048 + 512) x r 8 = 614,400 more
    "Gemma4_(E2B)-Text.ipynb": OWN_KEYS,  # 589,824 more
    "Gemma4_(E4B)-Text.ipynb": OWN_KEYS,  # 909,312 more
    "Gemma3N_(4B)-Audio.ipynb": f"{OWN_KEYS}, by another call: 2025.7.5 has no finetune_audio_layers",
    # 95,354,880 - 20,840,448 of audio - 131,072 of embed_vision + 2,457,600 of keys that layers shared
    "Gemma3N_(4B)-Vision.ipynb": "Unsloth 2025.7 adapted the language model alone",
    # 93,003,776 - 14,041,088 of audio - 155,648 of both + 3,637,248 of keys that layers shared
    "Gemma4_(E4B)-Vision.ipynb": "Unsloth 2026.4 adapted no audio, embed_vision or input_proj",
    "Gemma4_(12B)_Vision.ipynb": "Unsloth adapted no embed_audio then: 143,360 fewer",
    # 30 layers x 128 experts x r 8 x (2,816 + 1,408 + 704 + 2,816) = 237,895,680
    "Gemma4_(26B_A4B)-Text.ipynb": "Unsloth 2026.4 adapted no experts",
    # four times as many with r 32, and r 32 x (1,152 + 2,816 + 768 + 1,152) = 188,416
    "Gemma4_(26B_A4B)-Vision.ipynb": "Unsloth 2026.4 adapted no experts, embed_vision or input_proj",
    "LFM2.5_(1.2B)-Text_Completion.ipynb": "printed by Unsloth 2025.12, which adapted convolutions and the embedding",
    "Granite4.0_350M.ipynb": "printed by Unsloth 2025.10, which adapted the MLP too; 2026.10 adapts attention alone",
    "gpt-oss-(20B)_A100-GRPO.ipynb": "loads gpt-oss-120b, and prints what gpt-oss-20b has: its output is older",
    "Llasa_TTS_(1B).ipynb": "prints what Llasa-3B has: its output is another notebook's",
    "-Fine-tuning.ipynb": OWN_EXPERTS,
    "gpt-oss-(20B)-GRPO.ipynb": OWN_EXPERTS,
    "500K_Context_Fine_tuning.ipynb": OWN_EXPERTS,
    "2048_Game.ipynb": OWN_EXPERTS,
    "2048_Game_BF16.ipynb": OWN_EXPERTS,
    "GRPO_BF16.ipynb": OWN_EXPERTS,
}
"""Ends of the names of notebooks whose count is another one, and why."""
PRINTED = {r["path"]: r for r in records("unsloth") if (r.get("measured") or {}).get("trainable")}
EXPECTED = 40


def test_counts_equal_those_printed() -> None:
    """A notebook whose targets are not supported has no count to compare."""
    equal, differ = 0, []
    counts: dict[str, int] = {}
    for path, record in PRINTED.items():
        read = plan(record)
        other_targets = any(row.option == "target_modules" for row in read.unsupported.values())
        if read.model is None or catalogue.find(read.model) is None or other_targets:
            continue
        key = repr((read.model, sorted(read.options.items())))
        if key not in counts:
            counts[key] = peftplan.estimate(read.model, **read.options).trainable_parameters
        if counts[key] == record["measured"]["trainable"]:
            equal += 1
        else:
            differ.append(path)
    assert [path for path in differ if not path.endswith(tuple(DIFFER))] == []
    assert equal >= EXPECTED


LANGUAGE = r".*language_model\.layers\..*\.(?:[qkvo]|gate|up|down)_proj"


@pytest.mark.parametrize(
    ("model", "r", "others", "own_keys", "printed"),
    [
        (
            "gemma-3n-e4b-it",
            8,
            r".*audio_tower\..*\.(?:[qkv]_proj|post|linear_start|linear_end|ffw_layer_[12])",
            76_800,
            24_076_288,
        ),
        ("gemma-4-e4b-it", 32, r".*vision_tower\.encoder\..*\.linear", 113_664, 82_444_288),
    ],
)
def test_targets_of_older_releases_explain_what_they_printed(
    model: str, r: int, others: str, own_keys: int, printed: int
) -> None:
    """The second pattern selects what `get_peft_regex` of unsloth_zoo 2026.4.4 does. The first leaves out what projects into and
    out of the tower of audio, and one of its six kinds of 1,536 x 1,536; that it is pos_proj is a guess. `own_keys`: parameters
    per rank of layers that shared keys and had projections of their own."""
    counted = peftplan.estimate(model, method="lora", r=r, target_modules=f"{LANGUAGE}|{others}")
    assert counted.trainable_parameters + r * own_keys == printed


@pytest.mark.parametrize(
    ("vision", "printed"),
    [(True, 51_521_536), (False, 40_370_176)],  # nb/AMD-Qwen2.5_VL_(7B)-Vision.ipynb and …Qwen2_5_7B_VL_GRPO.ipynb, r 16
)
def test_switches_choose_the_part_of_a_vision_model(vision: bool, printed: int) -> None:
    from peftplan.job.configs.read import read_values

    calls = [
        {"call": "FastVisionModel.from_pretrained", "args": ["unsloth/Qwen2.5-VL-7B-Instruct"], "kwargs": {"load_in_4bit": True}},
        {"call": "FastVisionModel.get_peft_model", "args": ["<model>"], "kwargs": {"r": 16, "finetune_vision_layers": vision}},
        {"call": "SFTConfig", "args": [], "kwargs": {}},
    ]
    read = read_values({"calls": calls}, file="a.ipynb", kind="calls")
    assert peftplan.estimate(config=read).trainable_parameters == printed


def test_a_head_that_fastmodel_trains_whole() -> None:
    """LFM2.5's notebooks print 97,517,568, of a release that adapted convolutions, and the table too: 8,650,752 for r 128. What
    release 2026.10.9 trains is rehearsed (tests/memory/test_compiled_text_parts.py)."""
    (record,) = (r for r in records("unsloth") if r["path"] == "nb/LFM2.5_(1.2B)-Text_Completion.ipynb")
    read = plan(record)
    assert not read.unsupported
    result = peftplan.estimate(config=read)
    assert result.trainable_parameters == 207_355_904
    table, convolutions = 65_536 * 2_048, 10 * 128 * ((2_048 + 6_144) + (2_048 + 2_048))
    assert result.trainable_parameters - table + convolutions + 128 * (65_536 + 2_048) == 97_517_568
    assert result.peaks is not None
