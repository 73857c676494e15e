"""Which device holds what: meshes, the rules that split a model over them, and the shardings that follow.

Every parameter and every entry of a cache names its logical axes, such as `heads`. Rules say which axis of a mesh
splits each; nothing is left unsplit without saying so.

Read `rules` first, which is data, and what of it fits a mesh. Then `meshes`, how they are made and which one is taken
where none is named; `partitioner`, which turns logical axes into a `NamedSharding`; `arrays`, made where that says, and
brought whole to the host; and `callers`, whose arrays may lie on another mesh than the model.
"""

from grokjax.sharding.arrays import check_has_devices, device_bytes, to_host, with_shardings, zeros
from grokjax.sharding.callers import check_caller, hand_over, is_foreign, receive
from grokjax.sharding.meshes import MESH_AXES, default_extents, default_mesh, make_mesh, spread_over_hosts
from grokjax.sharding.partitioner import Axes, Partitioner
from grokjax.sharding.rules import RULES, ShardingRules

__all__ = [
    "MESH_AXES",
    "RULES",
    "Axes",
    "Partitioner",
    "ShardingRules",
    "check_caller",
    "check_has_devices",
    "default_extents",
    "default_mesh",
    "device_bytes",
    "hand_over",
    "is_foreign",
    "make_mesh",
    "receive",
    "spread_over_hosts",
    "to_host",
    "with_shardings",
    "zeros",
]
