"""A notebook that is saved as a script says what the notebook says: one program, written as Jupyter and marimo write it."""

from __future__ import annotations

import json

import pytest

from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import document_of_text, read_text

INSTALL = '%%capture\n!pip install unsloth "transformers==4.56.2"\n!pip install --no-deps "trl==0.22.2"'
LOAD = """from unsloth import FastLanguageModel
max_seq_length = 1024
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Llama-3.2-1B-Instruct", max_seq_length=max_seq_length)"""
LOGITS = "%env UNSLOTH_RETURN_LOGITS=1"
TRAIN = """args = SFTConfig(per_device_train_batch_size=2, max_steps=60)
SFTTrainer(model=model_1, max_seq_length=max_seq_length, args=args).train()"""
ADAPT = "model_1 = FastLanguageModel.get_peft_model(model, r=16)"
NOTEBOOK = json.dumps({"cells": [{"cell_type": "code", "source": [each]} for each in (INSTALL, LOAD, ADAPT, LOGITS, TRAIN)]})
EXPORT = f"""
# In[1]:
# get_ipython().run_cell_magic('capture', '', {INSTALL.removeprefix("%%capture" + chr(10))!r})
# In[2]:
{LOAD}
{ADAPT}
get_ipython().run_line_magic('env', 'UNSLOTH_RETURN_LOGITS=1')
{TRAIN}
"""
"""`jupyter nbconvert --to script`, with its first cell behind `# `, as Unsloth publishes it."""
MARIMO = """# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torchao>=0.16.0",
#     "transformers==4.56.2",
#     "trl==0.22.2",
#     "unsloth @ git+https://github.com/unslothai/unsloth",
# ]
# ///
import marimo
app = marimo.App()

@app.cell
def _():
    import os
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    {load}
    return FastLanguageModel, max_seq_length, model

@app.cell(disabled={disabled})
def _(max_seq_length):
    max_seq_length = 4096
    return

@app.cell
def _(FastLanguageModel, max_seq_length, model):
    {adapt}
    {train}
    return
"""


def _marimo(*, disabled: bool = True) -> str:
    load, adapt, train = (each.replace("\n", "\n    ") for each in (LOAD, ADAPT, TRAIN))
    return MARIMO.format(load=load, adapt=adapt, train=train, disabled=disabled)


def _read_from(plan: ConfigPlan) -> object:
    return plan.model, plan.options, plan.releases, {key: row.value for key, row in plan.unsupported.items()}


@pytest.mark.parametrize("script", [EXPORT, _marimo()])
def test_a_saved_notebook_says_what_the_notebook_says(script: str) -> None:
    notebook = read_text(NOTEBOOK, file="a.ipynb")
    assert (notebook.options["seq_len"], *notebook.unsupported) == (1024, "environment.UNSLOTH_RETURN_LOGITS")
    assert _read_from(read_text(script, file="a.py")) == _read_from(notebook)
    assert document_of_text(script, file="a.py").installs == "transformers==4.56.2 trl==0.22.2"


def test_a_cell_of_marimo_runs_unless_it_is_disabled() -> None:
    assert read_text(_marimo(disabled=False), file="a.py").options["seq_len"] == 4096


def test_what_a_notebook_says_in_another_language_is_left_out() -> None:
    other = EXPORT.replace("'capture'", "'bash'")
    assert not document_of_text(other, file="a.py").installs
