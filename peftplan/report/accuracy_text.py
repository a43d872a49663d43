"""The prose of the accuracy page."""

from __future__ import annotations

INTRO = """# Accuracy

How close are peftplan's peaks to the memory that real fine-tuning runs used on a GPU? Other projects measured most of the runs
below. Both engines predict each run, and the tables show how many percent they are off, by source, method, model and setup. Plus
means that the prediction is too high. The terms are [explained at the end](#what-the-words-mean).

`peftplan check --report` writes this page from `data/runs/`: the records, each engine's stored predictions (`baseline.json`) and
those of other tools (`peers.json`). Edit those files, not this page. `peftplan check` compares today's engines with the stored
predictions and fails if a number on this page has changed."""

DEFINITIONS = """## What the words mean

- **Estimated** is the analytic engine, **traced** the trace engine, **measured** a figure read on a GPU.
- **Drift** is signed: stated ÷ measured − 1, in percent. Plus is too much. **Median absolute error** is the median of |drift|;
  **worst** is the drift with the largest absolute value.
- **allocated** is `torch.cuda.max_memory_allocated()`, **reserved** `max_memory_reserved()`, **device** what the driver showed
  (NVML, nvidia-smi): reserved bytes, the CUDA context and all else. For `device` the measured context of the run is added where
  it was recorded, else the card's as published; where neither is known, nothing is stated.
- A run of **several GPUs** is that of one rank, with the strategy in its record (`distributed`). Its tables come last, and no
  table or count of runs on one GPU contains it.
- **forward**, **backward**, **step** are the allocated peaks of that part of a steady optimizer step.
- Where a record covers the whole process, loading counts in the stated peak; where it covers training or one steady step, it
  does not.
- A run **states everything that ran** if its source leaves nothing open that the setup needs, and nothing is known to have run
  differently. It counts **as labelled** if the setup is what the source states, and **with an inferred stack** if a version was
  replaced by one that explains the measured bytes (`inferred`, with the evidence). Every other record **leaves something open**,
  and states in `unknown` and `differs` what was assumed and what differs. Only runs as labelled test the engine alone.
- A record's **script** says what its program did that no option says: lengths of the steps before, outputs that outlive the step,
  `empty_cache`, keys and values repeated by hand, a torch that its label does not say. Both engines run the same, with the
  allocator of the torch that ran.
- **Wrong verdicts**: `does_not_fit` or `does_not_run` on the card on which it ran, or `fits` on one on which it ran out of
  memory; `fits` on a card 1 % below the measured peak; `does_not_fit` on a card 10 % above it. Reserved bytes decide where
  they were measured and stated, else allocated bytes, else the device's. `fits` leaves at least 5 % of the card; less is
  `tight`, which counts as right on all of these cards. The two synthetic cards of a run have no CUDA context. In the
  tables by group: runs with a wrong verdict, by that figure, on one of the two cards below and above. A run that ran out of
  memory has no peak to compare: its counters stood still at what it had reached.
- Sources print few digits. Half of the last digit is added to a tolerance, not to the drift shown here."""

CAUSES = """## Known causes of drift

- fitcheck-llm's sdpa runs: its program pins the memory-efficient kernel and repeats grouped keys and values for it. The record
  states this (`script`), and both engines do the same. Otherwise sdpa with grouped queries would run the math kernel on a T4,
  which stores the attention scores: + 70 % with long sequences.
- Reserved bytes: the place of one block decides the places of later blocks, so a difference of one temporary can change them by
  a whole tensor of scores or logits.
- fitcheck-llm's reserved bytes: of the 34 runs that load the same each time both engines state 32 to the MiB, and two 2 MiB too
  low. The quantized ones of its three later sessions come out at − 13 to + 15 %: transformers 5.0 to 5.3 copied weights to the
  card in threads ahead of their quantization (core_model_loading.py, `GLOBAL_WORKERS`), and later tensors use the gaps that
  this leaves. One job, measured twice in one session, reserved 11,880 and 13,272 MiB. Later versions copy one by one, as both
  engines do. Forty of the records are labelled torch 2.14 and transformers 5.17, which reserve and allocate differently; they are
  taken as run with the 2.10 and 5.0.0 of the others, which [give what was measured](trace-drift.md).
- Its four out-of-memory runs print what was allocated and the request that failed. Their sum equals the estimated peak
  (in the first step without the optimizer states, which did not exist yet) to the printed 0.01 GiB.
- fms-acceleration: both engines do what the versions of a record did. Before transformers 4.42 each layer of Mistral kept cosines
  and sines of all 32,768 positions (512 MiB; `MistralRotaryEmbedding`), before 4.48 its class repeated keys and values before
  flash-attn, until 4.48 the loss copied the fp32 logits without the last position; bitsandbytes before 0.43.2 kept the input of
  each 4-bit product (`MatMul4Bit`). Checkpoints were reentrant, the default then. LoRA, full fine-tuning and QLoRA without kbit
  preparation are within 0.35 %, QLoRA with kbit preparation in fp16 within 0.03 %, with 4.39 and without versions 1.7 % low.
- fms-acceleration, QLoRA with kbit preparation in bf16: TRL casts embeddings and head back to bf16 there
  (`peft_module_casting_to_bf16`), which neither engine does: + 2.2 to + 4.5 %, and + 0.02 % where a trace does.
- peft's benchmark: its records say that the outputs outlive the step, that the cache is emptied between steps, and which
  length came before the longest (`script`; [chosen once](trace-drift.md) by two rows). Prefix tuning and OSF: the causes
  are there.
- Several GPUs: fms-acceleration's 121 ranks of FSDP1 leave open that the code is not that of transformers 5, 33 of them their
  versions too. At the commits of these the repository asks for accelerate < 0.29, whose FSDP1 casts nothing to fp32; peft before
  0.12 leaves adapters in the fp16 in which 4-bit weights are stored. Of Mixtral ranks are within 0.2 %, of those without versions
  0.45 % (its tokens are not spread evenly over the experts), of SantaCoder within 0.05 %, and all others within 0.01 %.
  fms-hf-tuning resizes the tables to the tokenizer's length
  (`tokenizer_and_embedding_resize`), which the records say: a row more than the model has, and 122 fewer of SantaCoder
  (inferred from what lasts on a rank). What lasts between steps is then 1,536 bytes more, three scalars, than the formula says
  on ranks of LoRA and full fine-tuning, and within 0.01 % on all but SantaCoder's full fine-tuning: tails of blocks, which the
  allocator does not split off below 1 MiB, are 2 to 6 MB there and differ by 3.5 MB among equal jobs; in fp32 44 of 48 shards
  of layers and their gradients have one of 1,003,008 bytes (44 MB, 0.5 %).
  fsdp_qlora and ms-swift leave open what decides reserved bytes (versions, kernels, lengths, the metric): 20 and 4 records."""

CHOICES = """## Choices made from measured bytes

No coefficient is fitted. But some facts about these runs are stated nowhere, and were chosen because they explain what was
measured. Figures that rest on such a choice confirm it as much as they confirm the engine. Each record names its choices in
`inferred`; this table is made from them. One more choice is a rule of the allocator's model, not of a record: for torch before
2.13, new segments of more than 20 MiB lie below older ones (`allocator/device.py`). It was chosen by what unquantized runs
on the T4 reserved, so reserved bytes of every run with such a torch rest on it."""

UNBOUNDED = """The trace is held to a tolerance for what each of fitcheck-llm's runs reserved, 10 % where its loader copied
weights in threads. These runs are further off and have none: {runs}."""

OTHERS = """## Published records of others

What was published about predictors of training memory, each on its own test set. The sets differ from this one: none of them
covers LoRA, QLoRA, DoRA, IA3 or prefix tuning, and full training of small models has other peaks (fp32 states and activations)
than adapters on a frozen base have. So the numbers are context, not a ranking."""

OTHERS_COLUMNS = ("work", "median error", "measured on")
OTHERS_ROWS = (
    (
        "xMem (Middleware 2025, arXiv 2510.21048)",
        "3.66 %, and 9.46 % wrong out-of-memory verdicts",
        "5,209 full trainings of 25 models up to 1 B; NVML peak of the process",
    ),
    (
        "LLMem (IJCAI 2024)",
        "at most 1.6 % on one GPU, 3.0 % on several; 74 % when run again by xMem's authors",
        "full fine-tuning of 4 models up to 560 M",
    ),
    ("MemTracker (torch, `torch/distributed/_tools`)", "its tests allow ± 10 %", "toy MLPs"),
)

PEERS_INTRO = """## Other tools on the same runs

`python benchmarks/peers.py --write` asks every tool about every record that it can express ({python}). One figure per
record is compared: allocated bytes where they were measured, else reserved, else the device's; a tool that keeps its allowance
for context and fragmentation apart is compared without it for allocated bytes and with it for the others. Verdicts follow from
the number by the rule above, the same for all. A job that a tool cannot express counts as not accepted.
fitcheck-llm's coefficients were fitted on its own T4 runs, canifinetune's RTX 4080 runs informed its formulas, and vramcalc ships
its own A6000 runs; all are among these records. What peftplan chose by looking at measured bytes is listed
[above](#choices-made-from-measured-bytes); every tool is told the 690 tokens of peft's benchmark. Cold start: a fresh Python that
imports the tool and estimates one LoRA job, best of five, all on one machine.

Not included: loggetta plans its own executor, whose kernels and storage these runs did not have; Unsloth's estimate describes
Unsloth's kernels; `accelerate estimate-memory` does not cover adapters; web calculators cannot be run offline."""
