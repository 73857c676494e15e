"""Whether several processes load the same weights: one host may hold another checkpoint of the same sizes."""

import zlib

from grokjax.checkpoint.parameters import parts_of
from grokjax.checkpoint.stored import Checkpoint, CheckpointError
from grokjax.distributed import exchange


def check_same_weights(checkpoint: Checkpoint, *, together: bool) -> None:
    """Compares samples of every array among all processes, which wait for each other.

    Args:
      checkpoint: what this process loads.
      together: whether the processes load one model; else nothing is compared.

    Raises:
      CheckpointError: One has another checkpoint than process 0; all of them say so.
    """
    if not together:
        return
    first, *others = exchange("the loading of a checkpoint", fingerprint(checkpoint))
    differing = [str(number) for number, other in enumerate(others, start=1) if other != first]
    if differing:
        raise CheckpointError(
            f"{checkpoint.path}: process {', '.join(differing)} has other weights there than process 0, or the same in "
            "another layout: give every host the same checkpoint."
        )


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells a checkpoint from others: its layout, and the CRC-32 of samples of all arrays."""
    crc = 0
    for parameter in sorted(checkpoint.tensors):
        for part in parts_of(parameter, checkpoint.config):
            crc = zlib.crc32(checkpoint.sample(part), crc)
    return f"{checkpoint.layout} {crc:08x}"
