"""Normal noise as `torch.randn` draws it on an NVIDIA GPU, computed on the CPU.

The counter-based generator Philox 4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") turns a
counter of four words and a key of two into four random words; Box and Muller's transform (1958) makes normal numbers of
two. CUDA's kernel gives each element of a tensor a thread, and each call of `randn` the next counter: counter =
(call, 0, element, 0), key = seed. That holds while the GPU has a thread for every element, which for latents of
512 x 512 pixels all but the smallest have; AUTOMATIC1111's "NV" noise is the same for any size.
"""

from __future__ import annotations

import math

import numpy as np

MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], np.uint32)
ROUNDS = 10
# cuRAND's constants, in its single precision.
UNIT = float(np.float32(2.0**-32))
TURN = float(np.float32(2.0**-32 * 2.0 * math.pi))


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """The random words (4, N), uint32, that belong to counters (4, N), uint32, under a key of two words."""
    words = counter.astype(np.uint32)
    keys = np.array(key, np.uint32)
    for _ in range(ROUNDS):
        products = words[[0, 2]] * MULTIPLIERS[:, None]  # (2, N), 64 bits
        high, low = (products >> np.uint64(32)).astype(np.uint32), products.astype(np.uint32)
        words = np.stack([high[1] ^ words[1] ^ keys[0], low[1], high[0] ^ words[3] ^ keys[1], low[0]])
        keys = keys + KEY_STEPS
    return words


def normal(seed: int, call: int, count: int, *, first: int = 0) -> np.ndarray:
    """Elements `first` to `first + count` of the tensor that call number `call`, from 0, of `randn` draws, float32.

    Args:
        seed: 0 to 2**64 - 1.
    """
    counter = np.zeros((4, count), np.uint32)
    counter[0] = call
    counter[2] = np.arange(first, first + count, dtype=np.uint32)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log(words[0] * UNIT + UNIT / 2.0))
    return (radius * np.sin(words[1] * TURN + TURN / 2.0)).astype(np.float32)
