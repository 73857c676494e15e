"""A little of everything that a user asks of the package, on a golden model; `test_settings.py` runs it in processes.

python everything.py run FOLDER
python everything.py steps

It reads JAX's settings from the environment, as a user's program does, and writes what it computed as JSON.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from goldens import check_generation, check_logits, load_case

from grokjax.checkpoint import describe, load, load_parameters, save
from grokjax.cli import main
from grokjax.config import GrokConfig
from grokjax.engine import Engine
from grokjax.model import Grok, decode, forward, generate, init, prefill
from grokjax.request import Request
from grokjax.sampling import SampleSettings, row_keys, sample_token, seed_key

GOLDEN = load_case("tiny-moe")
# Little of it: where nothing is compiled, each operation of each layer is a program of its own.
SMALL = GrokConfig.tiny().replace(
    model_dim=16, num_heads=1, num_kv_heads=1, head_dim=16, ffn_dim=16, num_experts=2, experts_per_token=1
)
SMALL = SMALL.replace(num_layers=1, vocab_size=288, max_seq_len=16)
REQUESTS = (
    Request([3, 4, 5], max_new_tokens=4, ignore_eos=True, temperature=0, logprobs=2, prompt_logprobs=True),
    Request([3, 4, 5, 6, 7], max_new_tokens=4, ignore_eos=True, temperature=0.9, top_p=0.9, seed=7, n=2),
    Request([8], max_new_tokens=4, ignore_eos=True, temperature=1.0, top_k=40, seed=2**32 - 1, logit_bias={17: 2.0}),
)


def check_model(model: Grok) -> None:
    """The logits, greedy tokens and cache of the release."""
    check_logits(GOLDEN, np.asarray(forward(model, GOLDEN.tokens)))
    check_generation(GOLDEN, model, [1, 2])


def generated(model: Grok) -> list[Any]:
    """Three rows: greedy, top-k, top-p."""
    settings = SampleSettings.create(3, temperature=[0, 1, 1], top_k=[0, 9, 0], top_p=[1, 1, 0.9], min_p=[0, 0.01, 0])
    prompts = np.array([[3, 4, 5], [6, 0, 0], [7, 8, 0]])
    out = generate(model, prompts, np.array([3, 1, 2]), max_new_tokens=4, settings=settings, eos_id=2)
    return jax.device_get(out.tokens).tolist()


def answered(model: Grok) -> list[Any]:
    """What an engine answers, several requests beside each other."""
    with Engine(model, slots=3, max_len=16, prefill_buckets=(4,), prefill_rows=2, max_logprobs=2) as engine:
        handles = [engine.submit(request) for request in REQUESTS]
        engine.run()
    return [[list(sample.token_ids) for sample in handle.samples] for handle in handles]


def stored(model: Grok, folder: Path) -> list[float]:
    """Sums of a model's parameters after it was saved, described and loaded."""
    save(model, folder / "saved")
    assert describe(folder / "saved").num_parameters
    assert load_parameters(folder / "saved", ["layers.0.attention.query"])
    values = jax.tree.leaves(load(folder / "saved", dtype=np.float32))
    return [float(np.abs(jax.device_get(value).astype(np.float64)).sum()) for value in values]


def commanded(folder: Path) -> list[list[int]]:
    """What a command generates, after others have succeeded too."""
    config = folder / "config.json"
    config.write_text(GOLDEN.config.to_json())
    release = [str(GOLDEN.checkpoint), "--config", str(config)]
    prompts = folder / "prompts.txt"
    prompts.write_text("ab\nabc\n")
    model = ["--checkpoint", *release, "--tokenizer", "bytes", "--dtype", "float32", "--max-new-tokens", "4"]
    commands = (
        ["generate", *model, "--prompts", str(prompts), "--output", str(folder / "out.jsonl"), "--temperature", "0"],
        ["convert", *release[:1], str(folder / "int8"), *release[1:], "--verify"],
        ["convert", *release[:1], str(folder / "plain"), *release[1:], "--weights", "bfloat16"],
        ["export", str(folder / "int8"), str(folder / "exported")],
        ["info", str(folder / "int8"), "--mesh", "1,1"],
        ["make-release-fixture", str(folder / "fixture"), "--layers", "1"],
        ["plan", "--config", "tiny", "--target", "cpu:8", "--json", "--max-len", "32", "--prompt", "8"],
    )
    for command in commands:
        with contextlib.redirect_stdout(io.StringIO()):
            status = main(command)
        assert status == 0, command
    records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    return [record["token_ids"] for record in sorted(records, key=lambda record: record["id"])]


def steps() -> dict[str, Any]:
    """The steps of a very small model, and a draw through every filter."""
    model, prompt, lengths = init(SMALL, seed=3, dtype=np.float32), np.array([[3, 4, 5]]), np.array([3])
    logits, cache = prefill(model, prompt, lengths, model.new_cache(1, 8))
    settings = SampleSettings.create(1, top_k=40, top_p=0.9, min_p=0.01)
    keys = jax.vmap(seed_key)(jax.device_put(np.array([5], np.uint32)))
    token_id = sample_token(row_keys(keys, cache.lengths), logits, settings).token_id
    following, cache = decode(model, token_id, cache)
    drawn, logits, following = jax.device_get((token_id, logits, following))
    whole = jax.device_get(forward(model, np.concatenate([prompt, drawn[None]], axis=1)))
    np.testing.assert_allclose(whole[0, 2:], np.concatenate([logits, following]), atol=1e-4)
    return {"drawn": drawn.tolist(), "best": following.argmax(axis=-1).tolist()}


def golden() -> Grok:
    """The golden model, float32, its results checked."""
    model = load(GOLDEN.checkpoint, GOLDEN.config, dtype=np.float32)
    check_model(model)
    return model


def run(folder: Path) -> dict[str, Any]:
    """Everything else."""
    model = golden()
    return {
        "drawn": generated(model),
        "answered": answered(model),
        "stored": stored(init(SMALL, seed=3), folder),
        "commanded": commanded(folder),
    }


if __name__ == "__main__":
    results = steps() if sys.argv[1] == "steps" else run(Path(sys.argv[2]))
    sys.stdout.write(json.dumps(results))
