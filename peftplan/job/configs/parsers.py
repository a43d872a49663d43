"""The command line of a program whose command is known: what its parser gives the program's settings."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from peftplan.job.configs.classes import Classes
from peftplan.job.configs.documents import Call, Values
from peftplan.job.configs.facts import facts, launcher_words
from peftplan.job.configs.instances import Instance, plain

PARSERS = ("HfArgumentParser", "TrlParser", "H4ArgumentParser")
"""Parsers that make objects of dataclasses (transformers, hf_argparser.py)."""
PARSING = ("parse_args_into_dataclasses", "parse_args_and_config", "parse")
"""Their methods that read the command line."""
SETTINGS = (
    *("TrainingArguments", "SFTConfig", "DPOConfig", "GRPOConfig", "KTOConfig", "ORPOConfig", "CPOConfig", "RewardConfig"),
    "RLOOConfig",
)
"""Ends of the names of classes of a library that hold the settings of a trainer."""
OF_SCRIPTS = (
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming"),
    "ignore_bias_buffers",
)
"""Fields of TRL's `ScriptArguments` (trl, scripts/utils.py)."""
OF_MODELS = (
    *("model_name_or_path", "model_revision", "dtype", "torch_dtype", "attn_implementation", "trust_remote_code", "use_peft"),
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save"),
    *("lora_task_type", "use_rslora", "use_dora", "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type"),
    *("use_bnb_nested_quant", "bnb_4bit_quant_storage"),
)
"""Fields of TRL's `ModelConfig` (trl, trainer/model_config.py)."""
OFF = ("do_train", "do_eval", "do_predict", "fp16", "bf16", "gradient_checkpointing", "group_by_length")
"""Switches of `TrainingArguments` that are off unless the command sets them (transformers, training_args.py)."""
TRUTHS = ("true", "false", "yes", "no", "on", "off", "t", "f", "y", "n", "none", "")
"""Texts that a function of the program may take for something else, as the type of an option."""
OF_TRL = {"ScriptArguments": OF_SCRIPTS, "ModelConfig": OF_MODELS}


def option_names(words: list[str]) -> list[str]:
    """Names of an option as its command's words are kept: `--lora-r` is `lora_r`."""
    return [word.lstrip("-").replace("-", "_") for word in words]


class Parsers(Classes):
    """Gives the objects of a parser the words of the command that runs the program (`command`; None where it is not known)."""

    def __init__(self) -> None:
        super().__init__()
        self.command: Values | None = None
        self.declared: dict[str, list[str]] = {}
        """Class of the program → the names of its fields, with a default or without."""
        self.settings_of: dict[str, str] = {}
        """Class of the program → the library's class of settings that it extends."""
        self.parsed: list[str] = []
        """The classes of the program's parser."""
        self.words_taken: set[str] = set()
        """Words of the command that a parser of the program takes."""
        self.of_parser: dict[str, ast.Call] = {}
        """Class of settings → the call that stands for its making."""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """A class, whose fields the command may set."""
        bases = [self.name_of(base) for base in node.bases]
        own = [each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]
        self.declared[node.name] = [*own, *(name for base in bases for name in self.declared.get(base, ()))]
        settings = next((self.settings_of.get(base, base) for base in bases if base.endswith(SETTINGS)), None)
        if settings is not None:
            self.settings_of[node.name] = settings
        super().visit_ClassDef(node)

    def field_value(self, field: str, default: object) -> object:
        """What the command gives a field, whose object may come from a parser; else its default."""
        return (self.command or {}).get(field, default)

    def _call(self, node: ast.Call) -> object:
        """How many words the command has, `len(sys.argv)`; else as any call."""
        if self.command and ast.unparse(node) == "len(sys.argv)":
            return 1 + 2 * len(self.command)
        return super()._call(node)

    def note_parser(self, node: ast.Call) -> None:
        """A parser that is made of classes."""
        first = node.args[0] if node.args else next((each.value for each in node.keywords if each.arg == "dataclass_types"), None)
        classes = first.elts if isinstance(first, (ast.Tuple, ast.List)) else [] if first is None else [first]
        self.parsed = [self.name_of(each) for each in classes]

    def note_argument(self, node: ast.Call) -> None:
        """An option of the command line, with the value that it has unless somebody gives another."""
        keywords = {keyword.arg: self.value(keyword.value) for keyword in node.keywords}
        words = [word for word in map(self.value, node.args) if isinstance(word, str)]
        options = [word for word in words if word.startswith("--")]
        if not words:
            return
        name = str(keywords.get("dest") or (options or words)[0].lstrip("-").replace("-", "_"))
        switch = {"store_true": False, "store_false": True}.get(str(keywords.get("action")))
        known = options and keywords.get("required") is not True and None not in keywords
        if options and (value := self.argument_of_command(options, keywords)) is not None:
            self._field(name, value[0], ast.unparse(node.func)[:200])
            return
        default = keywords.get("default", switch)
        if isinstance(default, str) and default.lower() in TRUTHS and keywords.get("type", "<str>") != "<str>":
            default = f"<{name}>"
        self._field(name, default if known else f"<{name}>", ast.unparse(node.func)[:200])
        if known:
            self.arguments[name] = options[0]

    def of_command(self, node: ast.Call) -> list[object] | None:
        """The objects that the parser makes of the command's words, in the order of its classes, and the words that it leaves;
        None where the command is not known."""
        if self.command is None or not self.parsed:
            return None
        self.words_taken.update(self.command)
        rest = any(each.arg == "return_remaining_strings" and self.value(each.value) is True for each in node.keywords)
        return [*(self._object_of(name, rest=rest) for name in self.parsed), *([[]] if rest else [])]

    def _object_of(self, name: str, *, rest: bool) -> Instance:
        command = self.command or {}
        own = self._names(name)
        fields = {
            **self.fields.get(name, {}),
            **{field: command[word] for field in own if (word := self._word(field)) in command},
        }
        settings = self.settings_of.get(name, "" if name in self.declared else name)
        if not settings.endswith(SETTINGS):
            return Instance(fields)
        taken = {self._word(field) for each in self.parsed for field in self._names(each)}
        others = {key: value for key, value in command.items() if key not in taken and key not in launcher_words(command)}
        of_library = (facts("transformers").schema, facts("trl").schema)
        if rest or any(self._is_unseen(each) for each in self.parsed):
            others = {key: value for key, value in others.items() if any(key in schema for schema in of_library)}
        known = {key: value for key, value in fields.items() if plain(value) and any(key in schema for schema in of_library)}
        if name not in self.of_parser:
            self.of_parser[name] = ast.parse(f"{settings}()", mode="eval").body  # type: ignore[assignment]
        node = self.of_parser[name]
        if node not in self.nodes.values():
            call: Call = {"call": settings, "args": [], "kwargs": {**known, **others}}
            self.calls.append(call)
            self.nodes[id(call)] = node
        off = dict.fromkeys(OFF, False) if settings.endswith("TrainingArguments") else {}
        return Instance({**off, **fields, **others}, made_by=[node])

    def _names(self, name: str) -> list[str]:
        """The fields of a class that the parser has, those of the library's settings left out."""
        last = name.rpartition(".")[2]
        return [*OF_TRL[last]] if last in OF_TRL else self.declared.get(name, [])

    def _is_unseen(self, name: str) -> bool:
        """Whether a class stands in a file that was not read."""
        return not (name in self.declared or name.endswith(SETTINGS) or name.rpartition(".")[2] in OF_TRL)

    def _word(self, field: str) -> str:
        """The command's word for a field: its name, or a beginning of it that no other field has, as argparse takes it."""
        command = self.command or {}
        if field in command:
            return field
        fields = [each for name in self.parsed for each in self._names(name)]
        return next((word for word in command if [each for each in fields if each.startswith(word)] == [field]), field)

    def unread(self) -> tuple[str, ...]:
        """Options of the command, a launcher's left out, that no parser of the program takes."""
        command = self.command or {}
        return tuple(word for word in command if word not in self.words_taken and word not in launcher_words(command))

    def argument_of_command(self, options: list[str], keywords: Mapping[str | None, object]) -> tuple[object] | None:
        """What the command gives an option of the program's own parser; None where it leaves it to the default."""
        command = self.command or {}
        word = next((name for name in option_names(options) if name in command), None)
        if word is None:
            return None
        self.words_taken.add(word)
        value = command[word]
        action = str(keywords.get("action"))
        if action in ("store_true", "store_false"):
            return (action == "store_true",)
        several = keywords.get("nargs") in ("+", "*") and not isinstance(value, list)
        return ([value] if several else value,)
