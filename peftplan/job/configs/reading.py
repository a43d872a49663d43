"""Values of a file + the facts of its tool → a `ConfigPlan`. One mechanism; what differs between tools is data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod

from peftplan.distributed.names import ALWAYS, OPTIONS
from peftplan.errors import nearest, quoted
from peftplan.job.configs.documents import Document, FileError, Values, by_word, flat, number_in, read_json, word
from peftplan.job.configs.effective import NOTHING, Effective
from peftplan.job.configs.facts import Facts, Known
from peftplan.job.configs.instances import plain
from peftplan.job.configs.interpolation import resolved
from peftplan.job.configs.launching import launched, of_comments
from peftplan.job.configs.models import named, weights_of
from peftplan.job.configs.plan import LAUNCHERS, ConfigPlan, Ignored, Read, Refused, Unsupported
from peftplan.job.configs.tool_file import Row, Rule
from peftplan.job.configs.with_file import fitting, of_trainer
from peftplan.job.loaded import ATTENTION
from peftplan.job.script import OF_DDP
from peftplan.job.setup import OF_PREFERENCES
from peftplan.validation import listed

WHOLE = frozenset(
    {
        "batch_size", "seq_len", "gradient_accumulation_steps", "r", "num_labels", "num_virtual_tokens", "save_total_limit",
        "init_r", "target_r", "oft_block_size", "boft_block_size", "n_frequency", "every_n_layers", "logits_to_keep",
        "max_completion_length", "max_prompt_length", "num_generations", "steps_per_generation",
        "move_model_batches",
        "n_layers",
    }
)  # fmt: skip
"""Options that are integers."""
CHECKPOINTED = {"gradient_checkpointing": True, "use_reentrant": False}
"""What a launch file that checkpoints decides, whatever the trainer does."""
TEXTS = frozenset({"model", "optim", "method"})
"""Options that are strings."""
SHARING = ("tp_size", "pp_size", "cp_size")
"""Options whose ranks share the rows of a batch."""
FLASH_KERNELS = (
    *("flash_attention_3", "kernels-community/flash-attn2", "kernels-community/flash-attn3"),
    "kernels-community/vllm-flash-attn3",
)
"""Kernels that save what FlashAttention 2 saves: outputs and a number per token and head."""
OLD_OPTIMIZERS = ("adamw_hf",)
"""Optimizers of transformers 4 that 5 does not have."""
DOUBTED = {"load": "model", "lora": "method", "peft": "method"}
"""Kind of a call of which something is assumed → the option that hangs on it."""
OPEN = re.compile(r"\$[\w{(]|<[A-Za-z_]|\{\{")
"""What a text holds that only the shell, the program or a template fills in."""


def plan_of(document: Document, tool: Facts, *, file: str) -> ConfigPlan:
    """The plan of one file; where the tool raises for a key and a change is known with which it runs, that of the changed file."""
    refused: dict[str, Refused] = {}
    reading = read_all(document, tool, file=file)
    while reading.refused.keys() - refused.keys():
        refused |= reading.refused
        instead = {key: value for row in refused.values() for key, value in row.instead.items()}
        reading = read_all(document, tool, file=file, instead=instead)
    return replace(reading.plan(), refused=refused)


def read_all(document: Document, tool: Facts, *, file: str, instead: Mapping[str, object] | None = None) -> Reading:
    """One file, each of its keys read and each rule applied. `instead`: values that replace the file's; None removes a key."""
    reading = Reading(document, tool, file, instead or {})
    for key, value in reading.values.items():
        reading.key(key, value)
    reading.leave_to_the_tool()
    for rule in tool.rules:
        reading.rule(rule)
    reading.refuse_unknown_names()
    return reading


class Reading:
    """One file while it is read; each key ends in one of three groups."""

    def __init__(self, document: Document, tool: Facts, file: str, instead: Mapping[str, object]) -> None:
        self.tool, self.file, self.document = tool, file, document
        self.by_default: dict[str, list[str]] = {}
        """Arguments of a program's calls that hold defaults of its command line → its options."""
        self.assumed: dict[str, str] = dict(document.assumed)
        values = document.values
        if document.kind == "calls":
            from peftplan.job.configs.order import arguments

            values, self.by_default, doubts = arguments(document.calls, tool.calls, tool.last, tool.positions)
            self.assumed |= {DOUBTED.get(kind, kind): doubt for kind, doubt in doubts.items()}
        if document.kind == "command":
            values = {key: self._object(key, value) for key, value in values.items()}
        self.values = {
            key: tool.rows.get(key, {}).get("empty") if value is None else value for key, value in flat(resolved(values)).items()
        }
        self.values |= instead
        for key in [key for key, value in instead.items() if value is None]:
            self.values.pop(key, None)
        self.effective = Effective(self.values, tool, document, file)
        self.options: Values = {}
        self.launch: Values = {}
        self.read: dict[str, Read] = {}
        self.ignored: dict[str, Ignored] = {}
        self.unsupported: dict[str, Unsupported] = {}
        self.refused: dict[str, Refused] = {}
        """Those of the unsupported keys with which the tool raises, and runs after a change."""
        self.defaults: dict[str, str] = {}
        self.model: str | None = None
        self.kind = "launch" if tool.tool in LAUNCHERS else "training"

    def key(self, key: str, value: object) -> None:
        """Put one key into its group."""
        known = self.tool.known(key)
        if known is None:
            near = nearest(key.rpartition(".")[2].lower(), self.tool.names())
            suggested = f"; did you mean {' or '.join(near)}?" if near else ""
            self.unsupported[key or "an empty key"] = Unsupported(
                value, f"not a key of {self.tool.tool} {self.tool.version}{suggested}"
            )
        elif "ignored" in known.row:
            self.ignored[key] = Ignored(value, known.row["ignored"], known.at)
        elif value is None and "none" not in known.row.get("values", ()):
            self.ignored[key] = Ignored(value, "empty: the tool's default applies", known.at)
        elif (
            _open(value)
            and word(value) not in map(word, known.row.get("values", ()))
            and not {"rule", "launch", "unsupported"} & known.row.keys()
            and known.row.get("to") != "target_modules"
        ):
            self._left_open(key, value, known.row)
        else:
            self._known(key, value, known)

    def _object(self, key: str, value: object) -> object:
        """The value of a command line's argument; of a field that is a mapping, JSON. Launch files are read as a whole."""
        if isinstance(value, str) and value.startswith("{") and "launch" not in self.tool.rows.get(key, {}):
            return read_json(value, file=f"{self.file}: {key}").values
        return value

    def _known(self, key: str, value: object, known: Known) -> None:
        row = known.row
        if "to" in row:
            self._to(key, value, row)
        elif "sets" in row:
            self._sets(key, value, known)
        elif "launch" in row:
            label, rest = row["launch"], self.tool.bare(key).partition(".")[2]
            self.launch[key if label == self.tool.tool else f"{label}.{rest}" if rest else label] = value
            self.read[key] = Read(value, "launch", row.get("why", ""))
        elif "rule" in row:
            self.read.setdefault(key, Read(value, "", row["rule"]))
        elif word(value) in (*NOTHING, *map(word, row.get("off", ()))):
            self.ignored[key] = Ignored(value, "off", known.at)
        else:
            effect = row.get("effect", "unknown")
            self.unsupported[key] = Unsupported(value, row["unsupported"], effect, row.get("option"))
            if "instead" in row:
                instead = {key if name == "*" else name: new for name, new in row["instead"].items()}
                self.refused[key] = Refused(value, row["unsupported"], instead)

    def _to(self, key: str, value: object, row: Row) -> None:
        option = row["to"]
        ours = by_word(row.get("values", {}), value)
        if ours is None:
            self.ignored[key] = Ignored(value, "it sets nothing", row.get("at", ""))
            return
        if option == "optim" and ours is value and ("." in str(value) or value in OLD_OPTIMIZERS):
            self.unsupported[key] = Unsupported(value, f"the states of {value} are not known here", option=option)
            return
        why = row.get("why", "")
        if option == "attn_implementation" and ours is value:
            if value in FLASH_KERNELS:
                ours, why = "flash_attention_2", "a kernel that saves what FlashAttention saves; counted as FlashAttention 2"
            elif value not in ATTENTION:
                self.unsupported[key] = Unsupported(value, "this attention is not known here", option=option)
                return
        self._set({option: self._typed(key, option, ours)})
        self.read[key] = Read(value, option, why)
        if key in self.by_default:
            self.assumed[option] = f"the program's default of {', '.join(self.by_default[key])}"

    def _left_open(self, key: str, value: object, row: Row) -> None:
        """A placeholder: what the tool's table assumes there, or an unsupported key."""
        if "open" not in row:
            self.unsupported[key] = Unsupported(value, "its value is a placeholder", option=row.get("to"))
            return
        option = row["to"]
        if row["open"] is None:
            self.read[key] = Read(value, "", row.get("why", ""))
            self.assumed[option] = "the program takes it from the data; the default is assumed"
            return
        self._set({option: row["open"]})
        self.read[key] = Read(value, option, row.get("why", ""))
        self.assumed[option] = f"the file has a placeholder; {row['open']} is assumed"

    def _typed(self, key: str, option: str, value: object) -> object:
        """A value of the option's type. Raises FileError, one line with file, line and key."""
        if option in WHOLE:
            text = str(value)
            if isinstance(value, bool) or not re.fullmatch(r"\d+(\.0*)?", text) or not 0 < float(text) < 2**31:
                raise FileError(self.file, self.document.lines.get(key), key, value, "accepted: a whole number of at least 1")
            return int(float(text))
        if option in TEXTS and not isinstance(value, str):
            raise FileError(self.file, self.document.lines.get(key), key, value, "accepted: a string")
        return tuple(value) if isinstance(value, list) else value

    def _sets(self, key: str, value: object, known: Known) -> None:
        sets = known.row["sets"]
        options = sets.get(word(value), sets.get("*"))
        if options is None:
            why = known.row.get("why") or f"{quoted(value)} is not supported"
            self.unsupported[key] = Unsupported(value, why, known.row.get("effect", "unknown"), known.row.get("option"))
            return
        self._set(options)
        self.read[key] = Read(value, ", ".join(options), known.row.get("why", ""))

    def _set(self, options: Mapping[str, object]) -> None:
        for option, value in options.items():
            if option == "model":
                self.model = str(value)
            else:
                self.options[option] = value
            self.defaults.pop(option, None)

    def leave_to_the_tool(self) -> None:
        """Options that the file leaves open, as the tool's defaults have them."""
        for key, options, at in self.tool.options_by_default:
            if self.values.get(key) is not None:
                continue
            for option, value in options.items():
                if option not in self.options:
                    self.options[option] = value
                    self.defaults[option] = self._place(at)

    def _place(self, at: str) -> str:
        return f"{self.tool.tool} {self.tool.version}{at and ', '}{at}"

    def rule(self, rule: Rule) -> None:
        """Apply a rule whose keys have its values."""
        when = rule.get("when", {})
        for key, accepted in when.items():
            if not self.effective.holds(key, accepted):
                return
        why, at = rule.get("why", ""), rule.get("at", "")
        for option, stated_value in rule.get("set", {}).items():
            value = self.effective.meant(stated_value)
            if value is None:
                continue
            if self.document.kind == "calls" and isinstance(stated_value, Mapping) and "key" in stated_value and not plain(value):
                self.unsupported[stated_value["key"]] = Unsupported(value, "its value is a placeholder", option=option)
                continue
            if option == "loss_type" and isinstance(value, tuple):
                (value, *others) = value
                if others:
                    self.unsupported[option] = Unsupported(value, "a sum of losses is not counted", option=option)
                    self.read.pop(option, None)
            if option in WHOLE and isinstance(value, tuple) and isinstance(stated_value, Mapping):
                value = self._typed(stated_value.get("key", option), option, value)
            self._set({option: value})
            if not any(self.values.get(key) is not None for key in when):
                schema = (self.tool.schema[key][1] for key in when if key in self.tool.schema)
                self.defaults[option] = self._place(at or next(schema, ""))
        for key, default in rule.get("defaults", {}).items():
            if self.values.get(key) is None:
                self.effective.defaults[key] = default
                if "to" in (meant := self.tool.rows[key]):
                    self._set({meant["to"]: by_word(meant.get("values", {}), default)})
                    self.defaults[meant["to"]] = self._place(at)
        for option, names in rule.get("add", {}).items():
            before = listed(self.options.get(option))
            self._set({option: tuple(dict.fromkeys((*(before if isinstance(before, tuple) else ()), *names)))})
            if rule.get("by_default"):
                self.defaults[option] = self._place(at)
        deciding = () if rule.get("by_default") else when  # what the tool does by itself no key says
        set_keys = [key for key in deciding if self.values.get(key) is not None and key not in self.unsupported]
        if options := ", ".join((*rule.get("set", {}), *rule.get("add", {}))):
            for key in set_keys:
                before = self.read.get(key)
                rest = [before.option] if before and before.option and before.option != options else []
                reason = f"{why} ({at})" if at and why else why or at
                whys = [text for text in (before.why if before and before.option else "", reason) if text]
                self.read[key] = Read(self.values[key], ", ".join([*rest, options]), "; ".join(dict.fromkeys(whys)))
                self.ignored.pop(key, None)
        if (refusal := rule.get("unsupported")) is not None:
            key, effect = refusal["key"], refusal.get("effect", "unknown")
            value = self.values.get(key, "by default")
            self.unsupported[key] = Unsupported(value, refusal["why"], effect, refusal.get("option"))
            if "instead" in refusal:
                self.refused[key] = Refused(value, refusal["why"], refusal["instead"])
            self.read.pop(key, None)
            self.ignored.pop(key, None)
        settled = [key for key in rule.get("supports", ()) if self.unsupported.pop(key, None)]
        for key in settled:
            if self.values.get(key) is not None:
                self.read[key] = Read(self.values[key], options if key in when else "", why)
        if settled or "supports" not in rule:
            self.assumed |= rule.get("assumed", {})
        self.kind = rule.get("kind", self.kind)

    def refuse_unknown_names(self) -> None:
        """A key that names an option's value, and no rule knows the name: it is not supported."""
        for key, row in self.tool.rows.items():
            if key in self.read and "names" in row and row["names"] not in self.options:
                value = self.read.pop(key).value
                self.unsupported[key] = Unsupported(value, f"{quoted(value)} is not known to peftplan", option=row["names"])

    def _accumulate(self, launch: Mapping[str, object]) -> None:
        """The micro batches of a step, where the file has the rows of the step on all ranks (`Facts.batches`)."""
        numbers = [str(self.effective.of(key)) for key in self.tool.batches]
        if numbers and all(re.fullmatch("[1-9][0-9]{0,9}", number) for number in numbers):
            global_batch, micro_batch = map(int, numbers)
            sharing = prod(number_in(self.options, name) for name in SHARING)
            ranks = max(number_in(launch, "gpus") * number_in(launch, "nodes") // sharing, 1)
            micro_batches = self.options["gradient_accumulation_steps"] = max(global_batch // (micro_batch * ranks), 1)
            if micro_batches == 1 and self.options.pop("sync_each_batch", None) is not None:
                for key, row in self.read.items():
                    if "sync_each_batch" in (options := row.option.split(", ")):
                        rest = [option for option in options if option != "sync_each_batch"]
                        self.read[key] = Read(row.value, ", ".join(rest), row.why if rest else "a step has one micro batch")

    def _divide_batch(self) -> None:
        """The micro batches that a pipeline makes of a rank's rows, and what of its keys is not known."""
        if self.tool.micro_batch is None:
            return
        staged = number_in(self.options, "pp_size") > 1
        section = self.tool.micro_batch.rpartition(".")[0]
        for key in [key for key in self.read if key.startswith(f"{section}.") and key != self.tool.micro_batch]:
            if not staged:
                for option in self.read[key].option.split(", "):
                    self.options.pop(option, None)
                self.read[key] = Read(self.read[key].value, "", "with stages of a pipeline")
            elif not self.read[key].option and not self.read[key].why.startswith("stages send"):
                self.unsupported[key] = Unsupported(self.read.pop(key).value, "its effect has not been examined")
        if staged:
            rows, text = number_in(self.options, "batch_size"), str(self.values.get(self.tool.micro_batch))
            size = max(int(text), 1) if text.isdecimal() else 1
            self.options |= {"batch_size": size, "pp_microbatches": max(rows // size, 1)}
            if self.tool.micro_batch in self.read:
                self.read[self.tool.micro_batch] = Read(size, "batch_size, pp_microbatches", "rows of a micro batch")

    def plan(self) -> ConfigPlan:
        """What was read; options that the method does not have are left out."""
        if self.tool.tool in LAUNCHERS:
            self.launch = {self.tool.tool: self.document.values}
        for fact, number in of_comments(self.document.comments).items():
            if not {"gpus", "processes"} & self.launch.keys() or fact == "nodes":
                self.launch.setdefault(fact, number)
                self.assumed["gpus"] = "as the command in its comments launches it"
        if self.tool.strategy and any(key.startswith("distributed.") for key in self.launch):
            self.launch.setdefault("distributed.strategy", self.tool.strategy)
        launch = launched(self.tool.tool, self.launch, self.document.environment, file=self.file)
        if self.tool.strategy and number_in(launch.options, "gpus") > 1:
            launch.options.setdefault("strategy", self.tool.strategy)
        self.unsupported |= launch.unsupported
        self.read = {key: row for key, row in self.read.items() if key not in launch.unsupported}
        self.assumed |= launch.assumed
        sharing = prod(number_in(self.options, name) for name in SHARING)
        if "gpus" not in self.launch and str(self.launch.get("distributed.dp_size")).isdecimal():  # of each rank's matrices
            launch.options["gpus"] = number_in(launch.options, "gpus") * sharing
        elif "gpus" in launch.assumed and number_in(launch.options, "gpus") % sharing:
            launch.options["gpus"] = sharing
            self.assumed["gpus"] = f"the launcher decides; {sharing} are assumed, as tp_size and pp_size need them"
        self._accumulate(launch.options)
        self._divide_batch()
        if self.tool.launched_precision and self.options.get("autocast") == "none" and "autocast" in launch.options:
            self._set({"autocast": launch.options["autocast"]})
        options = fitting(of_trainer({**launch.options, **self.options, **by_launch(launch.options)}))
        of_ddp = {name: value for name in OF_DDP if isinstance(value := options.get(name), bool)}
        if options.get("strategy", "ddp") != "ddp":
            options = {name: value for name, value in options.items() if name not in OF_DDP}
        if "strategy" not in options and options.get("gpus", 1) == 1:  # what says how to share, where nothing is shared
            options = {name: value for name, value in options.items() if name in ALWAYS or name not in OPTIONS}
            if self.tool.device_map and self.kind == "training":
                options.setdefault("device_map", self.tool.device_map)
        for key, row in self.read.items():
            if row.option and not {"model", "launch", *OF_DDP, *options} & set(row.option.split(", ")):
                whose = self.options.get("trainer") if row.option in OF_PREFERENCES else self.options.get("method")
                self.read[key] = Read(row.value, "", f"{whose} has no {row.option}")
        plan = ConfigPlan(
            self.tool.tool,
            self.tool.version,
            (self.file,),
            None,
            options,
            self.launch,
            self.read,
            self.ignored,
            self.unsupported,
            {name: at for name, at in self.defaults.items() if name in options},
            self.assumed,
            self.kind,  # type: ignore[arg-type]
            of_ddp,
        )
        for other in ("teacher_model", "reward_model"):
            if other in options:
                options[other], _ = named(str(options[other]), self.tool, file=self.file)
        if not self.model:
            return plan
        model, by_name = named(self.model, self.tool, file=self.file)
        of_weights, unsupported = None, self.unsupported
        if not self.tool.in_16_bits:  # Unsloth's own rules say how repositories store their weights
            options, of_weights, of_repository = weights_of(self.model, options)
            key = next((key for key, row in self.read.items() if row.option == "model"), "model")
            plan = replace(plan, read={name: row for name, row in self.read.items() if of_repository is None or name != key})
            unsupported = unsupported | ({} if of_repository is None else {key: of_repository})
        about = "; ".join(filter(None, (by_name, of_weights)))
        assumed = {**self.assumed, "model": about} if about else self.assumed
        return replace(plan, model=model, options=options, assumed=assumed, unsupported=unsupported)


def by_launch(options: Mapping[str, object]) -> Mapping[str, object]:
    """What counts of a launch whatever the training file says: the checkpoints that accelerate makes itself."""
    return CHECKPOINTED if options.get("gradient_checkpointing") else {}


def _open(value: object) -> bool:
    """Whether a value, or one in a list, is filled in by somebody else."""
    if isinstance(value, list):
        return any(isinstance(each, str) and OPEN.search(each) for each in value)
    return isinstance(value, str) and OPEN.search(value) is not None
