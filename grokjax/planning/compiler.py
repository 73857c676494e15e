"""Compiles the steps of a model for a machine from shapes alone, and says what its compiler made of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from grokjax.cache import KVCache, check_cache_dtype, default_cache_dtype
from grokjax.config import GrokConfig
from grokjax.errors import first_line
from grokjax.model import (
    Grok,
    SlotState,
    abstract_model,
    check_dtype,
    forward,
    lower_decode,
    lower_prefill,
    named_parameters,
    with_values,
)
from grokjax.planning.compiled import Program, read_program
from grokjax.planning.costs import StepCost, step_cost
from grokjax.planning.targets import Target
from grokjax.sharding import Partitioner, ShardingRules, default_extents, device_bytes

# Kind, devices, whether between hosts.
Route = tuple[str, int, bool]

# Most probable tokens that the steps find; an engine's default.
_NUM_TOP = 8
# The machine code is not going to run, and memory and transfers are settled before it: docs/hardware.md says for what
# they were compared. The compiler for TPUs is told to weigh no sizes of blocks and to leave instructions in order.
_UNOPTIMISED: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
_QUICKLY: dict[str, dict[str, str | bool]] = {
    "cpu": _UNOPTIMISED,
    "gpu": _UNOPTIMISED,
    "tpu": {"xla_jf_fusion_max_instruction_count_for_window_config": "1", "xla_jf_vliw_scheduler": "false"},
}
# Layers of the two small programs from which one that its compiler refuses, for want of memory, is extrapolated.
_FEW_LAYERS = (2, 4)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Transfers of one kind between devices in a step.

    Attributes:
      kind: such as "all-reduce".
      count: how many.
      num_bytes: of the results of all of them on one device.
      num_devices: that exchange among themselves.
      is_between_hosts: whether some of these belong to other hosts than the rest.
    """

    kind: str
    count: int
    num_bytes: int
    num_devices: int
    is_between_hosts: bool

    @property
    def route(self) -> Route:
        """What tells these transfers from the others of a step."""
        return self.kind, self.num_devices, self.is_between_hosts


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a compiler said of a step: bytes on a device besides weights and cache, and route -> transfers."""

    temporary_bytes: int
    other_bytes: int
    traffic: Mapping[Route, Traffic]


@dataclasses.dataclass(frozen=True)
class StepCompiler:
    """Compiles the steps of one model on one mesh. A compiler for CPUs may stand in for the target's own.

    It is pickled without devices, which are found again where it is asked to compile.
    """

    config: GrokConfig
    target: Target
    mesh: tuple[int, int]
    rules: ShardingRules | None
    dtype: jnp.dtype
    cache_dtype: jnp.dtype
    quantized: bool

    @classmethod
    def create(
        cls,
        config: GrokConfig | None,
        target: Target | str,
        *,
        mesh: tuple[int, int] | None,
        rules: ShardingRules | None,
        dtype: DTypeLike,
        cache_dtype: DTypeLike | None,
        quantized: bool,
    ) -> Self:
        """Arguments and errors are those of `grokjax.plan`."""
        target = Target.parse(target) if isinstance(target, str) else target
        config = GrokConfig.grok_1() if config is None else config
        if cache_dtype is None:
            cache_dtype = default_cache_dtype(target.accelerator.kind, check_dtype(dtype))
        if mesh is None:
            mesh = default_extents(config, rules, target.num_devices, uses_all=True)
        mesh = (mesh[0], mesh[1])
        compiler = cls(config, target, mesh, rules, check_dtype(dtype), check_cache_dtype(cache_dtype), quantized)
        _ = compiler.partitioner  # refused now, if it does not fit
        return compiler

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def partitioner(self) -> Partitioner:
        """The mesh of the target's devices, and the rules."""
        return Partitioner.create(self.config, self.target.mesh(self.mesh), self.rules)

    @property
    def stands_in(self) -> bool:
        """Whether the compiler is one for CPUs in place of the target's own."""
        return self.target.compiler != self.target.accelerator.kind

    @functools.cached_property
    def weights_bytes(self) -> int:
        """Bytes that the model's weights take on each device."""
        return device_bytes(jax.tree.leaves(self._model(self.config, self.dtype)))

    @functools.cached_property
    def gradient_bytes(self) -> int:
        """Bytes that the gradients of the plain parameters take on each device."""
        return device_bytes(_plain_parameters(self._model(self.config, self.dtype)).values())

    def cache_bytes(self, batch_size: int, max_len: int) -> int:
        """Bytes that a cache of so many rows takes on each device.

        Raises:
          ValueError: A size is out of range.
        """
        return device_bytes(jax.tree.leaves(self._cache(batch_size, max_len, self.cache_dtype)))

    def cost(self, batch_size: int, max_len: int, prompts: tuple[int, int] | None = None) -> StepCost:
        """What the step that `compile_step` compiles costs, in full rows or for the beginnings of prompts."""
        rows, num_new = prompts or (batch_size, 1)
        return step_cost(
            self._model(self.config, self.dtype),
            batch_size=rows,
            num_new=num_new,
            filled=max_len if prompts is None else num_new,
            cache_dtype=self.cache_dtype,
        )

    def _model(self, config: GrokConfig, dtype: DTypeLike) -> Grok:
        return abstract_model(config, self.partitioner, dtype=dtype, quantized=self.quantized)

    def _cache(self, batch_size: int, max_len: int, dtype: DTypeLike, config: GrokConfig | None = None) -> KVCache:
        mesh, rules = self.partitioner.mesh, self.partitioner.rules
        config = self.config if config is None else config
        return KVCache.abstract(config, batch_size, max_len, dtype=dtype, mesh=mesh, rules=rules)

    def compile_both(self, batch_size: int, max_len: int, prompts: tuple[int, int]) -> tuple[Measured, Measured]:
        """A decode step of all rows and a prefill of (P, T) tokens, compiled side by side."""
        with ThreadPoolExecutor(2) as threads:
            decode = threads.submit(compile_step, self, batch_size, max_len, None)
            prefill = threads.submit(self._compile_prefill, batch_size, max_len, prompts)
            return decode.result(), prefill.result()

    def _compile_prefill(self, batch_size: int, max_len: int, prompts: tuple[int, int]) -> Measured:
        """A prefill of (P, T) tokens; the same for any number of rows, as those that it leaves alone add bytes only."""
        data = self.partitioner.mesh.devices.shape[0]
        return compile_step(self, min(batch_size, -(-prompts[0] // data) * data), max_len, prompts)

    def compile_layers(
        self, num_layers: int, batch_size: int, max_len: int, prompts: tuple[int, int] | None
    ) -> Measured:
        """A step of an engine of so many rows, of a model of so many layers: what its compiler said."""
        model = self._compiled_model(num_layers)
        cache_dtype = jnp.float32 if self.stands_in and self.cache_dtype == jnp.bfloat16 else self.cache_dtype
        cache = self._cache(batch_size, max_len, cache_dtype, model.config)
        state = SlotState.abstract(model, cache)
        with jax.sharding.use_abstract_mesh(self.partitioner.mesh.abstract_mesh):  # tells kernels the device
            lowered = lower_decode(model, state, _NUM_TOP) if prompts is None else lower_prefill(model, state, prompts)
        return self._measure(lowered, num_layers, (model, cache))

    def compile_gradient_layers(self, num_layers: int, num_tokens: int) -> Measured:
        """The gradient of a loss, a text of so many tokens for each replica, of a model of so many layers."""
        model, shape = self._compiled_model(num_layers), (self.mesh[0], num_tokens)
        plain = _plain_parameters(model)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.partitioner.sharding(("batch", None), shape))
        with jax.sharding.use_abstract_mesh(self.partitioner.mesh.abstract_mesh):
            lowered = jax.jit(jax.grad(_loss)).lower(plain, model, tokens)
        return self._measure(lowered, num_layers, (model, plain))

    def _compiled_model(self, num_layers: int) -> Grok:
        """The model with so many layers, as it is compiled."""
        # What old compilers for CPUs do to bfloat16 stacks, converting them whole, says nothing of other targets.
        as_float32 = self.stands_in and not self.quantized
        return self._model(self.config.replace(num_layers=num_layers), jnp.float32 if as_float32 else self.dtype)

    def _measure(self, lowered: jax.stages.Lowered, num_layers: int, counted: Any) -> Measured:
        """What the compiler says of a program, besides the bytes of some arrays that are counted without it."""
        program = read_program(_compile_quickly(lowered, self.target.compiler))
        other_bytes = program.peak_bytes - program.temporary_bytes - device_bytes(jax.tree.leaves(counted))
        traffic = _traffic(program, num_layers, self.target.accelerator.group_size)
        return Measured(program.temporary_bytes, other_bytes, traffic)


@functools.cache  # some numbers for each program, the same for equal compilers
def compile_step(compiler: StepCompiler, batch_size: int, max_len: int, prompts: tuple[int, int] | None) -> Measured:
    """A step of an engine of so many rows: for P prompts' T tokens, given as (P, T), else a decode step of all.

    Raises:
      ValueError: The compiler fails. Where it only lacks memory, the step is extrapolated from models of few layers.
    """
    compile_layers = functools.partial(compiler.compile_layers, batch_size=batch_size, max_len=max_len, prompts=prompts)
    return _compile_all(compile_layers, compiler.config.num_layers)


def compile_gradient(compiler: StepCompiler, num_tokens: int) -> Measured:
    """The gradient of a loss, a text of so many tokens for each replica; the errors are those of `compile_step`."""
    compile_layers = functools.partial(compiler.compile_gradient_layers, num_tokens=num_tokens)
    return _compile_all(compile_layers, compiler.config.num_layers)


def _compile_all(compile_layers: Callable[[int], Measured], num_layers: int) -> Measured:
    """A program of all layers, extrapolated from those of few where the compiler lacks memory for it."""
    try:
        return compile_layers(num_layers)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise ValueError(f"the compiler failed: {first_line(error)}") from error
        return extrapolate(*map(compile_layers, _FEW_LAYERS), num_layers=num_layers)


def _loss(parameters: dict[str, jax.Array], model: Grok, tokens: jax.Array) -> jax.Array:
    """The mean cross-entropy of the tokens [B, T] behind the first of each text."""
    logits = forward(with_values(model, parameters), tokens)[:, :-1]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()


def _plain_parameters(model: Grok) -> dict[str, Any]:
    """What has derivatives of a model of shapes, by path: int8 weights are constants."""
    values = {name: param.get_value() for name, param in named_parameters(model).items()}
    return {name: value for name, value in values.items() if isinstance(value, jax.ShapeDtypeStruct)}


def _compile_quickly(lowered: jax.stages.Lowered, compiler: str) -> jax.stages.Compiled:
    try:
        return lowered.compile(_QUICKLY[compiler])
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return lowered.compile()  # options come and go with versions of a compiler


def _traffic(program: Program, num_layers: int, group_size: int | None) -> dict[Route, Traffic]:
    """The transfers of a step on a machine whose hosts hold `group_size` devices; None if there are no hosts."""
    traffic: dict[Route, Traffic] = {}
    for transfer in program.transfers:
        if transfer.num_devices == 1:
            continue  # of a mesh axis of one device: nothing moves
        times = num_layers if transfer.is_in_loop else 1
        is_between = group_size is not None and transfer.is_between(group_size)
        more = Traffic(transfer.kind, times, times * transfer.num_bytes, transfer.num_devices, is_between)
        earlier = traffic.get(more.route, _nothing(more.route))
        traffic[more.route] = dataclasses.replace(
            more, count=earlier.count + more.count, num_bytes=earlier.num_bytes + more.num_bytes
        )
    return traffic


def _nothing(route: Route) -> Traffic:
    kind, num_devices, is_between_hosts = route
    return Traffic(kind, 0, 0, num_devices, is_between_hosts)


def extrapolate(fewer: Measured, more: Measured, *, num_layers: int) -> Measured:
    """What a compiler would say of a step of `num_layers` layers, from what it said of two with fewer.

    Args:
      fewer: of a step with 2 layers.
      more: of the same step with 4 layers.
      num_layers: of the step that is too large to compile.

    Returns:
      Bytes and transfers that grow by the same amount with each layer.
    """

    def extend(low: int, high: int) -> int:
        return high + (high - low) * (num_layers - _FEW_LAYERS[1]) // (_FEW_LAYERS[1] - _FEW_LAYERS[0])

    def extend_traffic(high: Traffic) -> Traffic:
        low = fewer.traffic.get(high.route, _nothing(high.route))
        return dataclasses.replace(
            high, count=extend(low.count, high.count), num_bytes=extend(low.num_bytes, high.num_bytes)
        )

    return Measured(
        extend(fewer.temporary_bytes, more.temporary_bytes),
        extend(fewer.other_bytes, more.other_bytes),
        {route: extend_traffic(high) for route, high in more.traffic.items()},
    )
