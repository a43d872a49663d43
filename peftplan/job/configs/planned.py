"""A file that was read → its `ConfigPlan`: the launch, the rows of each rank, and the weights of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod

from peftplan.distributed.names import ALWAYS, OPTIONS
from peftplan.job.configs.documents import Document, Values, flat, number_in, place
from peftplan.job.configs.facts import Facts
from peftplan.job.configs.launching import Launched, launched, of_comments
from peftplan.job.configs.models import named, unknown_dtype, weights_of
from peftplan.job.configs.plan import LAUNCHERS, ConfigPlan, Read, Refused, Unsupported
from peftplan.job.configs.reading import Reading, read_all
from peftplan.job.configs.with_file import fitting, of_trainer
from peftplan.job.script import EXAMPLES, OF_DDP
from peftplan.job.setup import OF_PREFERENCES
from peftplan.versions import FIRST_COMPARED

DECIDING = ("attn_implementation",)
"""Options that decide what other keys of a file mean: those of packed rows."""
CHECKPOINTED = {"gradient_checkpointing": True, "use_reentrant": False}
"""What a launch file that checkpoints decides, whatever the trainer does."""
SHARING = ("tp_size", "pp_size", "cp_size", "sp_size")
"""Options whose ranks share the rows of a batch."""


def plan_of(document: Document, tool: Facts, *, file: str) -> ConfigPlan:
    """The plan of one file; where the tool raises for a key, and a change is known that runs, that of the changed file."""
    refused: dict[str, Refused] = {}
    chosen = _chosen(document, tool)
    reading = read_all(document, tool, file=file, instead=chosen)
    while reading.refused.keys() - refused.keys():
        refused |= reading.refused
        instead = {key: value for row in refused.values() for key, value in row.instead.items()}
        reading = read_all(document, tool, file=file, instead=chosen | instead)
    plan = planned(reading)
    added = chosen.keys() - flat(document.values).keys()
    return replace(
        plan, refused={**refused, **plan.refused}, read={key: row for key, row in plan.read.items() if key not in added}
    )


def _chosen(document: Document, tool: Facts) -> Values:
    """Keys of the tool → what the user chose in their place, where it decides what other keys mean."""
    if document.kind == "calls":
        return {}
    options = ((key, row.get("to")) for key, row in tool.rows.items())
    return {key: document.chosen[option] for key, option in options if option in DECIDING and document.chosen.get(option)}


def _accumulate(reading: Reading, launch: Mapping[str, object]) -> None:
    """The micro batches of a step, where the file has the rows of the step on all ranks (`Facts.batches`)."""
    numbers = [str(reading.effective.of(key)) for key in reading.tool.batches]
    if numbers and all(re.fullmatch("[1-9][0-9]{0,9}", number) for number in numbers):
        global_batch, micro_batch = map(int, numbers)
        sharing = prod(number_in(reading.options, name) for name in SHARING)
        ranks = max(number_in(launch, "gpus") * number_in(launch, "nodes") // sharing, 1)
        micro_batches = reading.options["gradient_accumulation_steps"] = max(global_batch // (micro_batch * ranks), 1)
        if micro_batches == 1 and reading.options.pop("sync_each_batch", None) is not None:
            for key, row in reading.read.items():
                if "sync_each_batch" in (options := row.option.split(", ")):
                    rest = [option for option in options if option != "sync_each_batch"]
                    reading.read[key] = Read(row.value, ", ".join(rest), row.why if rest else "a step has one micro batch")


def _add_nodes(reading: Reading, launch: Launched) -> None:
    """As many nodes as a stage of a pipeline needs whose ranks divide experts, where the launcher decides."""
    owners, gpus = number_in(launch.options, "ep_size"), number_in(launch.options, "gpus")
    divided = number_in(reading.options, "tp_size") * number_in(reading.options, "pp_size")
    assumed = "gpus" in launch.assumed and ("nodes" not in launch.options or "nodes" in launch.assumed)
    if assumed and owners > 1 and gpus * number_in(launch.options, "nodes") // divided % owners:
        nodes = launch.options["nodes"] = -(-owners * divided // gpus)
        reading.assumed["nodes"] = f"the launcher decides; {nodes}, as pp_size and ep_size need them"


def _divide_batch(reading: Reading) -> None:
    """The micro batches that a pipeline makes of a rank's rows, and what of its keys is not known."""
    if reading.tool.micro_batch is None:
        return
    staged = number_in(reading.options, "pp_size") > 1
    section = reading.tool.micro_batch.rpartition(".")[0]
    for key in [key for key in reading.read if key.startswith(f"{section}.") and key != reading.tool.micro_batch]:
        if not staged:
            for option in reading.read[key].option.split(", "):
                reading.options.pop(option, None)
            reading.read[key] = Read(reading.read[key].value, "", "with stages of a pipeline")
        elif not reading.read[key].option and not reading.read[key].why.startswith("stages send"):
            reading.unsupported[key] = Unsupported(reading.read.pop(key).value, "its effect has not been examined")
    if staged:
        rows, text = number_in(reading.options, "batch_size"), str(reading.values.get(reading.tool.micro_batch))
        size = max(int(text), 1) if text.isdecimal() else 1
        reading.options |= {"batch_size": size, "pp_microbatches": max(rows // size, 1)}
        if reading.tool.micro_batch in reading.read:
            reading.read[reading.tool.micro_batch] = Read(size, "batch_size, pp_microbatches", "rows of a micro batch")


def _releases(reading: Reading) -> dict[str, str]:
    """The releases that run the job, as a notebook installs them; one that no formula was compared with is unsupported."""
    pairs = (release.rstrip(".").split("==") for release in reading.document.installs.split() if reading.tool.installed)
    releases = {package: release for package, release in pairs if package in EXAMPLES}
    if FIRST_COMPARED.after(oldest := releases.get("transformers")):
        why = f"nothing older than {FIRST_COMPARED.named} was compared; name the release that runs it with --transformers"
        reading.unsupported["transformers"] = Unsupported(oldest, why)
        del releases["transformers"]
    return releases


def planned(reading: Reading) -> ConfigPlan:
    """What was read; options that the method does not have are left out."""
    if reading.tool.tool in LAUNCHERS:
        reading.launch = {reading.tool.tool: reading.document.values}
    for fact, number in of_comments(reading.document.comments).items():
        if not {"gpus", "processes"} & reading.launch.keys() or fact == "nodes":
            reading.launch.setdefault(fact, number)
            reading.assumed["gpus"] = "as the command in its comments launches it"
    if reading.tool.strategy and any(key.startswith("distributed.") for key in reading.launch):
        reading.launch.setdefault("distributed.strategy", reading.tool.strategy)
    chosen = {**reading.document.chosen, "tool_version": reading.effective.older}
    launch = launched(reading.tool.tool, reading.launch, reading.document.environment, file=reading.file, chosen=chosen)
    if reading.tool.strategy and number_in(launch.options, "gpus") > 1:
        launch.options.setdefault("strategy", reading.tool.strategy)
    reading.unsupported |= launch.unsupported
    reading.read = {key: row for key, row in reading.read.items() if key not in launch.unsupported}
    reading.assumed |= launch.assumed
    sharing = prod(number_in(reading.options, name) for name in SHARING)
    if "gpus" not in reading.launch and str(reading.launch.get("distributed.dp_size")).isdecimal():  # of each rank's matrices
        launch.options["gpus"] = number_in(launch.options, "gpus") * sharing
    elif "gpus" in launch.assumed and number_in(launch.options, "gpus") % sharing:
        launch.options["gpus"] = sharing
        reading.assumed["gpus"] = f"the launcher decides; {sharing} are assumed, as tp_size and pp_size need them"
    _add_nodes(reading, launch)
    _accumulate(reading, launch.options)
    _divide_batch(reading)
    if reading.tool.launched_precision and reading.options.get("autocast") == "none" and "autocast" in launch.options:
        reading.set({"autocast": launch.options["autocast"]})
    options = fitting(of_trainer({**launch.options, **reading.options, **by_launch(launch.options)}))
    of_ddp = {name: value for name in OF_DDP if isinstance(value := options.get(name), (int, float))}
    if options.get("strategy", "ddp") != "ddp":
        options = {name: value for name, value in options.items() if name not in OF_DDP}
    if str(options.get("strategy")).startswith("zero"):  # DeepSpeed clips by itself
        options.pop("clip_gradients", None)
    alone = number_in(options, "gpus") * number_in(options, "nodes") == 1
    if "strategy" not in options and alone:  # what says how to share, where nothing is shared
        options = {name: value for name, value in options.items() if name in ALWAYS or name not in OPTIONS}
        if reading.tool.device_map and reading.kind == "training":
            options.setdefault("device_map", reading.tool.device_map)
    for key, row in reading.read.items():
        if row.option and not {"model", "launch", *OF_DDP, *options} & set(row.option.split(", ")):
            whose = reading.options.get("trainer") if row.option in OF_PREFERENCES else reading.options.get("method")
            reading.read[key] = Read(row.value, "", f"{whose} has no {row.option}")
    plan = ConfigPlan(
        reading.tool.tool,
        reading.effective.older or reading.tool.version,
        (reading.file,),
        None,
        options,
        reading.launch,
        reading.read,
        reading.ignored,
        reading.unsupported,
        {name: at for name, at in reading.defaults.items() if name in options},
        reading.assumed,
        reading.kind,  # type: ignore[arg-type]
        of_ddp,
        refused=launch.refused,
        places={key: place(reading.file, reading.effective.line(key)) for key in reading.values},
        releases=_releases(reading),
    )
    for other in ("teacher_model", "reward_model"):
        if other in options:
            options[other], _ = named(str(options[other]), reading.tool, file=reading.file)
    if not reading.model:
        return plan
    model, by_name = named(reading.model, reading.tool, file=reading.file)
    of_weights, unsupported = None, reading.unsupported
    if not reading.tool.in_16_bits:  # Unsloth's own rules say how repositories store their weights
        options, of_weights, of_repository = weights_of(reading.model, options, reading.tool.tool)
        key = next((key for key, row in reading.read.items() if row.option == "model"), "model")
        if isinstance(of_repository, Refused):
            plan = replace(plan, refused={**plan.refused, key: of_repository})
        elif of_repository is not None:
            plan = replace(plan, read={name: row for name, row in reading.read.items() if name != key})
            unsupported = unsupported | {key: of_repository}
    if reading.kind == "training" and (of_dtype := unknown_dtype(model, options, plan.releases)) is not None:
        key = next((key for key, row in reading.read.items() if row.option == "dtype"), "dtype")
        plan = replace(plan, read={name: row for name, row in plan.read.items() if name != key})
        unsupported = unsupported | {key: of_dtype}
    about = "; ".join(filter(None, (by_name, of_weights)))
    assumed = {**reading.assumed, "model": about} if about else reading.assumed
    return replace(plan, model=model, options=options, assumed=assumed, unsupported=unsupported)


def by_launch(options: Mapping[str, object]) -> Mapping[str, object]:
    """What counts of a launch whatever the training file says: the checkpoints that accelerate makes itself."""
    return CHECKPOINTED if options.get("gradient_checkpointing") else {}
