"""All published configs that were given: no crash, the right tool, every key in one group."""

from __future__ import annotations

import pytest

from peftplan.job.configs.documents import flat
from peftplan.job.configs.plan import TOOLS
from peftplan.job.configs.read import read_values
from tests.job.configs.published import plan, records

READ_AS = {
    "axolotl": {"axolotl"},
    "llamafactory": {"llamafactory", "llamafactory-v1"},
    "torchtune": {"torchtune"},
    "unsloth": {"unsloth"},
    "alignment-handbook": {"trl"},
    "accelerate": {"accelerate"},
    "deepspeed": {"deepspeed"},
}
"""The tool that a record says it was collected from → the tools that its file may be read as. Others hold files of many tools."""
NOT_CONFIGS = ("new_special_tokens", "data/", "docker", "dataset_info", "ascend/infer")


def test_every_file_is_read_as_its_tool() -> None:
    wrong = []
    for record in records():
        read = plan(record)
        assert read.tool in TOOLS
        if record["tool"] in READ_AS and read.tool not in READ_AS[record["tool"]] and read.tool != "other":
            wrong.append((record["path"], read.tool))
    assert wrong == []


def test_few_training_files_are_not_known() -> None:
    """Of tools with a reader, what is `other` is a file of data or of a service, not a training config."""
    unknown = [
        r["path"] for r in records("axolotl", "llamafactory", "torchtune", "alignment_handbook") if plan(r).tool == "other"
    ]
    assert unknown == [
        "examples/cloud/modal.yaml",
        "examples/extras/multi_tokens/tokens_cfg.yaml",
    ]


def test_each_key_is_in_one_group() -> None:
    for record in records():
        if "calls" in record["values"]:
            continue
        read = plan(record)
        if read.tool == "other":
            continue
        groups = [*read.read, *read.ignored, *read.unsupported]
        keys = flat(record["values"])
        assert len(groups) == len(set(groups)), record["path"]
        removed = {key for row in read.refused.values() for key, value in row.instead.items() if value is None}
        assert keys.keys() - removed <= set(groups), (record["path"], keys.keys() - set(groups))


def test_where_the_tool_reads_a_key_without_effect() -> None:
    """Every key has a line of the tool, also where it is empty or off."""
    plans = [plan(record) for record in records()]
    without = {(read.tool, key) for read in plans if read.kind == "training" for key, row in read.ignored.items() if not row.at}
    assert without == set()


@pytest.mark.parametrize("key", ["optimizer.differentiable", "optimizer.min_8bit_size", "optimizer.is_paged", "optimizer.betaz"])
@pytest.mark.parametrize("tool", ["torchtune", "nemo-automodel"])
def test_an_argument_of_the_optimizer_that_no_list_has(tool: str, key: str) -> None:
    """All arguments were numbers without effect; these decide states, or the optimizer has no such argument."""
    assert key in read_values({key: 1}, file="a.yml", tool=tool).unsupported
