"""Dictionaries of a program that other names of it change: what Python makes of the text is the witness, never an old value."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.job.configs.read import read_text

HEAD = "from transformers import AutoModelForCausalLM, Trainer, TrainingArguments\ncfg = {'batch': 4}\n"
TAIL = """
model = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2.5-0.5B', dtype='bfloat16')
args = TrainingArguments('out', per_device_train_batch_size=cfg['batch'], bf16=True)
Trainer(model=model, args=args, train_dataset=data).train()
"""
KEY = "args.per_device_train_batch_size"
CHANGING = {
    "a constructor": "class C:\n    def __init__(self, c):\n        c['batch'] = 16\nC(cfg)",
    "a constructor that keeps it": (
        "class C:\n    def __init__(self, c):\n        self.c = c\n        self.c['batch'] = 16\nC(c=cfg)"
    ),
    "an inherited constructor": "class A:\n    def __init__(self, c):\n        c['batch'] = 16\nclass B(A):\n    pass\nB(cfg)",
    "a constructor by another": "def f(c):\n    c['batch'] = 16\nclass C:\n    def __init__(self, c):\n        f(c)\nC(cfg)",
    "a list that holds it": "held = [cfg]\nheld[0]['batch'] = 16",
    "a dictionary that holds it": "held = {'a': cfg}\nheld['a'].update(batch=16)",
    "an attribute": "class O: pass\no = O()\no.cfg = cfg\no.cfg['batch'] = 16",
    "a comprehension": "[cfg.update({key: 16}) for key in ('batch',)]",
    "its own method": "cfg.__setitem__('batch', 16)",
    "a loop": "for c in (cfg,):\n    c['batch'] = 16",
    "a loop over what holds it": "held = {'a': cfg}\nfor c in held.values():\n    c.update(batch=16)",
    "another method": (
        "class C:\n    def __init__(self, c):\n        self.c = c\n"
        "    def run(self):\n        self.c.update({'batch': 16})\nC(cfg).run()"
    ),
    "the constructor of a parent": (
        "class A:\n    def __init__(self, c):\n        c['batch'] = 16\n"
        "class B(A):\n    def __init__(self, c):\n        super().__init__(c)\nB(cfg)"
    ),
    "keyword arguments": "def f(**kw):\n    kw['c']['batch'] = 16\nf(c=cfg)",
    "a lambda": "f = lambda c: c.update(batch=16)\nf(cfg)",
    "arguments of a list": "def f(c):\n    c['batch'] = 16\nf(*[cfg])",
}
KEEPING = {
    "a copy": "other = cfg.copy()\nother['batch'] = 16",
    "a deep copy": "import copy\nother = copy.deepcopy(cfg)\nother['batch'] = 16",
    "a dictionary of its items": "other = dict(cfg)\nother.update(batch=16)",
    "a list of another": "held = [cfg]\nheld[0] = {'batch': 16}",
    "a constructor that reads": (
        "class C:\n    def __init__(self, c):\n        self.seen = []\n        self.seen.append(c['batch'])\nC(cfg)"
    ),
}


def really(text: str) -> int:
    names: dict[str, Any] = {}
    exec("cfg = {'batch': 4}\n" + text, names)
    return int(names["cfg"]["batch"])


@pytest.mark.parametrize("how", CHANGING)
def test_settings_that_changed_are_not_known(how: str) -> None:
    assert really(CHANGING[how]) == 16
    plan = read_text(HEAD + CHANGING[how] + TAIL, file="a.py")
    assert plan.options.get("batch_size") != 4
    assert KEY in plan.unsupported


@pytest.mark.parametrize("call", ["TrainingArguments('out', **{})", "TrainingArguments('out', **{{**{}}})"])
def test_settings_that_changed_are_not_handed_over(call: str) -> None:
    head = HEAD.replace("'batch'", "'per_device_train_batch_size'")
    changing = "for c in (cfg,):\n    c['per_device_train_batch_size'] = 16\n"
    tail = f"args = {call.format('cfg')}\nTrainer(model='Qwen/Qwen2.5-0.5B', args=args, train_dataset=data).train()\n"
    assert read_text(head + tail, file="a.py").options["batch_size"] == 4
    assert KEY in read_text(head + changing + tail, file="a.py").unsupported


@pytest.mark.parametrize("how", KEEPING)
def test_settings_that_stay_are_known(how: str) -> None:
    assert really(KEEPING[how]) == 4
    assert read_text(HEAD + KEEPING[how] + TAIL, file="a.py").options["batch_size"] == 4
