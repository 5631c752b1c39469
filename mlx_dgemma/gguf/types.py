"""ggml's tensor types: name, number, and how many bytes a block of weights takes.

Source   ggml.h, ggml_type; block sizes agree with gguf.constants.GGML_QUANT_SIZES (a test compares)
Differs  TYPES has what a DiffusionGemma file may hold; OTHER_TYPES are only known by size, so that any file can be
         described. Removed types are in neither

Standard library only.
"""

from typing import NamedTuple


class Type(NamedTuple):
    name: str
    number: int  # in a file
    block: int  # weights
    block_bytes: int

    def row_bytes(self, row: int) -> int:
        """Bytes of one row of weights. The row must be a multiple of the block."""
        assert row % self.block == 0, (self.name, row)
        return row // self.block * self.block_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block


# fmt: off
TYPES = {t.name: t for t in (
    Type("F32", 0, 1, 4), Type("F16", 1, 1, 2), Type("BF16", 30, 1, 2),
    Type("Q8_0", 8, 32, 34), Type("Q5_1", 7, 32, 24), Type("Q5_0", 6, 32, 22),
    Type("Q4_1", 3, 32, 20), Type("Q4_0", 2, 32, 18),
    Type("Q6_K", 14, 256, 210), Type("Q5_K", 13, 256, 176), Type("Q4_K", 12, 256, 144),
    Type("Q3_K", 11, 256, 110), Type("Q2_K", 10, 256, 84),
    Type("IQ4_NL", 20, 32, 18), Type("IQ4_XS", 23, 256, 136),
    Type("IQ3_S", 21, 256, 110), Type("IQ3_XXS", 18, 256, 98), Type("IQ2_S", 22, 256, 82),
    Type("IQ2_XS", 17, 256, 74), Type("IQ2_XXS", 16, 256, 66), Type("IQ1_M", 29, 256, 56), Type("IQ1_S", 19, 256, 50),
    Type("MXFP4", 39, 32, 17), Type("NVFP4", 40, 64, 36),
)}
OTHER_TYPES = (
    Type("I8", 24, 1, 1), Type("I16", 25, 1, 2), Type("I32", 26, 1, 4), Type("I64", 27, 1, 8), Type("F64", 28, 1, 8),
    Type("Q8_1", 9, 32, 40), Type("Q8_K", 15, 256, 292), Type("TQ1_0", 34, 256, 54), Type("TQ2_0", 35, 256, 66),
    Type("Q1_0", 41, 128, 18),
)
# fmt: on
BY_NUMBER = {t.number: t for t in (*TYPES.values(), *OTHER_TYPES)}
FLOATS = ("F32", "F16", "BF16")
