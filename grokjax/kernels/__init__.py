"""The operations that cost the time, each with one signature and a form for each device.

Nothing here knows of layers or requests. Each operation has a module that chooses its form by `platform`, where it will
run; a form that serves one kind of device lies beside it.

Read `products` first, of activations with a plain or int8 weight, and its forms `matmul_cpu` and `matmul_gpu`; they
share `slices`, and `cpu_features` says what the processors of this machine multiply, numbers as they are or integers in
`planes`, and with how many cores. Then `unembedding`, the product of hidden states with the table; `experts`, those
that each token chose, with `experts_blocks`, `experts_gpu` and the `gated_unit` of both; `entries`, rows of the cache
read and written; and `attention` over them, with `attention_blocks`, `attention_gpu` and `attention_tpu`. Backwards,
`derivatives` gives each a rule, which lies in `cotangents`, `experts_backward` and `attention_backward`.
"""

from grokjax.kernels.attention import attend
from grokjax.kernels.cpu_features import by_feature, count_cores, processor_features, product_dtype
from grokjax.kernels.derivatives import varying_over, with_rule
from grokjax.kernels.entries import CachePlace, copy_row, own_place, scatter_entries, write
from grokjax.kernels.experts import evaluate_experts
from grokjax.kernels.gated_unit import GatedWeights, activate, gated_unit
from grokjax.kernels.products import matmul, matmuls
from grokjax.kernels.slices import in_place
from grokjax.kernels.unembedding import unembed

__all__ = [
    "CachePlace",
    "GatedWeights",
    "activate",
    "attend",
    "by_feature",
    "copy_row",
    "count_cores",
    "evaluate_experts",
    "gated_unit",
    "in_place",
    "matmul",
    "matmuls",
    "own_place",
    "processor_features",
    "product_dtype",
    "scatter_entries",
    "unembed",
    "varying_over",
    "with_rule",
    "write",
]
