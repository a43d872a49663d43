"""The PEFT methods: a literal registry, and the three ways into it (options, a peft adapter config, an architecture).

Importing this package loads none of the methods; each has its own module, which is imported on first use.
"""

import sys
from collections import deque
from collections.abc import Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from peftplan.errors import MissingError, UnknownNameError, UnknownOptionError

if TYPE_CHECKING:
    from peftplan.arch.modules import Architecture
    from peftplan.methods.adaptation import Adaptation, MethodConfig


class Method(NamedTuple):
    """One entry of the registry: where the method is implemented, and what its name presets.

    `defaults` are options that the name implies (`dora` is LoRA with `use_dora`); `quant` is the storage of the frozen base that
    the name implies. `peft_type` is None for a method that peft does not have.
    """

    name: str
    peft_type: str | None
    module: str
    config: str
    function: str
    summary: str
    source: str
    defaults: Mapping[str, object] = {}
    quant: str | None = None


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("full", None, "full", "FullConfig", "full", "every parameter of the base trains", "plain fine-tuning"),
        Method("lora", "LORA", "lora", "LoraConfig", "lora", "low-rank update B·A per layer", "Hu et al. 2021, arXiv 2106.09685"),
        Method(
            "qlora", "LORA", "lora", "LoraConfig", "lora", "LoRA on a 4-bit NF4 base", "Dettmers et al. 2023, arXiv 2305.14314",
            quant="nf4",
        ),
        Method(
            "dora", "LORA", "lora", "LoraConfig", "lora", "LoRA with a trained magnitude per output",
            "Liu et al. 2024, arXiv 2402.09353", {"use_dora": True},
        ),
        Method(
            "qdora", "LORA", "lora", "LoraConfig", "lora", "DoRA on a 4-bit NF4 base", "Liu et al. 2024, arXiv 2402.09353",
            {"use_dora": True}, "nf4",
        ),
        Method(
            "rslora", "LORA", "lora", "LoraConfig", "lora", "LoRA scaled by alpha / sqrt(r)",
            "Kalajdzievski 2023, arXiv 2312.03732", {"use_rslora": True, "target_modules": "peft-default"},
        ),
        Method(
            "lora+", "LORA", "lora", "LoraConfig", "lora", "LoRA with a higher learning rate for B; the tensors of LoRA",
            "Hayou et al. 2024, arXiv 2402.12354", {"target_modules": "peft-default"},
        ),
        Method(
            "lora-fa", "LORA", "lora", "LoraConfig", "lora", "LoRA whose A stays frozen", "Zhang et al. 2023, arXiv 2308.03303",
            {"freeze_a": True, "target_modules": "peft-default"},
        ),
        Method(
            "adalora", "ADALORA", "adalora", "AdaLoraConfig", "adalora", "SVD-shaped LoRA whose ranks shrink while training",
            "Zhang et al. 2023, arXiv 2303.10512",
        ),
        Method(
            "loha", "LOHA", "loha", "LoHaConfig", "loha", "Hadamard product of two low-rank updates",
            "Hyeon-Woo et al. 2022 (FedPara), arXiv 2108.06098",
        ),
        Method(
            "lokr", "LOKR", "lokr", "LoKrConfig", "lokr", "Kronecker product of two small matrices",
            "Yeh et al. 2023 (LyCORIS), arXiv 2309.14859",
        ),
        Method(
            "vera", "VERA", "vera", "VeraConfig", "vera", "two vectors per layer around shared frozen random matrices",
            "Kopiczko et al. 2023, arXiv 2310.11454",
        ),
        Method("ia3", "IA3", "ia3", "IA3Config", "ia3", "one scaling vector per layer", "Liu et al. 2022, arXiv 2205.05638"),
        Method(
            "oft", "OFT", "oft", "OFTConfig", "oft", "block-diagonal orthogonal rotation of the input",
            "Qiu et al. 2023, arXiv 2306.07280",
        ),
        Method(
            "boft", "BOFT", "boft", "BOFTConfig", "boft", "butterfly product of orthogonal blocks and a scale per output",
            "Liu et al. 2023, arXiv 2311.06243",
        ),
        Method(
            "prefix-tuning", "PREFIX_TUNING", "virtual_tokens", "PrefixTuningConfig", "prefix_tuning",
            "trained keys and values of virtual tokens in every layer", "Li and Liang 2021, arXiv 2101.00190",
        ),
        Method(
            "prompt-tuning", "PROMPT_TUNING", "virtual_tokens", "PromptTuningConfig", "prompt_tuning",
            "trained embeddings of virtual tokens", "Lester et al. 2021, arXiv 2104.08691",
        ),
        Method(
            "p-tuning", "P_TUNING", "virtual_tokens", "PromptEncoderConfig", "p_tuning",
            "embeddings of virtual tokens behind a trained encoder", "Liu et al. 2021, arXiv 2103.10385",
        ),
        Method(
            "ln-tuning", "LN_TUNING", "ln_tuning", "LNTuningConfig", "ln_tuning", "trained copies of the normalisation layers",
            "Zhao et al. 2023, arXiv 2312.11420",
        ),
        Method(
            "bitfit", None, "bitfit", "BitFitConfig", "bitfit", "every bias of the base trains",
            "Ben-Zaken et al. 2021, arXiv 2106.10199",
        ),
        Method(
            "partial", None, "partial", "PartialConfig", "partial", "only the named parameters of the base train",
            "LLaMA-Factory's freeze; Spectrum, Hartford et al. 2024, arXiv 2406.06623",
        ),
        Method(
            "llama-pro", None, "partial", "LlamaProConfig", "llama_pro", "copies of layers are added, which alone train",
            "Wu et al. 2024, arXiv 2401.02415",
        ),
        Method(
            "lisa", None, "partial", "LisaConfig", "lisa", "a few layers of the base train at a time, in turns",
            "Pan et al. 2024, arXiv 2403.17919",
        ),
        Method(
            "fourierft", "FOURIERFT", "fourierft", "FourierFTConfig", "fourierft", "trained Fourier coefficients of the update",
            "Gao et al. 2024, arXiv 2405.03003",
        ),
        Method(
            "houlsby", None, "bottleneck", "HoulsbyConfig", "houlsby", "bottleneck adapters after attention and after the MLP",
            "Houlsby et al. 2019, arXiv 1902.00751",
        ),
        Method(
            "pfeiffer", None, "bottleneck", "PfeifferConfig", "pfeiffer", "one bottleneck adapter per layer, after the MLP",
            "Pfeiffer et al. 2020, arXiv 2005.00247",
        ),
    )
}  # fmt: skip
"""Every method with closed formulas, by the name that `--method` takes."""

OTHER_PEFT_TYPES: tuple[str, ...] = (
    "ADAMSS", "ADAPTION_PROMPT", "BEFT", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA", "FROD", "GLORA", "GRALORA", "HIRA",
    "HRA", "LILY", "MISS", "MULTITASK_PROMPT_TUNING", "OSF", "PEANUT", "POLY", "PSOFT", "PVERA", "RANDLORA", "ROAD",
    "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "WAVEFT", "XLORA",
)  # fmt: skip
"""peft's other types: no formulas here, counted by running the installed peft on meta tensors (extra `trace`)."""

BOOKKEEPING = frozenset(
    {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
)
"""Fields of every peft config that describe the checkpoint (`PeftConfigMixin`, `PeftConfig`, peft `config.py`)."""

UNSET: tuple[object, ...] = (None, False, {}, [], ())
"""Values that leave a feature off. A field that is unknown here may have one of them."""


def method_named(name: object, field: str = "method") -> Method:
    """The method of that name. Case is ignored, and `_` equals `-`."""
    key = name.strip().lower().replace("_", "-") if isinstance(name, str) else None
    if key is None or key not in METHODS:
        others = (other.lower().replace("_", "-") for other in OTHER_PEFT_TYPES)
        raise UnknownNameError(field, name, (*METHODS, *others))
    return METHODS[key]


def other_peft_type(name: object) -> str | None:
    """The peft type of a method without formulas here, which the installed peft then counts; None for other names."""
    key = name.strip().upper().replace("-", "_") if isinstance(name, str) else ""
    return key if key in OTHER_PEFT_TYPES else None


def config_class(method: Method) -> "type[MethodConfig]":
    """The configuration class of a method."""
    cls: type[MethodConfig] = getattr(import_module(f"peftplan.methods.{method.module}"), method.config)
    return cls


def configure(name: str, options: Mapping[str, object], *, beside: Iterable[str] = ()) -> "tuple[Method, MethodConfig]":
    """The method of that name with its checked options: peft's field names, including those without effect on a tensor.

    `beside`: names of other options, of which a near one is suggested too unless another method has the option as it is spelled.
    Raises UnknownNameError for an unknown method or option, InputError for a value that is not accepted.
    """
    method = method_named(name)
    cls = config_class(method)
    for option in options:
        if option not in cls.model_fields and option not in cls.no_effect:
            elsewhere = any(option in config_class(other).model_fields for other in METHODS.values())
            raise UnknownOptionError(option, method.name, cls.model_fields, beside=() if elsewhere else beside)
    effective = {key: value for key, value in options.items() if key not in cls.no_effect}
    return method, validated(cls, {**method.defaults, **effective})


def from_peft_config(raw: Mapping[str, object]) -> "tuple[Method, MethodConfig]":
    """The method and configuration of a peft `adapter_config.json`.

    Fields that describe the checkpoint or change no tensor are left out. Raises NeedsPeftError for a peft type, or a field that
    is set, which only peft itself can count; InputError for values that are not accepted.
    """
    from peftplan.methods.adaptation import NeedsPeftError
    from peftplan.methods.targets import OURS

    if raw.get("peft_type") is None:
        raise MissingError("peft_config: peft_type", "every adapter_config.json states it")
    peft_type = str(getattr(raw["peft_type"], "value", raw["peft_type"]))
    names = [m.name for m in METHODS.values() if m.peft_type == peft_type]
    if not names:
        raise NeedsPeftError(f"peft_type {peft_type}")
    method = METHODS[names[0]]
    if peft_type == "LORA":
        method = METHODS["dora" if raw.get("use_dora") else "rslora" if raw.get("use_rslora") else "lora"]
    cls = config_class(method)
    fields = {key: value for key, value in raw.items() if key not in BOOKKEEPING and key not in cls.no_effect}
    unknown = sorted(key for key, value in fields.items() if key not in cls.model_fields and value not in UNSET)
    if unknown:
        raise NeedsPeftError(f"{peft_type} with {', '.join(unknown)}")
    known = {key: value for key, value in fields.items() if key in cls.model_fields and value is not None}
    if "target_modules" in cls.model_fields:
        targets = known.setdefault("target_modules", "peft-default")
        if raw.get("target_modules") is not None and isinstance(targets, str) and targets in OURS:
            known["target_modules"] = [targets]
    return method, validated(cls, known)


def adapt(arch: "Architecture", method: Method, config: "MethodConfig", *, by_peft: bool = True) -> "Adaptation":
    """What the method adds to the architecture, and what it trains. `by_peft`: False for LoRA of another library, which adapts
    Mamba's modules too."""
    for of_arch, *of, adaptation in _ADAPTED:
        if of_arch is arch and of == [method, config, by_peft, config.model_fields_set]:
            return adaptation
    adaptation = _adapt(arch, method, config, by_peft=by_peft)
    _ADAPTED.appendleft((arch, method, config, by_peft, config.model_fields_set, adaptation))
    return adaptation


_ADAPTED: "deque[tuple[Architecture, Method, MethodConfig, bool, set[str], Adaptation]]" = deque(maxlen=4)
"""What was adapted last: a job at many sizes is adapted once."""


def _adapt(arch: "Architecture", method: Method, config: "MethodConfig", *, by_peft: bool) -> "Adaptation":
    function = getattr(import_module(f"peftplan.methods.{method.module}"), method.function)
    adaptation: Adaptation = function(arch, config) if by_peft else function(arch, config, by_peft=False)
    if method.name != "lora+":
        return adaptation
    from peftplan.methods.lora import in_groups

    return in_groups(adaptation)


def validated(cls: "type[MethodConfig]", values: Mapping[str, object]) -> "MethodConfig":
    """A checked configuration. Raises InputError."""
    from pydantic import ValidationError

    from peftplan.validation import first_error, no_switches

    no_switches(cls, values)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise first_error(error, nested=False, missing="peft has no default for it") from None


class Package(ModuleType):
    """Makes this package callable: `peftplan.methods()` is the public list of methods, and has the package's name."""

    def __call__(self) -> object:
        """The methods as a list of records (`planning.listings.methods`)."""
        return import_module("peftplan").list_methods()


sys.modules[__name__].__class__ = Package
