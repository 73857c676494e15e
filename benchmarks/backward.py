"""Time and memory of a backward pass, with random weights, beside those of a forward pass.

`python benchmarks/backward.py` takes the loss of 512 tokens with `GrokConfig.bench_1b()` in int8: its derivatives are
those of the plain parameters, that is of norms, router and table; with `--plain` those of all. It prints medians, and
last one JSON line with the keys `config`, `layers`, `tokens`, `dtype`, `quantized`, `mesh`, `compile_seconds`,
`forward_seconds`, `gradient_seconds` (forward and backward), `backward_ratio` (what the gradient takes beyond the
forward pass, over the forward pass), `weight_bytes`, `gradient_bytes` (of the results), `forward_temporary_bytes` and
`gradient_temporary_bytes` (as the compiler plans them, a device) and the environment.
"""

import argparse
from typing import Any

import card
import jax
import jax.numpy as jnp
import numpy as np
from options import make_parser, read_config, read_mesh

from grokjax import Grok, forward, init
from grokjax.model import named_parameters, with_values
from grokjax.sharding import device_bytes


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=512, help="of the text (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def plain_parameters(model: Grok) -> dict[str, jax.Array]:
    values: dict[str, Any] = {name: param.get_value() for name, param in named_parameters(model).items()}
    return {name: value for name, value in values.items() if isinstance(value, jax.Array)}


def loss(parameters: dict[str, jax.Array], model: Grok, tokens: jax.Array) -> jax.Array:
    """The mean cross-entropy of each token, given those before it."""
    logits = forward(with_values(model, parameters), tokens[:, :-1])
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()


def main() -> None:
    arguments = parse_arguments()
    mesh, dtype = read_mesh(arguments), jnp.dtype(arguments.dtype)
    config = read_config(arguments, longest=arguments.tokens)
    model = init(config, mesh=mesh, dtype=dtype, quantized=not arguments.plain)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, config.vocab_size, (1, arguments.tokens + 1)))
    given = plain_parameters(model), model, tokens
    lowered = [jax.jit(function).lower(*given) for function in (loss, jax.value_and_grad(loss))]
    compiled: list[Any] = []
    compile_seconds = [card.seconds(lambda one=one: compiled.append(one.compile())) for one in lowered]
    for run in compiled:
        jax.block_until_ready(run(*given))
    runs = [[card.seconds(lambda run=run: run(*given)) for run in compiled] for _ in range(arguments.repeats)]
    forward_seconds, gradient_seconds = np.median(runs, axis=0)
    temporary = [run.memory_analysis().temp_size_in_bytes for run in compiled]
    record = {
        "benchmark": "backward",
        "config": arguments.config,
        "layers": config.num_layers,
        "tokens": arguments.tokens,
        "dtype": arguments.dtype,
        "quantized": not arguments.plain,
        "mesh": arguments.mesh,
        "compile_seconds": [round(time, 2) for time in compile_seconds],
        "forward_seconds": round(forward_seconds, 5),
        "gradient_seconds": round(gradient_seconds, 5),
        "backward_ratio": round(gradient_seconds / forward_seconds - 1, 2),
        "weight_bytes": device_bytes(jax.tree.leaves(model)),
        "gradient_bytes": device_bytes(given[0].values()),
        "forward_temporary_bytes": temporary[0],
        "gradient_temporary_bytes": temporary[1],
        **card.environment(),
    }
    weights = "plain" if arguments.plain else "int8"
    card.print_rows(
        f"{arguments.config}, {weights} weights, {arguments.dtype}, mesh {arguments.mesh}",
        {
            "forward pass": f"{1e3 * forward_seconds:.0f} ms, {temporary[0] / 1e6:.0f} MB beside the weights",
            "forward and backward": f"{1e3 * gradient_seconds:.0f} ms, {temporary[1] / 1e6:.0f} MB beside the weights",
            "backward over forward": f"{record['backward_ratio']:.2f}",
            "weights, gradients": f"{record['weight_bytes'] / 1e6:.0f} MB, {record['gradient_bytes'] / 1e6:.0f} MB",
        },
    )
    card.print_json(record)


if __name__ == "__main__":
    main()
