"""Bytes of optimizer state, one entry per name that transformers' `TrainingArguments.optim` accepts."""

from peftplan.optim.names import BESIDE, OF_AUTOMODEL, OF_AXOLOTL, OF_DEEPSPEED, OPTIMIZERS, REFUSED, parse_optim
from peftplan.optim.optimizer import Optimizer, StepImplementation
from peftplan.optim.parameter_states import parse_optim_args, shared_states, states

__all__ = [
    "BESIDE",
    "OF_AUTOMODEL",
    "OF_AXOLOTL",
    "OF_DEEPSPEED",
    "OPTIMIZERS",
    "REFUSED",
    "Optimizer",
    "StepImplementation",
    "parse_optim",
    "parse_optim_args",
    "shared_states",
    "states",
]
