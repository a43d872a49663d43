"""How a job is launched, as options: what a tool's file says of FSDP and DeepSpeed, launch files, processes.

What several GPUs hold is read by `job.launch`; what it does not count becomes an unsupported key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import NamedTuple

from peftplan.distributed.names import MOST_RANKS, STRATEGIES
from peftplan.errors import PeftplanError
from peftplan.job.configs import launch_files as files
from peftplan.job.configs.documents import Values, nested, read_json, word
from peftplan.job.configs.plan import Refused, Unsupported
from peftplan.job.launch import accelerate
from peftplan.job.launch.content import content

ASSUMED_GPUS = 8
"""Processes of a job whose file shards it and does not say over how many."""
OF_CLUSTER = {"gb200": 4}
"""Cluster of NeMo Automodel's tests → GPUs of a machine."""
DIVIDED = {
    "tensor_parallel_size": "tensor parallelism", "context_parallel_size": "context parallelism",
    "expert_parallel_size": "expert parallelism", "sequence_parallel_size": "sequence parallelism",
    "tensor_parallel": "tensor parallelism", "context_parallel_dim": "context parallelism", "device_map": "a device map",
}  # fmt: skip
"""Facts about the launch that divide a job in ways that are not counted here."""
GROUPS = ("dp_shard_size", "dp_replicate_size")
BESIDE_GROUPS = ("tensor_parallel_size", "context_parallel_size", "expert_parallel_size")
"""Axolotl's sizes of groups of ranks, and of those that its other ways to divide a job need."""

HEADER = re.compile(r"\b(num_processes|nproc_per_node|num_machines|nnodes)[= ]([0-9]{1,6})\b", re.IGNORECASE)
IN_HEADERS = {"num_processes": "processes", "nproc_per_node": "gpus", "num_machines": "nodes", "nnodes": "nodes"}
"""A launcher's word in the comments of a file → the fact about the launch."""


def of_comments(comments: str) -> dict[str, int]:
    """How many processes the command launches that a file's comments show, such as `accelerate launch --num_processes 8`."""
    return {IN_HEADERS[name.lower()]: int(number) for name, number in reversed(HEADER.findall(comments))}


OVER_ITS_GPUS = "a process divides the model over its GPUs (device_map auto, model/utils.py:242)"
EACH_OVER_ITS_GPUS = (
    "ms-swift 4.6.0 raises TypeError where several processes divide a model over their GPUs: get_balanced_memory of transformers "
    "takes no no_placement_params (model/patcher.py:573; transformers, integrations/accelerate.py:370; older releases have none)"
)
RANKS, PER_NODE = "ray.default.ranks", "ray.nproc_per_node"
"""What ms-swift tells Ray: which ranks train, and how many of them a node has."""
OF_AXOLOTL_RAY = "ray_num_workers"
"""How many processes Ray starts for axolotl, each with a GPU (axolotl 0.19.0, cli/train.py:126)."""


class Launched(NamedTuple):
    """Options of a launch, which of it is not supported, and what is assumed."""

    options: Values
    unsupported: dict[str, Unsupported]
    assumed: dict[str, str]
    refused: dict[str, Refused]
    """What the tool raises for, and the number of processes with which it runs."""


UNREAD_OF_FSDP = {"axolotl": ("backward_prefetch", "forward_prefetch")}
"""Tool → ends of fields of `fsdp_config` that it drops: axolotl's schema has none of them (0.19.0, utils/schemas/fsdp.py)."""


def launched(
    tool: str,
    launch: Mapping[str, object],
    environment: Mapping[str, str],
    *,
    file: str,
    chosen: Mapping[str, object] | None = None,
) -> Launched:
    """What a launch says. `launch`: labels of the facts, dotted where they were nested; `file`: the config that says it;
    `chosen`: the user's own options."""
    result = Launched({}, {}, {}, {})
    of_accelerate = partial(files.of_accelerate, file=file)
    if (config := _values(launch, "accelerate")) is not None:
        _from(result, "accelerate", lambda: of_accelerate(config))
    elif (name := launch.get("accelerate_config")) is not None:
        _named(result, tool, "accelerate_config", name, of_accelerate, file)
    _processes(result, tool, launch, environment)  # they win over those of a launch file
    if (precision := word(launch.get("mixed_precision"))) in ("bf16", "fp16"):
        result.options["autocast"] = precision
    elif precision not in ("none", "no", "false"):
        result.unsupported["mixed_precision"] = Unsupported(
            launch["mixed_precision"], "no dtype of autocast here", "unknown", "autocast"
        )
    own = launch.get("deepspeed.config_file", _values(launch, "deepspeed"))
    if isinstance(own, Mapping):
        _from(result, "deepspeed", lambda: files.of_deepspeed(own))
    elif isinstance(own, str) and word(own) not in ("none", "false", ""):
        _named(result, tool, "deepspeed", own, files.of_deepspeed, file)
    if (names := launch.get("spectrum_config_path")) is not None:
        _named(result, tool, "spectrum_config_path", names, files.of_spectrum, file)
    _fsdp(result, tool, launch, file, older=(chosen or {}).get("tool_version") is not None)
    own_strategy = launch.get("distributed.strategy", launch.get("distributed.name"))
    if str(own_strategy) in STRATEGIES:
        result.options["strategy"] = own_strategy
    elif word(sharing := launch.get("distributed.strategy")) != "none":
        result.unsupported["distributed.strategy"] = Unsupported(sharing, "not counted", "unknown", "strategy")
    for fact, what in DIVIDED.items():
        value = launch.get(fact, any(key.startswith(f"{fact}.") for key in launch))
        if word(value) not in ("none", "false", "1", "-1", "", "0"):
            result.unsupported[fact] = Unsupported(value, f"{what} over several GPUs", "unknown")
    _groups(result, launch, chosen or {})
    if result.options.get("strategy") not in (None, "ddp") and "gpus" not in result.options:
        result.options["gpus"] = ASSUMED_GPUS
        result.assumed["gpus"] = f"the launcher decides; {ASSUMED_GPUS} are assumed"
    # on one GPU NeMo Automodel and LLaMA-Factory v1 shard nothing (`_parallelize_unsharded_fsdp2`; `FSDP2Engine.prepare_model`)
    without_effect = (None, "ddp", own_strategy)
    if result.options.get("gpus") == 1 and "nodes" not in result.options and result.options.get("strategy") in without_effect:
        result.options.pop("strategy", None)
    return result


def _groups(result: Launched, launch: Mapping[str, object], chosen: Mapping[str, object]) -> None:
    """Ranks that shard a model, and copies of it: together all processes (axolotl 0.19.0, utils/distributed.py:319), those of
    the user where `chosen` has them.

    1 is as if it were not said. Without FSDP copies are those of DDP.
    """
    sizes = {name: _whole(value) for name in GROUPS if word(value := launch.get(name)) != "none"}
    for name in [name for name, size in sizes.items() if size is None]:
        result.unsupported[name] = Unsupported(
            launch[name], "axolotl raises ValidationError; accepted: a whole number", "unknown"
        )
    sizes = {name: size for name, size in sizes.items() if size is None or size > 1}
    strategy = str(result.options.get("strategy"))
    if not sizes or None in sizes.values() or not (strategy.startswith("fsdp") or "dp_shard_size" in sizes):
        return
    key, shards, copies = next(iter(sizes)), sizes.get("dp_shard_size"), sizes.get("dp_replicate_size") or 1
    if strategy != "fsdp2":
        why = "axolotl and accelerate raise ValueError without FSDP of version 2"
        result.unsupported[key] = Unsupported(launch[key], why, "unknown")
        return
    beside = prod(_whole(launch.get(fact)) or 1 for fact in BESIDE_GROUPS)
    numbers = {name: _whole(chosen.get(name, result.options.get(name))) for name in ("gpus", "nodes")}
    stated = {name: number for name, number in numbers.items() if number}
    nodes = stated.get("nodes", 1)
    needed = (shards or max(ASSUMED_GPUS // copies, 2)) * copies * beside
    if "gpus" not in stated and needed % nodes == 0:
        stated["gpus"] = result.options["gpus"] = needed // nodes
        result.assumed["gpus"] = f"the launcher decides; {needed // nodes}, which its groups need, are assumed"
    world = stated.get("gpus", ASSUMED_GPUS) * nodes
    each, left = divmod(world, copies * beside)
    if left or (each != shards if shards and copies > 1 else each % (shards or 1)):
        why = f"the tool raises ValueError: its groups do not fill the {world} GPUs"
        result.unsupported[key] = Unsupported(launch[key], why, "unknown")
    elif each == 1 and not shards:
        why = f"accelerate raises: {copies} copies leave one GPU each, over which FSDP divides nothing"
        result.unsupported[key] = Unsupported(launch[key], why, "unknown")
    else:
        result.options["dp_shard_size"] = shards or each


def _whole(value: object) -> int | None:
    """A whole number as pydantic takes it for one: 2, 2.0, "2", or true for 1."""
    number = str(int(value) if isinstance(value, bool) else value).strip()
    return int(float(number)) if re.fullmatch(r"[-+]?[0-9]{1,6}(\.0+)?", number) else None


def _processes(result: Launched, tool: str, launch: Mapping[str, object], environment: Mapping[str, str]) -> None:
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if (ranks := launch.get(RANKS)) is not None:
        of_ray = _of_ray(str(ranks), str(launch.get(PER_NODE)))
        launch = {**launch, **of_ray}
        if not of_ray:
            result.unsupported["device_groups"] = Unsupported(
                ranks, "accepted: a whole number or list(range(a, b)), of whole nodes", "unknown"
            )
    if launch.get("use_ray") is True:
        launch = {**launch, "gpus": launch.get(OF_AXOLOTL_RAY, 1)}
    nodes = before_script(launch.get("nodes", launch.get("skypilot.num_nodes"))) or environment.get("NNODES")
    of_node = str(launch.get("skypilot.accelerators", "")).rpartition(":")[2]  # H100:8
    stated = map(before_script, (launch.get("gpus"), launch.get("distributed.dp_size"), of_node))
    count = next((number for number in stated if re.fullmatch("-?[0-9]{1,10}", str(number))), None) or environment.get(
        "NPROC_PER_NODE", environment.get("nproc_per_node")
    )
    if count is None and (count := launch.get("ci.nproc_per_node")) is not None:
        result.assumed["gpus"] = f"the launcher takes all GPUs of a machine; {count}, as in the tests of NeMo Automodel"
    if count is None and (count := before_script(launch.get("processes"))) is not None:
        whole = re.fullmatch("[0-9]{1,10}", str(count)) and re.fullmatch("[1-9][0-9]{0,9}", str(nodes))
        count = int(str(count)) // int(str(nodes)) if whole and int(str(count)) % int(str(nodes)) == 0 else count
    if count is None and launch.get("device_map") is None and visible.count(",") and "NPROC_PER_NODE" in environment:
        count = visible.count(",") + 1
    if re.fullmatch("[1-9][0-9]{0,5}", str(owners := launch.get("distributed.ep_size"))) and int(str(owners)) > 1:
        result.options["ep_size"] = int(str(owners))
        of_machine = OF_CLUSTER.get(cluster := str(launch.get("ci.cluster_tag")), ASSUMED_GPUS)
        if count is None and nodes is None and int(str(owners)) > of_machine:
            if cluster in OF_CLUSTER:
                count = of_machine
                result.assumed["gpus"] = f"the launcher takes all GPUs of a machine; {of_machine}, as {cluster} has"
            nodes, tested = -(-int(str(owners)) // of_machine), launch.get("ci.nodes")
            nodes = nodes if tested is None else tested
            result.assumed["nodes"] = f"the launcher decides; {nodes}, " + (
                "which own the experts once" if tested is None else "as in the tests of NeMo Automodel"
            )
    for name, value in (("gpus", count), ("nodes", nodes)):
        number = int(str(value)) if re.fullmatch("-?[0-9]{1,10}", str(value)) else None
        if number is not None and 0 < number <= MOST_RANKS:
            result.options[name] = number
        elif number is not None:
            result.unsupported[name] = Unsupported(value, f"accepted: 1 to {MOST_RANKS:,}", "unknown")
        elif value and name not in result.options:
            result.assumed[name] = f"the launcher's number is {value}; 1 is assumed"
    processes = int(str(result.options.get("gpus", 1)))
    devices = visible.count(",") + 1
    if tool == "swift" and re.fullmatch("[0-9,]+", visible) and devices > processes:
        alone = processes == 1 or not {"deepspeed", "fsdp", "device_map"}.isdisjoint(launch)
        if alone or devices % processes:  # what shares rows among the processes may not among more
            why = OVER_ITS_GPUS if alone else EACH_OVER_ITS_GPUS
            result.unsupported["CUDA_VISIBLE_DEVICES"] = Unsupported(visible, why, "unknown", "gpus")
        else:  # a process for each of them
            of_each = result.options["gpus"] = devices
            result.refused["NPROC_PER_NODE"] = Refused(processes, EACH_OVER_ITS_GPUS, {"NPROC_PER_NODE": of_each}, "gpus")
    if result.options.get("nodes") == 1:
        result.options.pop("nodes")


def _of_ray(ranks: str, of_node: str) -> Values:
    """GPUs and nodes that Ray starts (ms-swift, ray_utils/resource_manager.py:25); none where ranks do not fill whole nodes."""
    bounds = re.fullmatch(r"(?:list\(range\((\d{1,6}), *)?(\d{1,6})(?:\)\))?", ranks)
    if bounds is None or not re.fullmatch("[1-9][0-9]{0,5}", of_node):
        return {}
    count, per_node = int(bounds[2]) - int(bounds[1] or 0), int(of_node)
    if count <= 0 or (count > per_node and count % per_node):
        return {}
    return {"gpus": min(count, per_node), "nodes": max(1, count // per_node)}


def before_script(value: object) -> object:
    """A launcher's last option stands before the script: `--nproc_per_node 8 train.py` is read as both."""
    return value[0] if isinstance(value, list) and value else value


def _values(launch: Mapping[str, object], label: str) -> object:
    """The value under a label, nested again where it was."""
    if label in launch:
        return launch[label]
    below = {key.partition(".")[2]: value for key, value in launch.items() if key.startswith(f"{label}.")}
    return nested(below) or None


def _from(result: Launched, key: str, options: Callable[[], Mapping[str, object]]) -> None:
    """Add the options of a launch file; a field that is not counted makes the file an unsupported key."""
    try:
        result.options.update(options())
    except PeftplanError as error:
        result.unsupported[key] = Unsupported("the launch file", str(error), "unknown")


def _named(
    result: Launched, tool: str, key: str, name: object, read: Callable[[object], Mapping[str, object]], file: str
) -> None:
    """A launch file by its name: a file in the tree of the config, one that the tool ships, or one of that name in the tree."""
    text = str(name[0] if isinstance(name, list) and name else name)
    if text.startswith("{"):
        _from(result, key, lambda: read(read_json(text, file=key).values))
        return
    path = files.path_of(text, file)
    if files.in_tree(path, file) and os.path.isfile(path):
        _from(result, key, lambda: read(path))
    elif (shipped := files.shipped(tool, text)) is not None:
        _from(result, key, lambda: read(shipped))
    elif files.in_tree(same := files.path_of(os.path.basename(text), file), file) and os.path.isfile(same):
        result.assumed[key] = f"{text} is not opened; {same} is read in its place"
        _from(result, key, lambda: read(same))
    elif not files.in_tree(path, file):
        result.unsupported[key] = Unsupported(name, f"{files.OUTSIDE}; add it with another --config", "unknown")
    else:
        result.unsupported[key] = Unsupported(
            name, "the launch file is not among the files; add it with another --config", "unknown"
        )


CHECKPOINTS = "final_state_dict_type"
"""End of the name of a field that says how checkpoints are written."""


OFFLOADED = "activation_cpu_offload"
"""A field of `fsdp_config` that ms-swift adds (4.6.0, trainers/arguments.py:272)."""


def _fsdp(result: Launched, tool: str, launch: Mapping[str, object], file: str, *, older: bool) -> None:
    """FSDP as axolotl and TrainingArguments say it: words, a version and a config; or as ms-swift does, a file by its name.

    `older`: a release of axolotl whose FSDP is version 1 unless it is told otherwise."""
    words, version = launch.get("fsdp"), launch.get("fsdp_version")

    def options(words: object, config: object) -> Values:
        fields: Values = {"version": 1} if older else {}
        for name, value in content(config or {}, field="fsdp_config").items():
            fields["version" if name == "fsdp_version" else name] = value
        fields |= {} if version is None else {"version": version}
        fields |= {} if word(words) in ("none", "", "true") else accelerate.of_words(words)
        without = (CHECKPOINTS, *UNREAD_OF_FSDP.get(tool, ()))
        offloads = tool == "swift" and fields.pop(OFFLOADED, False) is True
        passed = accelerate.passed_options({name: field for name, field in fields.items() if not name.endswith(without)})
        return passed | ({"kernels": ("swift-offload.activations",)} if offloads else {})

    def of_file(source: object) -> Values:
        values = content(source, field="fsdp")
        return options(values.get("fsdp"), values.get("fsdp_config"))

    if isinstance(words, str) and (
        words.startswith("{") or words.endswith(".json") or "fsdp" in (files.shipped(tool, words) or ())
    ):
        _named(result, tool, "fsdp", words, of_file, file)
        return
    config = _values(launch, "fsdp_config")
    if word(words) not in ("none", "", "false", "[]") or config:
        _from(result, "fsdp_config", lambda: options(words, config))
