"""What a model needs on a machine, and how fast it could be there, before anyone has the machine.

Read `plans` first: memory and roofline of one mesh, and the memory of a gradient. `compiler` compiles the steps from
shapes alone, `compiled` reads what became of them, and `costs` counts what a step must read and compute. `targets` and
`accelerators` are the machines; `suggestions` plans every mesh and rule of one and puts them in order. `streaming`
plans a model whose weights stream.
"""

from grokjax.planning.accelerators import ACCELERATORS, GIB
from grokjax.planning.compiled import Program, Value, read_program
from grokjax.planning.compiler import StepCompiler
from grokjax.planning.costs import StepCost, step_cost
from grokjax.planning.plans import GradientPlan, Plan, StepPlan, plan
from grokjax.planning.streaming import StreamPlan, plan_stream
from grokjax.planning.suggestions import Suggestion, suggest
from grokjax.planning.targets import Target

__all__ = [
    "ACCELERATORS",
    "GIB",
    "GradientPlan",
    "Plan",
    "Program",
    "StepCompiler",
    "StepCost",
    "StepPlan",
    "StreamPlan",
    "Suggestion",
    "Target",
    "Value",
    "plan",
    "plan_stream",
    "read_program",
    "step_cost",
    "suggest",
]
