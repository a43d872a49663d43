"""Write data/peft_targets.json: the modules that the installed peft targets where `target_modules` is not given.

Run after a new peft release: `python tools/peft_targets.py`. Source: peft/utils/constants.py, every
`TRANSFORMERS_MODELS_TO_<METHOD>_TARGET_MODULES_MAPPING` and `…_FEEDFORWARD_MODULES_MAPPING`. A value is a list of
module names, matched as whole suffixes, or one regular expression. Left out: adaption prompt and
shadow, whose defaults lie in their own modules and name whole attention modules or layers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
from peft.utils import constants

OUTPUT = Path(__file__).resolve().parent.parent / "data" / "peft_targets.json"
MAPPING = re.compile(r"TRANSFORMERS_MODELS_TO_(?P<method>\w+)_(?P<kind>TARGET|FEEDFORWARD)_MODULES_MAPPING")
Mappings = dict[str, dict[str, list[str] | str]]


def mappings(kind: str) -> Mappings:
    """Every mapping of `kind` (TARGET or FEEDFORWARD), by peft type, then by model type."""
    constant = {match["method"]: name for name in dir(constants) if (match := MAPPING.fullmatch(name)) and match["kind"] == kind}
    return {_peft_type(method): dict(getattr(constants, name)) for method, name in sorted(constant.items())}


def _peft_type(method: str) -> str:
    """`LNTUNING` in a constant's name is `LN_TUNING` among peft's types; all others are spelled alike."""
    return next(peft_type.value for peft_type in peft.PeftType if peft_type.value.replace("_", "") == method)


def as_text() -> str:
    """The file: one model type a line, so that a new release shows as a readable difference."""
    about = "peft's default targets where target_modules is null, from peft/utils/constants.py; written by tools/peft_targets.py"
    head = [f'"about": {json.dumps(about)}', f'"peft": {json.dumps(peft.__version__)}']
    body = [
        f'"{key}": {_block(mappings(kind))}'
        for key, kind in (("target_modules", "TARGET"), ("feedforward_modules", "FEEDFORWARD"))
    ]
    return "{" + ",\n".join(head + body) + "}\n"


def _block(mapping: Mappings) -> str:
    methods = []
    for peft_type, by_model_type in mapping.items():
        rows = ",\n".join(f"  {json.dumps(model_type)}: {json.dumps(names)}" for model_type, names in by_model_type.items())
        methods.append(f" {json.dumps(peft_type)}: {{\n{rows}\n }}")
    return "{\n" + ",\n".join(methods) + "\n}"


if __name__ == "__main__":
    OUTPUT.write_text(as_text(), encoding="utf-8")
