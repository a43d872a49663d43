"""`estimate`: from a model, a method and a setup to an `Estimate`. Composition only; the arithmetic lives down the flow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from peftplan.errors import InputError, OptionError, RefusedError, UnknownNameError
from peftplan.job.inventory import inventory
from peftplan.job.prepare import check_rank_allocator, prepare, prepared
from peftplan.job.script import EXAMPLES, NO_SCRIPT, Script
from peftplan.job.setup import ENGINES, SEARCHES, AdviceSearch, Engine
from peftplan.job.words import named_as_typed
from peftplan.planning.question import Question, analytic, traced
from peftplan.planning.verdicts import counted_cards, find_cards
from peftplan.results.estimate import Estimate

if TYPE_CHECKING:
    from os import PathLike
    from typing import TypeAlias

    from typing_extensions import Unpack

    from peftplan.job.configs.plan import ConfigPlan
    from peftplan.job.configs.with_file import WithFile
    from peftplan.job.job import Job
    from peftplan.job.options import Options
    from peftplan.results.config_documents import ConfigDocument

    ConfigFiles: TypeAlias = str | PathLike[str] | Iterable[str | PathLike[str]] | ConfigPlan
    """Files of another tool, or what was read from them."""


def estimate(
    model: object = None,
    *,
    config: ConfigFiles | None = None,
    tool: str | None = None,
    method: str | None = None,
    peft_config: object = None,
    quantization_config: object = None,
    training_args: object = None,
    gpu: str | Iterable[str] | None = None,
    context: float | None = None,
    engine: Engine = "analytic",
    script: Script = NO_SCRIPT,
    strict: bool = False,
    advice: AdviceSearch = "best",
    record: bool = False,
    progress: Callable[[str, float], None] | None = None,
    **options: Unpack[Options],
) -> Estimate:
    """What fine-tuning `model` needs.

    - `model`: a built-in name, a Hub id, a path to a config.json or its folder, a config dict, a transformers
      `PretrainedConfig`, or a loaded model, with or without peft's wrapper, whose dtypes and `requires_grad` are read too.
      None: the base model that `peft_config` names, or the model of `config`.
    - `config`: the config file of another training tool (axolotl, LLaMA-Factory, TRL, torchtune, Unsloth, …), a list of files
      with launch files last, or a result of `read_config`. `tool`: the name of the tool, if the file does not show it.
    - `method`: a name from `peftplan.methods.METHODS` (default: `lora`). `peft_config`: an adapter_config dict or any peft
      `PeftConfig`, instead of `method`.
    - `quantization_config`: a transformers `BitsAndBytesConfig`. `training_args`: a transformers `TrainingArguments` or one of
      TRL's configs.
    - `gpu`: names of cards, sizes such as 24GiB, or several of one card, such as `8xh100-80gb`. `context`: the CUDA context of
      the verdicts, in MiB (None: as measured on the card, else assumed).
    - `engine`: `analytic` (formulas) or `trace` (the real code on fake tensors).
    - `script`: facts about a hand-written program. `strict`: turn warnings into errors, such as a name in `target_modules` that
      matches no module. `advice`: `best` looks for changes that make the job fit the nearest card, `all` tries every combination.
    - `record` (trace only): keep the whole run as `peaks.recording`. `progress` (trace only): called with the current stage and
      the share (0 to 1) that is done.
    - `options`: those of the command line with `_` for `-` (`peftplan estimate --help`), such as `batch_size` (sequences per
      device and micro batch), `seq_len` (tokens), `dtype` (`bf16`), `optim` and `trainer`, and the method's own fields under
      peft's names (`r`, `target_modules`, …; `peftplan methods NAME`). Names of other tools, such as `lora_rank` or
      `load_in_4bit`, are accepted too. Options override the objects and the file.

    Raises InputError, UnknownNameError, RefusedError or MissingExtraError, each with a message of one line.
    """
    if engine not in ENGINES:
        raise UnknownNameError("engine", engine, ENGINES)
    if advice not in SEARCHES:
        raise UnknownNameError("advice", advice, SEARCHES)
    gpu, count = cards_and_number(gpu)
    with named_as_typed({"method": method, **options}) as our_options:
        our_options.update(number_of_gpus(count, our_options))
        config_document: ConfigDocument | None = None
        of_file: tuple[str, ...] = ()
        places: Mapping[str, str] = {}
        chosen: set[str] = set()
        if config is not None:
            chosen = {name for name, value in {**our_options, "model": model}.items() if value is not None}
            model, our_options, config_document, of_tool, of_file, places = _of_config(
                config, tool, model, our_options, objects=peft_config is not None, strict=strict
            )
            of_user = {package: release for package in EXAMPLES if (release := getattr(script, package)) is not None}
            script = script.model_copy(update={**of_tool, **of_user})
            peft_config = our_options.pop("peft_config", peft_config)
        try:
            job = prepare(
                model,
                peft_config=peft_config,
                quantization_config=quantization_config,
                training_args=training_args,
                script=script,
                strict=strict,
                **our_options,
            )
            document = config_document
            if document is None and job.request.training is not None:
                document = job.request.training.document
            if document is not None and options.get("kernels") is None:
                job, document = _with_formula(job, document)
            if document is not None and options.get("eval_batch_size") is None:
                job, document = _with_evaluation(job, document, counted=engine == "analytic")
            if document is not None:
                document = _with_dropout(job, document)
            if of_file:
                job = job._replace(warnings=(*of_file, *job.warnings))
            check_rank_allocator(job)
            counted = inventory(job)
        except InputError as error:
            if config_document is None or error.field.partition(".")[0] in chosen:
                raise
            raise _of_key(error, config_document, places) from None
    if config_document is None and document is not None and document["bound"] is None:
        document = None  # arguments of which each is counted
    question = Question(counted, tuple(find_cards(gpu, context=context)), advice, document)
    if engine == "trace":
        return traced(question, record=record, progress=progress)
    return analytic(question)


def _of_key(error: InputError, document: ConfigDocument, places: Mapping[str, str]) -> InputError:
    """The error under the name of the file, with its line, and of its key that sets the option."""
    option = error.field.partition(".")[0]
    rows = {key: row for key, row in document["read"].items() if option in row["option"].split(", ")}
    keys = sorted(rows, key=lambda key: (rows[key]["value"] != error.value, len(rows[key]["option"])))
    return (
        error.named(f"{places.get(keys[0], document['files'][0])}: {keys[0]}")
        if keys
        else error.named(f"{document['files'][0]}: {error.field}")
    )


def number_of_gpus(count: int | None, options: Mapping[str, object]) -> dict[str, int]:
    """The option for the number that stands before a card. Raises OptionError beside one."""
    if count is not None and options.get("gpus") is not None:
        raise OptionError("gpus", options["gpus"], f"the card says how many there are ({count}x…); accepted: one of the two")
    return {} if count is None else {"gpus": count}


def cards_and_number(gpu: str | Iterable[str] | None) -> tuple[str | Iterable[str] | None, int | None]:
    """The names of cards without how many there are of each, and how many. Raises RefusedError for several numbers."""
    groups = counted_cards(gpu)
    if len(groups) > 1:
        numbers = ", ".join(f"{count}x" if count else "one" for count, _ in groups)
        raise RefusedError(f"gpu: one estimate is for one number of GPUs (got {numbers}); run one estimate for each")
    return (gpu, None) if not groups or groups[0][0] is None else (groups[0][1], groups[0][0])


def _with_formula(job: Job, document: ConfigDocument) -> tuple[Job, ConfigDocument]:
    """The job of a file, without its kernels where they have no formula, and the `config` document, which then says so. The name
    that tells how the experts are built stays: it changes the count."""
    if not job.setup.kernels:
        return job, document
    from peftplan.analytic.kernel_checks import kernels_without_formula
    from peftplan.job.configs.with_file import effect_of, without_kernels
    from peftplan.job.kernels import kernels_of

    if (why := kernels_without_formula(job)) is None:
        return job, document
    effect = effect_of(job.setup.kernels)
    kept = tuple(name for name in job.setup.kernels if kernels_of((name,)).separate is not None) or None
    return prepared(job.request.changed(kernels=kept)), without_kernels(document, why, effect, kept=kept)


def _with_evaluation(job: Job, document: ConfigDocument, *, counted: bool) -> tuple[Job, ConfigDocument]:
    """The job of a file with its evaluation, whose keys are then supported; without it where its peak is not `counted`."""
    if job.setup.eval_batch_size is None:
        return job, document
    from peftplan.job.configs.with_file import with_evaluation, without_options
    from peftplan.job.evaluating import without_formula

    if counted and without_formula(job) is None:
        return job, with_evaluation(document)
    return prepared(job.request.changed(eval_batch_size=None)), without_options(document, "eval_batch_size")


def _with_dropout(job: Job, document: ConfigDocument) -> ConfigDocument:
    """The document where `disable_dropout` is supported if neither the model nor an adapter drops anything. Raises InputError for
    arguments that are an object if something drops."""
    from peftplan.job.configs.with_file import DISABLES_DROPOUT, with_dropout

    if not any(key.endswith(DISABLES_DROPOUT) for key in document["unsupported"]):
        return document
    from peftplan.arch.modules import NO_DROPOUT
    from peftplan.arch.readers import READERS

    fields = {} if job.config is None else job.config.model_dump()
    drops = job.config is None or any(value for name, value in fields.items() if name.endswith("dropout"))
    of_model = job.architecture.dropout
    if job.architecture.task_type == "CAUSAL_LM":
        of_model = of_model._replace(classifier=0.0)  # of another head
    if not drops and of_model == NO_DROPOUT and job.architecture.model_type in READERS:
        return with_dropout(document)
    if job.request.training is not None:
        from peftplan.job.ecosystem import check_dropout

        check_dropout(document)
    return document


def _of_config(
    config: ConfigFiles, tool: str | None, model: object, our_options: Mapping[str, object], *, objects: bool, strict: bool
) -> WithFile:
    """What a file asks together with the user's options."""
    from peftplan.job.configs.plan import ConfigPlan
    from peftplan.job.configs.read import read_beside
    from peftplan.job.configs.with_file import with_file

    plan = config if isinstance(config, ConfigPlan) else read_beside(config, our_options, tool=tool)
    return with_file(plan, model, our_options, objects=objects, strict=strict)
