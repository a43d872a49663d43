"""BitFit (Ben-Zaken et al. 2021, arXiv 2106.10199, §3): every bias of the base trains, and the head of the task.

peft has no BitFit. Counted are the parameters whose name ends with `bias`, biases of fused modules (`in_proj_bias`) included, and
all parameters of a classification head, which the paper trains too. Nothing is added.
"""

from __future__ import annotations

from peftplan.arch.modules import Architecture
from peftplan.errors import InputError
from peftplan.methods.adaptation import Adaptation, MethodConfig, trained_params
from peftplan.methods.heads import head_params


class BitFitConfig(MethodConfig):
    """BitFit has no options."""


def bitfit(arch: Architecture, config: BitFitConfig) -> Adaptation:
    """The biases and the head that train. Raises InputError for a base without biases, such as Llama."""
    biases = tuple(p for p in trained_params(arch, arch.modules) if p.param.endswith("bias"))
    if not biases:
        raise InputError("method", "bitfit", f"{arch.model_type} has no biases to train (try ln-tuning)")
    head = tuple(p for p in head_params(arch) if not p.param.endswith("bias"))
    return Adaptation(trained=(*biases, *head))
