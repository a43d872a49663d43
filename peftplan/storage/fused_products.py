"""Which products bitsandbytes computes from 4-bit weights as they are stored, without dequantizing them.

`MatMul4Bit.forward` takes its fused kernel where that is faster than to dequantize and multiply: it looks at the tokens, the
weight's shape and the card. Only the forward can be fused: `MatMul4Bit.backward` always dequantizes. Source: bitsandbytes,
backends/cuda/ops.py:584-812 (`_gemm_4bit_use_custom_cuda`) and :934-982 (`gemm_4bit`); before `versions.FUSED_4BIT` it always
dequantized.

Letters: n outputs, k inputs of the layer. A block of the kernel makes 64 outputs, and a *wave* is a block on each multiprocessor.
Left out: products of up to 8 tokens, most of which are fused.
"""

from typing import NamedTuple

from peftplan.units import ceil_div

OUTPUTS_OF_A_BLOCK = 64
SMALL_WEIGHT = 4 * 2**20
"""Elements below which the choice follows other limits."""
FEWEST_TOKENS = 9
"""Products of fewer tokens are left out."""
SHORT_K = 0.5
"""A small weight with fewer inputs than this share of its outputs is fused for many tokens."""


class Chip(NamedTuple):
    """What the choice asks of a card: its compute capability and how many multiprocessors it has."""

    major: int
    minor: int
    multiprocessors: int

    def most_tokens(self, *, n: int, k: int, dtype: str, blocksize: int) -> int:
        """Tokens up to which a product with a weight (n, k) in this compute dtype is fused, from 9 on; 0 where none is."""
        capability = (self.major, self.minor)
        narrow = dtype == "fp16" or (dtype == "bf16" and capability >= (8, 0))
        if k % blocksize or not narrow or capability < (7, 5) or capability == (8, 7) or self.major == 11:
            return 0
        blocks, sms = ceil_div(n, OUTPUTS_OF_A_BLOCK), self.multiprocessors
        if self.major == 10:
            most = _blackwell(n, k, blocks, sms)
        elif n * k < SMALL_WEIGHT:
            most = _small(n, k, blocks, self)
        else:
            most = LADDERS.get(capability if self.major != 9 else (9, 0), _ada)(n, k, blocks, sms)
        return most if most >= FEWEST_TOKENS else 0


def _blackwell(n: int, k: int, blocks: int, sms: int) -> int:
    """Datacenter Blackwell (10.x)."""
    if blocks >= 3 * sms:
        return 32
    return 8 if blocks >= sms and k < n else 0


def _small(n: int, k: int, blocks: int, chip: Chip) -> int:
    """Weights of fewer than 4 Mi elements."""
    sms, ampere, hopper, turing = chip.multiprocessors, chip[:2] == (8, 0), chip.major == 9, chip.major == 7
    if k < SHORT_K * n:
        if ampere or hopper:
            few = 3 * blocks < sms
            return (1536 if few else 512) if ampere else (512 if few else 320)
        if turing:
            return 320 if blocks >= 3 * sms or k < 704 else 64 if k >= 1024 else 96
        return 192 if blocks < sms and blocks * k > sms * 320 else 320
    quarter = 4 * blocks <= sms
    if ampere and quarter:
        return 384 if k < n else 32 if 8 * blocks <= sms else 128
    if turing and blocks < sms:
        return 64
    if quarter:
        return 32 if k < n or hopper else 23
    return 16 if 2 * blocks <= sms else 0


def _turing(n: int, k: int, blocks: int, sms: int) -> int:
    if blocks >= 3 * sms:
        return 128 if k < n else 64
    return 64 if blocks >= sms // 2 else 32


def _a100(n: int, k: int, blocks: int, sms: int) -> int:
    if blocks >= 3 * sms:
        return 128
    if blocks >= sms:
        return 64 if k < n else 32
    between = k == n and blocks >= 48 and 5 * blocks < 3 * sms
    if between or (k >= 3 * n and 4 * blocks > sms):
        return 0
    if 2 * blocks < sms and k <= n:
        return 128
    if 2 * blocks < sms and 3 * blocks >= sms:
        return 0
    return 128 if blocks >= sms // 2 and k < n else 16


def _ga10x(n: int, k: int, blocks: int, sms: int) -> int:
    return 128 if blocks >= sms else 64 if blocks >= sms // 2 else 16


def _hopper(n: int, k: int, blocks: int, sms: int) -> int:
    for waves, most in ((3, 64), (2, 48), (1, 32)):
        if blocks >= waves * sms:
            return most
    return 16 if blocks >= sms // 2 and (k < n or 4 * blocks >= 3 * sms) else 0


def _consumer_blackwell(n: int, k: int, blocks: int, sms: int) -> int:
    if blocks >= 2 * sms:
        return 256 if blocks >= 3 * sms else 128
    if 5 * blocks >= 4 * sms:
        return 96 if k >= n else 64
    if blocks >= sms // 2:
        return 64 if 2 * k >= n and blocks >= 128 else 8
    return 16 if k > 2 * n and blocks > 64 else 8


def _spark(n: int, k: int, blocks: int, sms: int) -> int:
    return 256 if blocks >= sms else _ada(n, k, blocks, sms)


def _ada(n: int, k: int, blocks: int, sms: int) -> int:
    """Ada (8.9), and cards that the library does not know."""
    tall = k > 2 * n
    if blocks >= 2 * sms:
        return 256 if blocks >= 3 * sms else 128
    if 5 * blocks >= 4 * sms:
        if tall or blocks >= 200:
            return 128
        return 64 if k < n else 128 if sms >= 60 else 32
    if blocks >= sms // 2:
        return 64 if tall else 8 if blocks >= 64 else 32
    if k > n and blocks <= 48:
        return 12 if k >= 3 * n else 10
    return 16 if tall or blocks < 48 else 8


LADDERS = {
    (7, 5): _turing,
    (8, 0): _a100,
    (8, 6): _ga10x,
    (9, 0): _hopper,
    (12, 0): _consumer_blackwell,
    (12, 1): _spark,
}
"""Compute capability → tokens up to which a weight of 4 Mi elements and more is fused."""
