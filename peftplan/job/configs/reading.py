"""Values of a file + the facts of its tool → its keys in three groups. One mechanism; what differs between tools is data."""

from __future__ import annotations

import re
from collections.abc import Mapping

from peftplan.errors import nearest, quoted
from peftplan.job.configs.components import unknown_names
from peftplan.job.configs.documents import Document, FileError, Values, by_word, flat, read_json, word
from peftplan.job.configs.effective import NOTHING, Effective
from peftplan.job.configs.facts import Facts, Known
from peftplan.job.configs.instances import plain
from peftplan.job.configs.interpolation import resolved
from peftplan.job.configs.plan import LAUNCHERS, NO_EFFECT, Ignored, Read, Refused, Unsupported
from peftplan.job.configs.tool_file import Row, Rule
from peftplan.job.setup import ATTENTION
from peftplan.job.trainers import TRAINERS
from peftplan.methods.targets import OURS
from peftplan.validation import listed

WHOLE = frozenset(
    {
        "batch_size", "seq_len", "gradient_accumulation_steps", "r", "num_labels", "num_virtual_tokens", "save_total_limit",
        "init_r", "target_r", "oft_block_size", "boft_block_size", "n_frequency", "every_n_layers", "logits_to_keep",
        "max_completion_length", "max_prompt_length", "num_generations", "steps_per_generation",
        "n_passages",
        "move_model_batches", "eval_batch_size",
        "n_layers",
    }
)  # fmt: skip
"""Options that are integers."""
UNLIMITED = frozenset({"save_total_limit"})
"""Those of which a number below 1 says that there is no limit, as in transformers (trainer_utils.py, `rotate_checkpoints`)."""
TEXTS = frozenset({"model", "optim", "method"})
"""Options that are strings."""
FLASH_KERNELS = (
    *("flash_attention_3", "kernels-community/flash-attn2", "kernels-community/flash-attn3"),
    "kernels-community/vllm-flash-attn3",
)
"""Kernels that save what FlashAttention 2 saves: outputs and a number per token and head."""
OLD_OPTIMIZERS = ("adamw_hf",)
"""Optimizers of transformers 4 that 5 does not have."""
DOUBTED = {"load": "model", "lora": "method", "peft": "method"}
"""Kind of a call of which something is assumed → the option that hangs on it."""
ALIKE = 0.75
"""The least `difflib` ratio of a key that is suggested: a tool has hundreds, of which some share most letters with any word."""
OPEN = re.compile(r"\$[\w{(]|<[A-Za-z_]|\{\{")
"""What a text holds that only the shell, the program or a template fills in."""


def read_all(document: Document, tool: Facts, *, file: str, instead: Mapping[str, object] | None = None) -> Reading:
    """One file, each of its keys read and each rule applied. `instead`: values that replace the file's; None removes a key."""
    reading = Reading(document, tool, file, instead or {})
    for key, value in reading.values.items():
        reading.key(key, value)
    reading.leave_to_the_tool()
    if (older := reading.effective.older) is not None:
        reading.set({"tool_version": older})
    for rule in tool.rules:
        reading.rule(rule)
    reading.refuse_unknown_names()
    mode = reading.options.get("vllm_mode", reading.effective.of("vllm_mode"))
    beside_vllm = mode == "colocate" and reading.options.get("use_vllm") is not False  # ms-swift 4.6.0, rollout_mixin.py:1212
    if (grows := reading.effective.grows_segments()) is not None and not beside_vllm:
        reading.options.setdefault("expandable_segments", grows)
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
        self.effective.unknown |= unknown_names(self.values, tool)
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
        self._check_mapping(key.rpartition(".")[0])
        known = self.tool.known(key)
        if key in self.effective.unknown:
            self.unsupported[key] = Unsupported(value, self.effective.unknown[key])
        elif known is None:
            place, _, last = key.lower().rpartition(".")
            beside = [name.removeprefix(f"{place}.") for name in self.tool.names() if place and name.startswith(f"{place}.")]
            near = nearest(last, beside, cutoff=ALIKE) or nearest(last, self.tool.names(), cutoff=ALIKE)
            suggested = f"; did you mean {' or '.join(near)}?" if near else ""
            why = f"not a key of {self.tool.tool} {self.tool.version}"
            if self.tool.drops_unknown and key:
                self.ignored[key] = Ignored(value, f"{why}, which leaves it out{suggested}", self.tool.drops_unknown)
                self.assumed |= {key: f"{NO_EFFECT} {self.tool.tool} leaves it out{suggested}"} if near else {}
            else:
                self.unsupported[key or "an empty key"] = Unsupported(value, f"{why}{suggested}")
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

    def _check_mapping(self, key: str) -> None:
        """Raises FileError for a mapping under a key whose option is a number or a text."""
        option = self.tool.rows.get(key, {}).get("to", "")
        if option in WHOLE | TEXTS:
            inner = {name[len(key) + 1 :]: value for name, value in self.values.items() if name.startswith(f"{key}.")}
            self._typed(key, option, inner)

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
                self.refused[key] = Refused(value, row["unsupported"], instead, row.get("option"))

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
        self.set({option: self._typed(key, option, _names(value) if option == "target_modules" and ours is value else ours)})
        self.read[key] = Read(value, option, why)
        if key in self.by_default:
            self.assumed[option] = f"the program's default of {', '.join(self.by_default[key])}"

    def _left_open(self, key: str, value: object, row: Row) -> None:
        """A placeholder: what the tool's table assumes there, or an unsupported key."""
        if "open" not in row:
            self._not_known(key, value, row.get("to", row.get("option")))
            return
        option = row["to"]
        if row["open"] is None:
            self.read[key] = Read(value, "", row.get("why", ""))
            self.assumed[option] = "the program takes it from the data; the default is assumed"
            return
        self.set({option: row["open"]})
        self.read[key] = Read(value, option, row.get("why", ""))
        self.assumed[option] = f"the file has a placeholder; {row['open']} is assumed"

    def _not_known(self, key: str, value: object, option: str | None) -> None:
        """Put a key aside whose value the program computes, or somebody else fills in."""
        text = str(value).strip("<>").removeprefix("value ")
        why = f"the program computes it: {text}" if self.document.kind == "calls" else f"{text} is a placeholder"
        instead = f"; set --{option.replace('_', '-')}" if option is not None and option != "model" else ""
        self.unsupported[key] = Unsupported(value, why + instead, option=option)

    def _typed(self, key: str, option: str, value: object) -> object:
        """A value of the option's type. Raises FileError, one line with file, line and key."""
        if option in WHOLE:
            text = str(value)
            if option in UNLIMITED and re.fullmatch(r"-\d+|0", text):
                return None
            if isinstance(value, bool) or not re.fullmatch(r"\d+(\.0*)?", text) or not 0 < float(text) < 2**31:
                accepted = "accepted: a whole number from 1 to 2,147,483,647"
                raise FileError(self.file, self.effective.line(key), key, value, accepted)
            return int(float(text))
        if option in TEXTS and not isinstance(value, str):
            raise FileError(self.file, self.effective.line(key), key, value, "accepted: a string")
        return tuple(value) if isinstance(value, list) else value

    def _sets(self, key: str, value: object, known: Known) -> None:
        sets = known.row["sets"]
        options = sets.get(word(value), sets.get("*"))
        if options is None:
            why = known.row.get("why") or f"{quoted(value)} is not supported"
            self.unsupported[key] = Unsupported(value, why, known.row.get("effect", "unknown"), known.row.get("option"))
            return
        self.set(options)
        self.read[key] = Read(value, ", ".join(options), known.row.get("why", ""))

    def set(self, options: Mapping[str, object]) -> None:
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
                self._not_known(stated_value["key"], value, option)
                continue
            if option == "loss_type" and isinstance(value, tuple):
                adds = any(trainer.many_losses for trainer in TRAINERS.values() if trainer.name == self.options.get("trainer"))
                (value, *others) = (",".join(value),) if adds else value
                if others:
                    self.unsupported[option] = Unsupported(value, "a sum of losses is not counted", option=option)
                    self.read.pop(option, None)
            if option in WHOLE and isinstance(stated_value, Mapping) and (isinstance(value, tuple) or "key" in stated_value):
                key = stated_value.get("key", option)
                if _open(value):
                    self._not_known(key, value, option)
                    continue
                value = self._typed(key, option, value)
            if option == "target_modules" and isinstance(stated_value, Mapping) and "key" in stated_value:
                value = _names(value)
            self.set({option: value})
            if not any(self.values.get(key) is not None for key in when):
                schema = (self.tool.schema[key][1] for key in when if key in self.tool.schema)
                self.defaults[option] = self._place(at or next(schema, ""))
        for key, default in rule.get("defaults", {}).items():
            if self.values.get(key) is None:
                self.effective.defaults[key] = default
                if "to" in (meant := self.tool.rows.get(key, {})):
                    self.set({meant["to"]: by_word(meant.get("values", {}), default)})
                    self.defaults[meant["to"]] = self._place(at)
        self.effective.values = {**self.effective.values, **rule.get("instead", {})}
        for option, names in rule.get("add", {}).items():
            before = listed(self.options.get(option))
            self.set({option: tuple(dict.fromkeys((*(before if isinstance(before, tuple) else ()), *names)))})
            if rule.get("by_default"):
                self.defaults[option] = self._place(at)
        deciding = () if rule.get("by_default") else when  # what the tool does by itself no key says
        set_keys = [key for key in deciding if self.values.get(key) is not None and key not in self.unsupported]
        if options := ", ".join((*rule.get("set", {}), *rule.get("add", {}))):
            for key in set_keys:
                before = self.read.get(key)
                named = dict.fromkeys((f"{before.option}, {options}" if before and before.option else options).split(", "))
                reason = f"{why} ({at})" if at and why else why or at
                whys = [text for text in (before.why if before and before.option else "", reason) if text]
                self.read[key] = Read(self.values[key], ", ".join(named), "; ".join(dict.fromkeys(whys)))
                self.ignored.pop(key, None)
        if (refusal := rule.get("unsupported")) is not None:
            key, effect = refusal["key"], refusal.get("effect", "unknown")
            value = self.values.get(key, "by default")
            self.unsupported[key] = Unsupported(value, refusal["why"], effect, refusal.get("option"))
            self.refused.pop(key, None)
            if "instead" in refusal:
                self.refused[key] = Refused(value, refusal["why"], refusal["instead"], refusal.get("option"))
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


def _names(targets: object) -> object:
    """Target modules as the tool reads them: a word of ours is a name to it."""
    return (targets,) if isinstance(targets, str) and word(targets) in OURS else targets


def _open(value: object) -> bool:
    """Whether a value, or one in a list, is filled in by somebody else."""
    if isinstance(value, list):
        return any(isinstance(each, str) and OPEN.search(each) for each in value)
    return isinstance(value, str) and OPEN.search(value) is not None
