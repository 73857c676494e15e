"""One of two processes that work together, with simulated devices; `test_distributed.py` starts them.

python member.py JOB PROCESS PORT FOLDER
"""

import contextlib
import functools
import io
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from builders import TINY_DENSE
from goldens import load_case
from jax.experimental import multihost_utils

from grokjax import cli, distributed
from grokjax.checkpoint import CheckpointError, convert, describe, load, save
from grokjax.checkpoint.formats.payload import Payload
from grokjax.cli import batch
from grokjax.engine import Engine, follow
from grokjax.model import Grok, ModelSteps, forward
from grokjax.request import Request
from grokjax.sharding import ShardingRules, make_mesh

GOLDEN = load_case("tiny-moe-s8")
TINY = TINY_DENSE.replace(max_seq_len=64)
FOUR_EXPERTS = TINY.replace(num_experts=4, experts_per_token=2)
MESHES = {"1x8": ((1, 4), (1, 2)), "2x4": ((1, 4), (2, 1))}
ENGINE: dict[str, Any] = {"slots": 4, "max_len": 64, "prefill_buckets": (8,), "prefill_rows": 1}
GENERATE = ["generate", "--dtype", "float32", "--ignore-eos", "--random"]
PROMPT = ["abc", "--max-new-tokens", "4"]
PREFIX = list(range(5, 16))
# Chunks, shared prefixes, several samples, every kind of setting; together well over a channel's 64 messages.
REQUESTS = (
    Request([*PREFIX, 20, 21], max_new_tokens=40, ignore_eos=True, logprobs=2),
    Request([7, 8, 9], max_new_tokens=30, ignore_eos=True, temperature=0.8, seed=3, n=2),
    Request([*PREFIX, 30], max_new_tokens=20, ignore_eos=True, prompt_logprobs=True),
    Request([4, 5], max_new_tokens=10, ignore_eos=True, temperature=1.0, logit_bias={17: 50.0}),
    Request([1, 2, 3], max_new_tokens=40, ignore_eos=True, temperature=1.0, top_p=0.9, top_k=40, seed=9),
)


def answer(engine: Engine) -> list[dict[str, Any]]:
    """What an engine makes of `REQUESTS`, the second half of which arrives when the first runs."""
    handles = [engine.submit(request) for request in REQUESTS[:3]]
    for _ in range(6):
        engine.step()
    handles += [engine.submit(request) for request in REQUESTS[3:]]
    engine.run()
    return [
        {
            "ids": list(sample.token_ids),
            "scores": [score.logprob for score in sample.prompt_logprobs[1:]] if sample.prompt_logprobs else [],
        }
        for handle in handles
        for sample in handle.samples
    ]


def work_together(folder: Path) -> dict[str, Any]:
    """Everything that works over processes, once; what came of it."""
    found: dict[str, Any] = {"devices": jax.device_count()}
    rules = ShardingRules.expert_parallel()
    with counted_bytes() as sizes:
        model = load(GOLDEN.checkpoint, GOLDEN.config, make_mesh(*MESHES["1x8"]), np.float32, rules=rules)
    found["loaded_bytes"] = sum(sizes)
    logits = multihost_utils.process_allgather(forward(model, GOLDEN.tokens), tiled=True)
    np.save(folder / f"logits-{jax.process_index()}.npy", logits)
    convert(folder / "experts", folder / "converted", FOUR_EXPERTS)
    found["converted"] = describe(folder / "converted").num_bytes
    model = load(folder / "experts", FOUR_EXPERTS, make_mesh(*MESHES["2x4"]), np.float32, rules=rules)
    save(model, folder / "saved")
    try:
        save(model, folder / "saved")
    except ValueError as error:
        found["refused"] = str(error)
    try:
        load(folder / f"seed-{jax.process_index()}", TINY, make_mesh(*MESHES["1x8"]))
    except CheckpointError as error:
        found["other_weights"] = str(error)
    try:
        distributed.on_first(f"the end of /{jax.process_index()}", lambda: None)
    except distributed.DistributedError as error:
        found["elsewhere"] = str(error)
    found["answers"] = lead_or_follow(load(folder / "seed-0", TINY, make_mesh(*MESHES["2x4"]), np.float32))
    return found


def show(folder: Path) -> str:
    """What a command that succeeds prints."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert cli.main([*GENERATE, str(folder / "config.json"), *PROMPT, "--mesh", "1,8"]) == 0
    return shown.getvalue()


def lead_or_follow(model: Grok) -> list[dict[str, Any]] | None:
    if jax.process_index():
        follow(model)
        return None
    with Engine(model, **ENGINE) as engine:
        engine.warm_up()
        return answer(engine)


@contextlib.contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Sizes of what is read of the release's files meanwhile."""
    sizes: list[int] = []
    read_into = Payload.read_into

    def counted(payload: Payload, out: np.ndarray, index: Any = ()) -> None:
        read_into(payload, out, index)
        sizes.append(out.nbytes)

    Payload.read_into = counted
    yield sizes
    Payload.read_into = read_into


# Job -> whose function it is and at which of its calls a process dies: before all meet, or between steps.
DEATHS: dict[str, tuple[Any, str, int]] = {
    "meeting": (batch, "on_first", 1),
    "batch": (ModelSteps, "decode", 10),
    "prompt": (ModelSteps, "decode", 10),
}


def die(job: str, mortal: int, folder: Path) -> None:
    """A command runs until the process `mortal` is killed, as by the kernel."""
    if jax.process_index() == mortal:
        kill_at(*DEATHS[job])
    what = ["abc"] if job == "prompt" else ["--prompts", str(folder / "prompts.txt"), "--output", str(folder / "out")]
    sys.exit(cli.main([*GENERATE, str(folder / "config.json"), "--max-new-tokens", "60", *what]))


def kill_at(owner: Any, name: str, call: int) -> None:
    function, calls = getattr(owner, name), itertools.count(1)

    def counted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, counted)


JOBS: dict[str, Callable[[Path], Any]] = {"work": work_together, "show": show} | {
    f"{job}-{mortal}": functools.partial(die, job, mortal) for job in DEATHS for mortal in range(2)
}


def main() -> None:
    job, process_id, port, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    # Of several devices on CPUs, those with no neighbour in the process that died would wait on, and JAX with them.
    devices = 4 if job in ("work", "show") else 1
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"  # the last one counts
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    jax.config.update("jax_default_device", None)  # a command without --mesh takes the devices of both processes
    distributed.initialize(f"localhost:{port}", 2, process_id, heartbeat_timeout_seconds=6, shutdown_timeout_seconds=60)
    result = JOBS[job](folder)
    (folder / f"{job}-{process_id}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
