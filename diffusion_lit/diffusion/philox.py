"""Philox4x32-10: random words that are a function of a counter and a key."""

from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]
"""Four words of 32 bits, int64 in 0 .. 2^32 - 1, of shapes that broadcast to one."""


def philox(counter: Words, key: int) -> Words:
    """Encrypts counters: four random words for each, unrelated to those of any other counter or key.

    Operations on integers only, hence the same words on every device. torch has no product of 32-bit words that keeps
    the upper half; here it is the upper half of a product in int64, which wraps around.

    Args:
        counter: Four words, the lowest first.
        key: In 0 .. 2^64 - 1.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    c0, c1, c2, c3 = counter
    for r in range(ROUNDS):
        k0, k1 = (half + r * weyl & WORD for half, weyl in zip((key & WORD, key >> 32), WEYL, strict=True))
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # c1 and c3 are the lower halves: the mask of the next round takes away what stands above them.
        c0, c2 = (p1 >> 32 ^ c1 ^ k0) & WORD, (p0 >> 32 ^ c3 ^ k1) & WORD
        c1, c3 = p1, p0
    return c0, c1 & WORD, c2, c3 & WORD
