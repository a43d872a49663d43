"""The golden outputs. After a change that is meant, write them again and read the difference:

python -m tests.cli.golden && git diff tests/cli/golden
"""

from __future__ import annotations

from tests.cli.run import HERE, run

GOLDEN = HERE / "golden"

CASES: dict[str, tuple[int | None, str]] = {
    # file: (columns, the command); no columns is a pipe
    "estimate-qlora-80.txt": (80, "estimate llama-2-70b --method qlora --r 16 --gpu rtx-4090 --gpu a100-80gb --gpu 24GiB"),
    "estimate-qlora-120.txt": (120, "estimate llama-2-70b --method qlora --r 16 --gpu rtx-4090 --gpu a100-80gb --gpu 24GiB"),
    "estimate-paged-80.txt": (80, "estimate mixtral-8x7b --optim paged_adamw_32bit"),
    "estimate-notes-80.txt": (80, "estimate gpt2 --method ia3 --trainer plain"),
    "estimate-full-80.txt": (80, "estimate qwen2.5-0.5b --method full --dtype fp32 --optim adafactor"),
    "estimate-verbose-80.txt": (80, "estimate ./tiny.json --target-modules q_proj --optim paged_adamw_32bit -v"),
    "estimate-verbose-120.txt": (120, "estimate ./tiny.json --quant nf4 --double-quant --target-modules q_proj --gpu t4 -v"),
    "estimate-pipe.txt": (None, "estimate llama-2-7b --method prefix-tuning --num-virtual-tokens 16 --gpu t4"),
    "estimate.json": (None, "estimate ./tiny.json --quant nf4 --target-modules q_proj,v_proj --gpu t4 --format json"),
    "estimate.csv": (None, "estimate ./tiny.json --method ln-tuning --task-type SEQ_CLS --num-labels 3 --format csv"),
    "estimate.md": (None, "estimate ./tiny.json --method dora --gpu rtx-3090 --format markdown"),
    "estimate-verbose.md": (None, "estimate ./tiny.json --target-modules q_proj --format markdown -v"),
    "serve-80.txt": (80, "serve llama-2-70b --method qlora --r 16 --adapters 4 --batch-size 8 --context 4096"),
    "serve-120.txt": (120, "serve llama-2-70b --method qlora --r 16 --adapters 4 --batch-size 8 --context 4096"),
    "serve-windows-80.txt": (80, "serve gemma-2-2b --method prefix-tuning --num-virtual-tokens 16 --context 8000"),
    "serve-full-80.txt": (80, "serve t5-small --method full --dtype fp32"),
    "serve.json": (None, "serve ./tiny.json --target-modules q_proj,lm_head --quant nf4 --format json"),
    "serve.csv": (None, "serve ./tiny.json --method boft --target-modules q_proj --adapters 2 --format csv"),
    "serve.md": (None, "serve ./tiny.json --method dora --serving-dtype fp32 --format markdown"),
    "models-80.txt": (80, "models llama-2*"),
    "models-120.txt": (120, "models llama-2*"),
    "models.json": (None, "models llama-2-7b --format json"),
    "models.csv": (None, "models llama-2-* --format csv"),
    "models.md": (None, "models llama-2-* --format markdown"),
    "methods-80.txt": (80, "methods"),
    "methods-120.txt": (120, "methods"),
    "methods.json": (None, "methods --format json"),
    "methods.csv": (None, "methods --format csv"),
    "method-dora-80.txt": (80, "methods dora"),
    "method-prefix-tuning.json": (None, "methods prefix-tuning --format json"),
    "method-ia3.csv": (None, "methods ia3 --format csv"),
    "method-full.md": (None, "methods boft --format markdown"),
    "gpus-80.txt": (80, "gpus a100"),
    "gpus-120.txt": (120, "gpus a100"),
    "gpus.json": (None, "gpus a100-80gb --format json"),
    "gpus.csv": (None, "gpus t4 --format csv"),
    "gpus.md": (None, "gpus a100 --format markdown"),
    "inspect-moe-80.txt": (80, "inspect mixtral-8x7b --match all-linear"),
    "inspect-moe-120.txt": (120, "inspect mixtral-8x7b --match all-linear"),
    "inspect-encoder-decoder-80.txt": (80, "inspect bart-base"),
    "inspect-all-80.txt": (80, r"inspect ./tiny.json --all --match .*\.1\..*proj"),
    "inspect-head-80.txt": (80, "inspect bert-base-uncased --task-type SEQ_CLS --num-labels 3 --dtype fp32"),
    "inspect.json": (None, "inspect ./tiny.json --match attention --format json"),
    "inspect.csv": (None, "inspect ./tiny.json --format csv"),
    "inspect.md": (None, "inspect ./tiny.json --match mlp --format markdown"),
}


def output(name: str) -> str:
    """What the command of a case prints; a command that fails is no golden case."""
    columns, command = CASES[name]
    done = run(*command.split(), columns=columns)
    assert done.code == 0, done.err
    assert done.err == ""
    return done.out


if __name__ == "__main__":
    written = {name: output(name) for name in CASES}  # all or nothing
    for old in GOLDEN.iterdir():
        old.unlink()
    for name, text in written.items():
        (GOLDEN / name).write_text(text, encoding="utf-8")
