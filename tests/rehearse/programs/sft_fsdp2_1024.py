"""The same as rank 0 of 1,024."""
# gpu: 8xa100-80gb
# launcher: torchrun --nnodes 128 --nproc-per-node 8
# estimate: llama-3.2-1b --trainer trl --method lora --r 16 --target-modules all-linear --strategy fsdp2
# estimate: --nodes 128 --batch-size 1 --seq-len 2048

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("sft_fsdp2.py")), run_name="__main__")
