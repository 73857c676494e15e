"""The operations that cost the time, each with one signature and a form for each device.

Nothing here knows of layers or requests. Read `products`, the product of activations with a plain or int8 weight and
the way its form is chosen; then `entries`, which reads and writes rows of the cache. `matmul_gpu` and `attention_gpu`
are the kernels for GPUs, used as `matmul_gpu.stack_matmul`; `cpu_features` says what the processors of this machine
multiply.
"""

from grokjax.kernels import attention_gpu, matmul_gpu
from grokjax.kernels.cpu_features import product_dtype
from grokjax.kernels.entries import copy_row, own_rows, read, scatter_entries, write
from grokjax.kernels.products import KERNEL_ROWS, float_precision, matmul, matmuls, numbers_and_scales, pad_rows

__all__ = [
    "KERNEL_ROWS",
    "attention_gpu",
    "copy_row",
    "float_precision",
    "matmul",
    "matmul_gpu",
    "matmuls",
    "numbers_and_scales",
    "own_rows",
    "pad_rows",
    "product_dtype",
    "read",
    "scatter_entries",
    "write",
]
