"""Options → the values of a tool's file: the tables of `facts` read backwards, with the reader as judge.

A value of an option has candidates: the keys of every row and rule that sets it. Each is tried in turn, and kept if the reader
then finds the value and loses none that it had found. What is left is said: an option that was chosen and that the tool has no
key for is refused, one that was filled in is the tool's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import peftplan.methods as methods
from peftplan.arch import catalogue
from peftplan.distributed.strategy import Distributed
from peftplan.errors import PeftplanError, RefusedError
from peftplan.job.configs.candidates import candidates
from peftplan.job.configs.documents import Values
from peftplan.job.configs.facts import Facts
from peftplan.job.configs.launch_keys import launch_keys
from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.planned import planned
from peftplan.job.configs.reading import Reading, read_all
from peftplan.job.configs.sayable import BY_TARGETS, BYTELESS, ROLES, fields_of, firm, spellings
from peftplan.job.configs.texts import document_of
from peftplan.job.configs.with_file import EVALUATED
from peftplan.job.job import Job
from peftplan.job.kernels import packages_of
from peftplan.job.launch import FILES
from peftplan.job.prepare import prepare
from peftplan.job.setup import Setup
from peftplan.job.sources import Source
from peftplan.job.trainers import ONE_FORWARD
from peftplan.methods.targets import ALL_LINEAR

STATED = (
    *("method", "r", "lora_dropout", "target_modules", "seq_len", "batch_size", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "optim", "dtype", "autocast"),
)
"""Options that a file states even where they are the tool's defaults."""


class Written(NamedTuple):
    """The values of a file. `changed`: option → its value in the job and in the tool; `left_out`: options that move no byte."""

    values: Values
    plan: ConfigPlan
    changed: Mapping[str, tuple[object, object]]
    left_out: tuple[str, ...]
    off: Mapping[str, str]
    """Switches that are off since no option says what they do → what they do."""


def written(job: Job, tool: Facts, *, chosen: frozenset[str] | None = None) -> Written:
    """The values of a tool's file for a job, flat under dotted keys. `chosen`: options that must be said (None: the job's own).

    Raises RefusedError, one line with the option, for a job that the tool cannot run or has no setting for.
    """
    tasks = tool.write["tasks"]
    if job.architecture.task_type not in tasks:
        raise RefusedError(
            f"task_type: {tool.called} trains {', '.join(tasks)}; {job.architecture.name} has the head of "
            f"{job.architecture.task_type}"
        )
    if job.setup.by.of_preferences:
        raise RefusedError(f"trainer: no config is written yet for {job.setup.by.called}; accepted: {', '.join(ONE_FORWARD)}")
    return _Writing(job, tool, job.chosen if chosen is None else chosen).written()


def repository(job: Job) -> str:
    """The repository, or the folder, that a file names the model by. Raises RefusedError where neither is known."""
    model = job.request.model
    if isinstance(model, str) and (entry := catalogue.find(model)) is not None:
        if "/" in model:
            return model
        same = (name for name in entry.siblings if name.rpartition("/")[2].lower() == model.lower())
        return next(same, entry.repo_id)
    if isinstance(model, Source) and (os.path.isdir(model.name) or model.place.startswith("Hub ")):
        return model.name
    name = model.name if isinstance(model, Source) else job.architecture.name
    raise RefusedError(
        f"model: the repository of {name} is not known, and a training tool needs one; accepted: a built-in name "
        "(peftplan models), a Hub id, or a folder with the weights"
    )


class _Trial(NamedTuple):
    """What the reader makes of some values: the fields of the job, or the options where no job comes of them."""

    values: Values
    reading: Reading
    plan: ConfigPlan
    fields: Values
    error: PeftplanError | None

    def has(self, field: str, target: Values) -> bool:
        return field in self.fields and self.fields[field] == target[field]


class _Writing:
    """One file while it is written."""

    def __init__(self, job: Job, tool: Facts, chosen: frozenset[str]) -> None:
        self.job, self.tool, self.stated = job, tool, chosen
        self.target = fields_of(job)
        required = [name for name, value in self.target.items() if firm(name, value, chosen)]
        self.order = [*required, *(name for name in self.target if name not in required)]
        self.required = frozenset(required)
        self.off: dict[str, str] = {}
        self.fields: dict[str, Values] = {}
        """Model and options → the fields of their job, for those that were tried."""
        self.tries = list(tool.write.get("tries", ()))
        """Values that are tried for any field."""

    def written(self) -> Written:
        now = self._try({**self._of_model(), **self.tool.write.get("first", {})})
        now = self._launched(now)
        for _ in range(2):
            for field in self.order:
                now = self._with(field, now)
            now = self._without_unsupported(now)
        now = self._try({**now.values, **self._beside(now.reading)})
        self._check(now)
        lost = [field for field in self.order if not now.has(field, self.target)]
        if self._same_targets(now):
            lost = [field for field in lost if field not in BY_TARGETS]
        changed = {field: (self.target[field], now.fields.get(field)) for field in lost}
        values, left_out = self._byteless(now.values)
        return Written(values, now.plan, changed, left_out, self.off)

    def _of_model(self) -> Values:
        """The keys that name the model. A tool with builders of its own has a row per model."""
        key = next(key for key, row in self.tool.rows.items() if row.get("to") == "model")
        repo = repository(self.job)
        if (builders := self.tool.builders) is None:
            return {key: repo}
        row = builders.get(self.job.architecture.name)
        if row is None:
            raise RefusedError(
                f"model: {self.tool.called} has no builder for {self.job.architecture.name}; accepted: {', '.join(builders)}"
            )
        folder = f"/tmp/{repo.rpartition('/')[2]}"
        component, pattern = self.tool.write["builder"], row["builder"]
        self.tries = [
            {component: pattern.replace("*", prefix), **beside}
            for prefix, beside in self.tool.write["prefixes"].items()
            if prefix not in row.get("without", ())
        ]
        filled = {name: value.replace("{folder}", folder) if isinstance(value, str) else value for name, value in row.items()}
        filled = {name: value for name, value in filled.items() if name not in ("builder", "without")}
        return {**self.tries[0], key: folder, **filled}

    def _try(self, values: Values) -> _Trial:
        """What the reader makes of values."""
        document = document_of(values, self.tool, comments=self._launch_comment(values))
        reading = read_all(document, self.tool, file=self.tool.tool)
        plan = planned(reading)
        if plan.options.get(EVALUATED) == self.target.get(EVALUATED):  # the estimate of the job says whether it is counted
            plan = replace(plan, unsupported={key: row for key, row in plan.unsupported.items() if row.option != EVALUATED})
        same = repr((plan.model, sorted(plan.options.items())))  # many keys only state what was there
        if same in self.fields:
            return _Trial(values, reading, plan, self.fields[same], None)
        try:
            self.fields[same] = fields_of(prepare(plan.model, **plan.options))
            return _Trial(values, reading, plan, self.fields[same], None)
        except PeftplanError as error:
            method = methods.METHODS.get(str(plan.options.get("method")))
            trained = {} if method is None else {"method": method.peft_type or method.name}
            of_model = {name: self.target[name] for name in ("model", "task_type")}
            return _Trial(values, reading, plan, {**of_model, **plan.options, **trained}, error)

    def _launch_comment(self, values: Values) -> str:
        distributed = self.job.distributed
        if distributed is None or any(self.tool.rows.get(key, {}).get("launch") in ("gpus", "processes") for key in values):
            return ""
        return f"nproc_per_node={distributed.gpus} nnodes={distributed.nodes}"

    def _launched(self, now: _Trial) -> _Trial:
        """The keys of the strategy: those first that say all of it, else those that say which it is."""
        if self.job.distributed is None:
            return now
        of_strategy = [name for name in self.target if name in ROLES]
        best, lacking = now, len(of_strategy) + 1
        for keys in launch_keys(self.job.distributed, self.tool):
            trial = self._try({**now.values, **keys})
            options = {**trial.plan.options, **trial.fields}
            missing = sum(options.get(name) != self.target[name] for name in of_strategy)
            if missing < lacking and not trial.plan.unsupported.keys() & ({*keys} | {key.partition(".")[0] for key in keys}):
                best, lacking = trial, missing
            if not lacking:
                break
        return best

    def _with(self, field: str, now: _Trial) -> _Trial:
        """The values with a field said, if any of its candidates says it."""
        there = now.has(field, self.target)
        if there and field not in STATED:
            return now
        before = self.order if there else self.order[: self.order.index(field)]
        earlier = [name for name in before if now.has(name, self.target)]
        for keys in self._candidates(field, now.reading, there=there):
            if there and all(now.values.get(key) == value for key, value in keys.items()):
                return now
            trial = self._try({key: value for key, value in {**now.values, **keys}.items() if value is not None})
            keeps_earlier = all(trial.has(name, self.target) for name in earlier)
            if trial.has(field, self.target) and keeps_earlier and not self._made_unsupported(keys, trial, now):
                return trial
        return now

    @staticmethod
    def _made_unsupported(keys: Values, trial: _Trial, now: _Trial) -> bool:
        return any(key in keys for key in trial.plan.unsupported.keys() - now.plan.unsupported.keys())

    def _candidates(self, field: str, reading: Reading, *, there: bool) -> Iterator[Values]:
        """Values that set a field to its value; of one that is not there, those that the data file lists come first."""
        yield from () if there else self.tries
        for value in spellings(self.job, field, self.target[field]):
            yield from candidates(self.tool, field, value, reading)

    def _without_unsupported(self, now: _Trial) -> _Trial:
        """The values with switches off that the tool turns on by itself, and that no option says."""
        for key in now.plan.unsupported:
            for rule in self.tool.rules:
                if rule.get("unsupported", {}).get("key") != key:
                    continue
                for switch, accepted in rule.get("when", {}).items():
                    if switch in now.values or accepted != [None]:
                        continue
                    trial = self._try({**now.values, switch: False})
                    keeps_all = all(trial.has(name, self.target) for name in self.order if now.has(name, self.target))
                    if keeps_all and key not in trial.plan.unsupported:
                        self.off[switch] = now.plan.unsupported[key].why
                        now = trial
                        break
        return now

    def _beside(self, reading: Reading) -> Values:
        """Values that the tool needs beside others."""
        keys: Values = {}
        for row in self.tool.write.get("beside", ()):
            if all(reading.effective.holds(key, wanted) for key, wanted in row["when"].items()):
                keys |= {key: value for key, value in row["keys"].items() if key not in reading.values}
        return keys

    def _same_targets(self, now: _Trial) -> bool:
        return now.has("target_modules", self.target)

    def _check(self, now: _Trial) -> None:
        """Raise RefusedError for what the tool has no setting for or cannot run."""
        for field in self.order:
            if (
                field in self.required
                and not now.has(field, self.target)
                and not (field in BY_TARGETS and self._same_targets(now))
            ):
                raise self._refused(field, now)
        if now.plan.unsupported:
            key, row = next(iter(now.plan.unsupported.items()))
            option = row.option or key
            of_key = "" if key == option else f" ({key})"
            raise RefusedError(f"{option}: {self.tool.called} runs it otherwise than counted here: {row.why}{of_key}")
        if now.error is not None:
            raise RefusedError(f"{self.tool.called}: {now.error}")

    def _refused(self, field: str, now: _Trial) -> RefusedError:
        if field == EVALUATED:
            return RefusedError(f"{field}: an evaluation is not written for {self.tool.called}; leave it out")
        value = self.job.method_name if field == "method" else self.target[field]
        if field in BY_TARGETS and self.job.config is not None:
            choosing = {name: getattr(self.job.config, name, None) for name in reversed(BY_TARGETS)}
            field, value = next(((name, each) for name, each in choosing.items() if each), (field, ALL_LINEAR))
        theirs = (now.plan.options if field == "target_modules" else now.fields).get(field)
        if self.job.method is not None and field in self.job.method.defaults.keys() - self.stated:
            field, value, theirs = "method", self.job.method_name, None  # the name implies it
        if field == "by_torchao" and self.job.quant is not None:
            field, name = "quant", self.job.quant.name
            by_torchao, by_bitsandbytes = f"{name} of torchao", f"{name} of bitsandbytes"
            value, theirs = (by_torchao, by_bitsandbytes) if value else (by_bitsandbytes, by_torchao)
        if field == "kernels":
            value, theirs = (packages_of(each) if isinstance(each, (tuple, list)) else each for each in (value or (), theirs))
        of_modules = field in BY_TARGETS and not isinstance(theirs, str)
        runs = "" if of_modules or theirs is None or theirs == value else f"; accepted: {theirs}"
        if field == "method":
            names = [name for name in self._methods() if name != value and methods.METHODS[name].module != "partial"]
            runs = f"; accepted: {', '.join(names)}"
        return RefusedError(f"{field}: a config of {self.tool.called} {self.tool.version} has no setting for {value!r}{runs}")

    def _methods(self) -> list[str]:
        """The methods that the tool's keys name."""
        sets = [sets for row in self.tool.rows.values() for sets in row.get("sets", {}).values() if sets]
        method_words = [
            str(each["method"]) for each in [*sets, *(rule.get("set", {}) for rule in self.tool.rules)] if "method" in each
        ]
        return list(dict.fromkeys(method_words))

    def _byteless(self, values: Values) -> tuple[Values, tuple[str, ...]]:
        """The values with options that move no byte, and the names of those that the tool has no key for."""
        config = {} if self.job.config is None else self.job.config.model_dump()
        keys = self.tool.write.get("as", {})
        scaling = {keys[name]: _whole(config[name]) for name in keys if config.get(name) not in (None, BYTELESS[name])}
        scaling |= {
            keys[name]: BYTELESS[name]
            for name in self.tool.write.get("needs", ())
            if name in config and keys[name] not in scaling
        }
        left = [name for name, default in BYTELESS.items() if name in config and name not in keys]
        left = [name for name in left if config[name] not in (None, BYTELESS[name])]
        known = {*self.target, *config, *BYTELESS, *Setup.model_fields, *Distributed.model_fields, *methods.BOOKKEEPING, *FILES}
        options = {**self.job.request.options, **self.job.adapter}
        left += sorted(name for name in self.stated - known if name in options and options[name] not in methods.UNSET)
        return {**values, **scaling}, tuple(left)


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value
