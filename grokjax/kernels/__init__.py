"""The operations that cost the time, each with one signature and a form for each device.

Nothing here knows of layers or requests. Read `products`, the product of activations with a plain or int8 weight and
the way its form is chosen; then `entries`, which reads and writes rows of the cache, and `attention` over them.
`matmul_gpu`, `attention_gpu` and `attention_tpu` are kernels for one kind of device; `cpu_features` says what the
processors of this machine multiply.
"""

from grokjax.kernels import attention_gpu, attention_tpu, matmul_gpu
from grokjax.kernels.attention import attend
from grokjax.kernels.cpu_features import product_dtype
from grokjax.kernels.entries import CachePlace, copy_row, own_place, scatter_entries, write
from grokjax.kernels.products import KERNEL_ROWS, float_precision, matmul, matmuls, numbers_and_scales, pad_rows

__all__ = [
    "KERNEL_ROWS",
    "CachePlace",
    "attend",
    "attention_gpu",
    "attention_tpu",
    "copy_row",
    "float_precision",
    "matmul",
    "matmul_gpu",
    "matmuls",
    "numbers_and_scales",
    "own_place",
    "pad_rows",
    "product_dtype",
    "scatter_entries",
    "write",
]
