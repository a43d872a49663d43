"""Keys of a tool's file that say a strategy, best first."""

from __future__ import annotations

import json
from collections.abc import Iterator

from peftplan.datafiles import load
from peftplan.distributed.strategy import Distributed
from peftplan.job.configs.documents import Values, flat
from peftplan.job.configs.facts import Facts
from peftplan.job.configs.launch_files import SHIPPED, Shipped
from peftplan.job.launch.writing import deepspeed_file, fsdp_fields


def launch_keys(distributed: Distributed, tool: Facts) -> Iterator[Values]:
    """Candidates, flat under dotted keys: launch files that the tool ships by their name, then all fields in the file."""
    processes: Values = {
        key: distributed.nodes if row["launch"] == "nodes" else distributed.world_size
        for key, row in tool.rows.items()
        if row.get("launch") in ("processes", "nodes") and key in tool.write.get("processes", ())
    }
    if distributed.nodes == 1:
        processes = {key: number for key, number in processes.items() if tool.rows[key].get("launch") != "nodes"}
    if distributed.strategy == "ddp" or distributed.strategy == tool.strategy:
        yield processes
    for key in tool.write.get("shipped", ()):
        yield from ({key: name, **processes} for name in load(SHIPPED, Shipped).get(tool.tool, {}))
    without = tool.write.get("without", ())
    by_label = {row["launch"]: key for key, row in reversed(list(tool.rows.items())) if "launch" in row and "*" not in key}
    by_label |= {label: label for label in by_label if tool.rows.get(label, {}).get("launch") == label}  # not a launcher's word
    if distributed.strategy.startswith("fsdp") and "fsdp_config" in by_label and distributed.strategy not in without:
        version, config = by_label.get("fsdp_version"), by_label["fsdp_config"]
        fields = fsdp_fields(distributed, prefix="fsdp_" if version else "")
        bare = {name.removeprefix("fsdp_"): value for name, value in fields.items()}
        if tool.write.get("program"):
            yield {by_label["fsdp"]: json.dumps({"fsdp": "full_shard auto_wrap", "fsdp_config": bare}), **processes}
            return
        switch: Values = {version: bare.pop("version")} if version else {by_label["fsdp"]: tool.write.get("fsdp", True)}
        yield {**switch, **flat(bare, config), **processes}
    elif distributed.strategy.startswith("zero") and "deepspeed" in by_label:
        inline, key = deepspeed_file(distributed), by_label["deepspeed"]
        yield {**({key: json.dumps(inline)} if tool.write.get("program") else flat(inline, key)), **processes}
