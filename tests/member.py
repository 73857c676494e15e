"""One of two processes that work together, with four simulated devices each; `test_distributed.py` starts them.

python member.py JOB PROCESS PORT FOLDER
"""

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from goldens import load_case
from jax.experimental import multihost_utils

from grokjax import cli, distributed, release
from grokjax.checkpoint import describe, load, save
from grokjax.conversion import convert
from grokjax.engine import Engine
from grokjax.model import Grok
from grokjax.request import Request
from grokjax.sharding import ShardingRules, make_mesh
from grokjax.shared_steps import follow
from grokjax.steps import forward

CASE = "tiny-moe-s8"
MESHES = {"1x8": ((1, 4), (1, 2)), "2x4": ((1, 4), (2, 1))}
ENGINE: dict[str, Any] = {"slots": 4, "max_len": 64, "prefill_buckets": (8,)}
PROMPT = ["generate", "abc", "--dtype", "float32", "--max-new-tokens", "4", "--ignore-eos", "--random"]
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
        {"ids": list(sample.token_ids), "scores": sample.prompt_logprobs and list(sample.prompt_logprobs[1:])}
        for handle in handles
        for sample in handle.samples
    ]


def work_together(folder: Path) -> dict[str, Any]:
    """Everything that works over processes, once; what came of it."""
    golden = load_case(CASE)
    found: dict[str, Any] = {"devices": jax.device_count()}
    with counted_bytes() as sizes:
        model = load(golden.checkpoint, golden.config, make_mesh(*MESHES["1x8"]), np.float32)
    found["loaded_bytes"] = sum(sizes)
    keep_logits(model, folder / f"1x8-{jax.process_index()}.npy")
    model = load(
        golden.checkpoint, golden.config, make_mesh(*MESHES["2x4"]), np.float32, rules=ShardingRules.expert_parallel()
    )
    keep_logits(model, folder / f"2x4-{jax.process_index()}.npy")
    convert(golden.checkpoint, folder / "converted", golden.config)
    found["converted"] = describe(folder / "converted").num_bytes
    save(model, folder / "saved")
    try:
        save(model, folder / "saved")
    except ValueError as error:
        found["refused"] = str(error)
    found["answers"] = lead_or_follow(load(folder / "alone", mesh=make_mesh(*MESHES["1x8"]), dtype=np.float32))
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        found["status"] = cli.main([*PROMPT, str(folder / "config.json")])
    return found | {"shown": shown.getvalue()}


def keep_logits(model: Grok, path: Path) -> None:
    np.save(path, multihost_utils.process_allgather(forward(model, load_case(CASE).tokens), tiled=True))


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
    read = release.Payload.read

    def counted(payload: release.Payload, index: Any = ()) -> np.ndarray:
        part = read(payload, index)
        sizes.append(part.nbytes)
        return part

    release.Payload.read = counted
    yield sizes
    release.Payload.read = read


def die_while_decoding(mortal: int) -> None:
    """An engine runs until the process `mortal` is killed, as by the kernel."""
    model = load(load_case(CASE).checkpoint, load_case(CASE).config, make_mesh(*MESHES["1x8"]), np.float32)
    send_or_receive = "receive" if jax.process_index() else "send"
    pass_message, count = getattr(distributed.Channel, send_or_receive), 0

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 20 and jax.process_index() == mortal:
            os.kill(os.getpid(), signal.SIGKILL)
        return pass_message(*arguments)

    setattr(distributed.Channel, send_or_receive, counted)
    lead_or_follow(model)


JOBS: dict[str, Callable[[Path], Any]] = {
    "work": work_together,
    "first_dies": lambda _: die_while_decoding(0),
    "second_dies": lambda _: die_while_decoding(1),
}


def main() -> None:
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    job, process_id, port, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    distributed.initialize(
        f"localhost:{port}", 2, process_id, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=60
    )
    result = JOBS[job](folder)
    (folder / f"{job}-{process_id}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
