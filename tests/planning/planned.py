"""Plans that several files of tests compare, and a compiler made up for them."""

import functools

from grokjax.config import GrokConfig
from grokjax.planning import Plan, StepCompiler, plan
from grokjax.planning.compiler import Measured

TINY = GrokConfig.tiny()
REAL = GrokConfig.grok_1()
MIB = 1 << 20


@functools.cache
def real_plan(target: str) -> Plan:
    """The plan of Grok-1 on a machine, made once in a process: it takes long."""
    return plan(target=target)


def made_up_step(steps: StepCompiler, batch_size: int, max_len: int, prompts: tuple[int, int] | None) -> Measured:
    """A compiler whose temporaries grow with the rows of a decode step, and little with the prompts of a prefill."""
    data = steps.partitioner.mesh.devices.shape[0]
    if prompts is None:
        return Measured(4096 + 512 * batch_size // data, 64 * batch_size // data, {})
    return Measured(20_000 + 100 * prompts[0], 0, {})
