"""The formats of `--quant`: the options of each, its defaults, and whether such a model can be fine-tuned."""

from typing import NamedTuple

from peftplan.dtypes import MODEL_DTYPES, parse_dtype
from peftplan.errors import InputError, OptionError, RefusedError, UnknownNameError


class Format(NamedTuple):
    """What one storage format accepts. The first entry of a tuple is the default; an empty tuple means no such option.

    `untrainable` says why adapters cannot be trained on top (None: they can). `compute_capability` is the oldest GPU on
    which transformers keeps the format: below it the weights are dequantized while loading. `kernels` names those whose
    temporaries no engine models (None: every engine does), but for what is `known` by formula. `raises` says why
    transformers does not load the format today.
    """

    library: str
    bits: tuple[int, ...]
    blocksizes: tuple[int, ...] = ()
    group_sizes: tuple[int, ...] = ()
    double_quant: bool = False
    compute_dtypes: tuple[str, ...] = ()
    quant_storages: tuple[str, ...] = ()
    skip_modules: bool = True
    untrainable: str | None = None
    compute_capability: tuple[int, int] | None = None
    kernels: str | None = None
    known: str = ""
    raises: str | None = None


OF_GPTQMODEL = ", but for plain LoRA in a dense model on one GPU or under DDP by formula, above 128 tokens in awq"
_BNB_4BIT = Format(
    library="bitsandbytes",
    bits=(4,),
    blocksizes=(64, 32, 128, 256, 512, 1024, 2048, 4096),
    double_quant=True,
    compute_dtypes=("fp32", "bf16", "fp16"),
    quant_storages=("uint8", "int8", "bf16", "fp16", "fp32", "fp64"),
)

FORMATS: dict[str, Format] = {
    "nf4": _BNB_4BIT,
    "fp4": _BNB_4BIT,
    "int8": Format(library="bitsandbytes", bits=(8,)),
    "fp8": Format(
        library="transformers",
        bits=(8,),
        blocksizes=(128,),
        compute_capability=(8, 9),
        kernels="finegrained-fp8 and DeepGEMM (from the Hub)",
    ),
    "mxfp4": Format(
        library="transformers",
        bits=(4,),
        blocksizes=(32,),
        untrainable="transformers does not train on mxfp4 experts (Mxfp4HfQuantizer.is_trainable is False); "
        "they are fine-tuned dequantized: quant none, which is Mxfp4Config(dequantize=True)",
        compute_capability=(7, 5),
    ),
    "gptq": Format(
        library="gptqmodel",
        bits=(4, 2, 3, 8),
        group_sizes=(128, -1, 16, 32, 64, 256, 512, 1024),
        skip_modules=False,
        kernels="gptqmodel",
        known=OF_GPTQMODEL,
    ),
    "awq": Format(library="gptqmodel", bits=(4,), group_sizes=(128, -1, 32, 64), kernels="gptqmodel", known=OF_GPTQMODEL),
    "hqq": Format(
        library="hqq",
        bits=(4, 8, 3, 2, 1),
        group_sizes=(64, 8, 16, 32, 128, 256, 512, 1024),
        compute_dtypes=MODEL_DTYPES,
        skip_modules=False,
        kernels="hqq",
        raises="transformers 5 raises NotImplementedError as it quantizes with hqq (quantizers/base.py, `get_quantize_ops`)",
    ),
}
"""Every word of `--quant` besides `none`.

Sources: `quantize_4bit` and `quantize_blockwise` in bitsandbytes/functional.py 0.50.2 (block sizes),
`BitsAndBytesConfig`, `FineGrainedFP8Config`, `Mxfp4Config`, `GPTQConfig`, `AwqConfig`, `HqqConfig` in
transformers/utils/quantization_config.py 5.24.0, `TritonV2Linear` and `AwqGEMMTritonLinear` in gptqmodel (the
CUDA kernels that `auto_trainable` picks). transformers has no option for the block size of nf4 and fp4: it is 64
unless bitsandbytes is called directly.
"""


TORCHAO_NF4 = "nf4 of torchao"
"""A layout that no word of `--quant` names: torchtune's recipes store nf4 so."""
FOUR_BIT = ("nf4", "fp4")
"""Layouts of bitsandbytes' 4-bit weights."""


class QuantConfig(NamedTuple):
    """How the linear layers of a frozen base model are stored; made by `parse_quant`.

    `blocksize` (0: none) is bitsandbytes' (elements per absmax), the side of fp8's square tiles, or mxfp4's 32;
    `group_size` (0: none) that of gptq, awq and hqq, -1 for a whole row. `compute_dtype` decides no stored byte of
    nf4 and fp4, only their dequantized temporaries, but it is the dtype of hqq's scales and zeros (None there: the
    model's dtype). `quant_storage` changes the dtype of packed nf4 and fp4, not their bytes. `skip_modules` is None
    for the library's own list. `pre_quantized` is a checkpoint that is already stored so: it matters for fp8 alone.
    """

    name: str
    bits: int
    double_quant: bool = False
    blocksize: int = 0
    group_size: int = 0
    compute_dtype: str | None = None
    quant_storage: str = "uint8"
    skip_modules: tuple[str, ...] | None = None
    pre_quantized: bool = False
    experts: bool = False
    """Whether bitsandbytes stores stacks of experts too, each as one weight (`replace_parameter_4bit`)."""
    by_torchao: bool = False
    """Whether torchao stores it, and not the library of the format."""

    @property
    def layout(self) -> str:
        """The name of how its weights lie and are used: the format's, unless torchao stores them."""
        return TORCHAO_NF4 if self.by_torchao else self.name

    def options(self) -> dict[str, object]:
        """The options of this format by their names on the command line. A block size appears only if it was set."""
        known = FORMATS[self.name]
        options: dict[str, object] = {"double_quant": self.double_quant} if known.double_quant else {}
        options |= {"compute_dtype": self.compute_dtype} if self.compute_dtype else {}
        options |= {"quant_bits": self.bits} if len(known.bits) > 1 else {}
        return options | ({"quant_group_size": self.group_size} if known.group_sizes else {})


MEANT = {
    **dict.fromkeys(("4bit", "4-bit", "int4", "bnb-4bit"), "nf4"),
    **dict.fromkeys(("8bit", "8-bit", "bnb-8bit"), "int8"),
    **dict.fromkeys(("16bit", "bf16", "fp16", "no", "false"), "none"),
}
"""Words that people use → the format, or none."""


def parse_quant(
    name: str,
    *,
    double_quant: bool | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    blocksize: int | None = None,
    compute_dtype: object = None,
    quant_storage: object = None,
    skip_modules: tuple[str, ...] | None = None,
    experts: bool = False,
    pre_quantized: bool = False,
) -> QuantConfig | None:
    """The storage of `--quant name`, or None for `none`. An option that is None gets the library's default.

    Raises UnknownNameError for an unknown format, InputError for an option that the format does not have.
    """
    if name == "none":
        fields: dict[str, object] = {"double_quant": double_quant or None, "quant_bits": bits, "quant_group_size": group_size}
        fields |= {"quant_experts": experts or None}
        fields |= {"quant_blocksize": blocksize, "compute_dtype": compute_dtype, "quant_skip_modules": skip_modules}
        without = next((field for field, value in fields.items() if value is not None), None)
        if without is not None:
            raise OptionError(without, fields[without], "nothing is quantized; add --quant nf4, for example")
        return None
    if name not in FORMATS:
        raise UnknownNameError("quant", name, ["none", *FORMATS], meant=MEANT)
    known = FORMATS[name]
    if double_quant and not known.double_quant:
        raise OptionError("double_quant", True, f"{name} has no double quantization; nf4 and fp4 do")
    if skip_modules is not None and not known.skip_modules:
        raise InputError("quant_skip_modules", skip_modules, f"{name} has no list of modules to skip")
    if experts and known.library != "bitsandbytes":
        raise InputError("quant_experts", True, "bitsandbytes alone stores stacks of experts, as nf4, fp4 or int8")
    return QuantConfig(
        name=name,
        bits=_pick("quant_bits", bits, known.bits, name=name),
        double_quant=bool(double_quant),
        blocksize=_pick("quant_blocksize", blocksize, known.blocksizes, name=name),
        group_size=_pick("quant_group_size", group_size, known.group_sizes, name=name),
        compute_dtype=_compute_dtype(compute_dtype, known.compute_dtypes, name=name),
        quant_storage=_quant_storage(quant_storage, known.quant_storages, name=name),
        skip_modules=skip_modules,
        experts=experts,
        pre_quantized=pre_quantized or known.library == "gptqmodel",
    )


def check_trainable(quant: QuantConfig | None) -> None:
    """Raise RefusedError if the libraries refuse to train adapters on a base model in this format."""
    reason = FORMATS[quant.name].untrainable if quant else None
    if reason:
        raise RefusedError(reason)


def _pick(field: str, value: int | None, accepted: tuple[int, ...], *, name: str) -> int:
    if value is None:
        return accepted[0] if accepted else 0
    if value not in accepted:
        listed = ", ".join(map(str, sorted(accepted)))
        raise InputError(field, value, f"{name} accepts {listed}" if accepted else f"{name} has no such option")
    return value


def _compute_dtype(value: object, accepted: tuple[str, ...], *, name: str) -> str | None:
    """The default: the model's dtype for hqq, fp32 for bitsandbytes; the other formats have none to choose."""
    if value is None:
        return None if name == "hqq" or not accepted else accepted[0]
    if not accepted:
        raise InputError("compute_dtype", value, f"{name} has no compute dtype; nf4, fp4 and hqq do")
    return parse_dtype(value, field="compute_dtype", accepted=accepted)


def _quant_storage(value: object, accepted: tuple[str, ...], *, name: str) -> str:
    if value is None:
        return "uint8"
    if not accepted:
        raise InputError("quant_storage", value, f"{name} has no storage dtype to choose; nf4 and fp4 do")
    return parse_dtype(value, field="quant_storage", accepted=accepted)


def without_peak(quant: QuantConfig) -> str | None:
    """Why no engine states a peak for this format, and what to do instead; None if they do."""
    kernels = FORMATS[quant.name].kernels
    if kernels is None:
        return None
    raises = FORMATS[quant.name].raises
    why = raises or f"no engine models what the kernels of {kernels} allocate{FORMATS[quant.name].known}"
    instead = "plan with nf4 or int8" if raises else "measure one step on a GPU, or plan with nf4 or int8"
    return f"a step with {quant.name} layers: {why}. Counts and stored bytes are exact; for a peak, {instead}"
