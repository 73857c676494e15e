"""Models whose layers stay in the checkpoint's files compute what loaded ones do, and every trouble is a sentence."""

import collections
import errno
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import FULLY, SMALL, TENSOR, WrittenCheckpoint, label, or_thorough, write_checkpoint
from goldens import check_generation, check_logits, load_case

from grokjax import (
    CheckpointError,
    Engine,
    Grok,
    Progress,
    Request,
    ShardingRules,
    convert,
    decode,
    export,
    forward,
    generate,
    load,
    make_mesh,
    prefill,
    score,
    stream,
)
from grokjax.research import Tap, edit, observe, steer

FOUR_LAYERS = SMALL.replace(num_layers=4)
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)
LENGTHS = np.array([12, 7], np.int32)
PLACES = or_thorough([((1, 1), TENSOR), ((2, 4), FULLY)], [((1, 1), TENSOR)])

compiled: collections.Counter[str] = collections.Counter()


def note_compilation(name: str, seconds: float, **known: Any) -> None:
    if name == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        compiled[known["fun_name"]] += 1


jax.monitoring.register_event_duration_secs_listener(note_compilation)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> WrittenCheckpoint:
    return write_checkpoint(tmp_path_factory.mktemp("release"), FOUR_LAYERS, scale_blocks=4)


@pytest.fixture(scope="module")
def loaded(release: WrittenCheckpoint) -> Grok:
    return load(release.path, FOUR_LAYERS, dtype=jnp.float32)


@pytest.fixture(scope="module")
def streamed(release: WrittenCheckpoint) -> Grok:
    return stream(release.path, FOUR_LAYERS, dtype=jnp.float32)


def assert_same(found: Any, expected: Any) -> None:
    jax.tree.map(lambda *both: np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-5), found, expected)


def run_steps(model: Grok) -> Any:
    """What every step of a model gives, that with a cache after the one that fills it."""
    taps = {
        "stream": Tap("stream.out", layers=[1, 3]),
        "last": Tap("attention.query", at="last"),
        "folded": Tap("router.logits", fold=jnp.maximum),
        "final": Tap("final"),
    }
    logits, cache = prefill(model, TOKENS, LENGTHS, model.new_cache(2, 16))
    next_logits, _ = decode(model, np.array([1, 2]), cache)
    steps = forward(model, TOKENS), score(model, TOKENS, LENGTHS), observe(model, TOKENS, LENGTHS, taps)
    return jax.tree.map(np.asarray, (*steps, logits, next_logits))


@pytest.fixture(scope="module")
def expected(loaded: Grok) -> Any:
    return run_steps(loaded)


@pytest.mark.parametrize(("mesh", "rules"), PLACES, ids=label)
def test_every_step_gives_what_a_loaded_model_gives(
    release: WrittenCheckpoint, expected: Any, mesh: tuple[int, int], rules: ShardingRules
) -> None:
    model = stream(release.path, FOUR_LAYERS, make_mesh(mesh), jnp.float32, rules=rules)
    compiled.clear()
    assert_same(run_steps(model), expected)
    assert compiled["_run"] <= 5  # one program for all layers of each call: four layers would make 20


@pytest.mark.parametrize(
    ("case", "mesh"),
    or_thorough(
        [(case, mesh) for case in ("tiny-moe", "tiny-moe-s8", "tiny-dense-2x4") for mesh in ((1, 1), (2, 4))],
        [("tiny-moe-s8", (2, 4))],
    ),
    ids=label,
)
def test_a_streamed_model_gives_the_logits_of_the_release(case: str, mesh: tuple[int, int]) -> None:
    golden = load_case(case)
    model = stream(golden.checkpoint, golden.config, make_mesh(mesh), jnp.float32)
    check_logits(golden, np.asarray(forward(model, golden.tokens)))


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["tiny-moe-s8", "tiny-dense-2x4"])
def test_a_streamed_model_generates_as_the_release(case: str) -> None:
    golden = load_case(case)
    model = stream(golden.checkpoint, golden.config, make_mesh((2, 4)), jnp.float32)
    check_generation(golden, model, range(len(golden.tokens)))


def test_layers_that_stay_change_no_bit(release: WrittenCheckpoint, streamed: Grok) -> None:
    told: list[Progress] = []
    of_layer = [tensor for name, tensor in release.tensors.items() if name.startswith("layers.0.")]
    per_layer = sum(leaf.nbytes for tensor in of_layer for leaf in (tensor.weight, tensor.scales) if leaf is not None)
    budgets = [{"host_bytes": per_layer}, {"host_bytes": 4 * per_layer}, {"device_bytes": 1 << 30}]
    expected = np.asarray(forward(streamed, TOKENS))
    read = []
    for budget in budgets:
        model = stream(release.path, FOUR_LAYERS, dtype=jnp.float32, **budget, progress=told.append)
        told.clear()
        np.testing.assert_array_equal(np.asarray(forward(model, TOKENS)), expected)
        read.append(len(told))
    assert read == [1 + 3, 0, 0]


def test_generation_gives_the_tokens_of_decoding(streamed: Grok, loaded: Grok) -> None:
    found = generate(streamed, TOKENS, LENGTHS, max_new_tokens=4)  # in caches as long as those of `run_steps`
    logits, cache = prefill(loaded, TOKENS, LENGTHS, loaded.new_cache(2, 16))
    for i in range(4):
        tokens = np.asarray(logits).argmax(-1)
        np.testing.assert_array_equal(found.tokens[:, i], tokens)
        if i < 3:
            logits, cache = decode(loaded, tokens, cache)


@pytest.mark.thorough
def test_generation_gives_what_that_of_a_loaded_model_gives(streamed: Grok, loaded: Grok) -> None:
    found, expected = (
        generate(model, TOKENS, LENGTHS, max_new_tokens=5, eos_id=25, guesses=3) for model in (streamed, loaded)
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert_same(found, expected)


def complete(model: Grok) -> list[tuple[Any, ...]]:
    with Engine(model, slots=2, max_len=32, prefill_buckets=(8,), max_guesses=2) as engine:
        handles = [
            engine.submit(Request(prompt, max_new_tokens=4, seed=3, prompt_logprobs=True))
            for prompt in ([5, 6, 7], [8, 9, 10, 11], list(range(12)))
        ]
        engine.run()
    done = [handle.completion for handle in handles]
    return [(one.token_ids, one.finish_reason, [score.rank for score in one.prompt_logprobs[1:]]) for one in done]


@pytest.mark.thorough
def test_an_engine_gives_the_completions_of_a_loaded_model(streamed: Grok, loaded: Grok) -> None:
    assert complete(streamed) == complete(loaded)


@pytest.mark.thorough
def test_an_edit_acts_in_layers_that_stream(streamed: Grok, loaded: Grok) -> None:
    push = steer(np.arange(32, dtype=np.float32), layers=[2])
    found, expected = (forward(edit(model, push), TOKENS) for model in (streamed, loaded))
    assert_same(found, expected)
    assert np.abs(np.asarray(found) - np.asarray(forward(streamed, TOKENS))).max() > 0.01


@pytest.mark.parametrize("layout", ["ours", pytest.param("safetensors", marks=pytest.mark.thorough)])
def test_layers_stream_from_every_layout(layout: str, release: WrittenCheckpoint, loaded: Grok, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if layout == "ours":
        convert(release.path, path, FOUR_LAYERS)
        expected = forward(loaded, TOKENS)
    else:
        export(release.path, path, FOUR_LAYERS)
        expected = forward(load(path, dtype=jnp.float32), TOKENS)
    assert_same(forward(stream(path, dtype=jnp.float32), TOKENS), expected)


def test_a_layer_is_let_go_before_the_next_but_one_is_read(release: WrittenCheckpoint) -> None:
    held: list[int] = []
    shape = (1, *release.stack("feed_forward.gate").shape[1:])

    def count(_: Progress | None) -> None:
        held.append(sum(array.shape == shape and array.dtype == jnp.int8 for array in jax.live_arrays()))

    model = stream(release.path, FOUR_LAYERS, dtype=jnp.float32, progress=count)
    gc.collect()
    gc.disable()  # nothing may have to wait for it
    held.clear()
    count(None)
    forward(model, TOKENS)  # tells of each layer when it is read, and begins with the next one then
    count(None)
    gc.enable()
    before, _, *during, after = held
    assert [found - before for found in during] == [2, 2, 2, 2]  # gate and up
    assert after == before


def test_a_file_that_changed_ends_the_pass_and_is_fine_once_it_is_back(
    release: WrittenCheckpoint, streamed: Grok
) -> None:
    file = sorted((release.path / "ckpt-0").iterdir())[-2]  # of the last layer
    status, threads = file.stat(), threading.active_count()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match="was changed or replaced after it had been opened: open it again"):
        forward(streamed, TOKENS)
    assert threading.active_count() == threads
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    forward(streamed, TOKENS)


def test_a_disk_that_fails_in_a_pass_is_named(release: WrittenCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stream(release.path, FOUR_LAYERS, dtype=jnp.float32)
    threads = threading.active_count()

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("grokjax.checkpoint.formats.payload.read_bytes", fail)
        with pytest.raises(
            CheckpointError, match=r"layer 0 cannot be read \(Input/output error\). Look after the disk"
        ):
            score(model, TOKENS, LENGTHS)
    assert threading.active_count() == threads
    score(model, TOKENS, LENGTHS)


def test_whoever_is_told_may_end_a_pass(release: WrittenCheckpoint) -> None:
    def end(progress: Progress) -> None:
        if progress.parameter == "layers.1":
            raise KeyboardInterrupt

    model = stream(release.path, FOUR_LAYERS, dtype=jnp.float32, progress=end)
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        forward(model, TOKENS)
    assert threading.active_count() == threads


def test_too_small_a_budget_is_refused_with_the_least(release: WrittenCheckpoint) -> None:
    with pytest.raises(
        ValueError, match=r"device_bytes=1000 \(1000 Bytes\) is too little: .* take [0-9.]+ KiB on each"
    ):
        stream(release.path, FOUR_LAYERS, device_bytes=1000)
    with pytest.raises(ValueError, match="host_bytes=-1 must be"):
        stream(release.path, FOUR_LAYERS, host_bytes=-1)


def test_budgets_beyond_the_memory_are_refused(release: WrittenCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the devices are CPUs, layers that stay on the host take of the same memory."""
    monkeypatch.setattr("grokjax.memory.host_bytes_left", lambda: 150_000)
    with pytest.raises(ValueError, match=r"the model needs .* is left there: give less device_bytes and host_bytes"):
        stream(release.path, FOUR_LAYERS, host_bytes=1 << 30)
    stream(release.path, FOUR_LAYERS)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: jax.jit(forward)(model, TOKENS),
        lambda model: jax.jit(lambda tokens: forward(model, tokens))(TOKENS),
        lambda model: model.hidden_states(TOKENS),
        lambda model: model.layers[0],
    ],
)
def test_a_program_of_ones_own_is_refused(streamed: Grok, use: Callable[[Grok], Any]) -> None:
    with pytest.raises(ValueError, match="are streamed, and no program of yours can hold them: give the model to"):
        use(streamed)


def test_weights_that_are_not_there_are_told_so(streamed: Grok) -> None:
    with pytest.raises(AttributeError, match=r"layers\.attention: the layers of this model are streamed"):
        _ = streamed.layers.attention
