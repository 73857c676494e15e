"""JAX's own settings: whichever a user has chosen, the results are those of the default ones.

They are tried in processes of their own, `everything.py`, as a user's program chooses them: in the environment.
"""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import everything
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import ROOT, SMALL, or_thorough, program_for, write_checkpoint

from grokjax.cli import main
from grokjax.kernels import unembed
from grokjax.sampling import SampleSettings, row_keys, sample_token

# All that change nothing, at once. The tests themselves run with strict promotion of dtypes and ranks.
SETTINGS = {
    "JAX_ENABLE_X64": "1",
    "JAX_TRANSFER_GUARD": "disallow",
    "JAX_NUMPY_RANK_PROMOTION": "warn",
    "JAX_DEBUG_NANS": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
}
# Those of which there may be but one at a time, once more.
OTHERS = {"JAX_DEFAULT_PRNG_IMPL": "unsafe_rbg", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}


def run_with(settings: dict[str, str], *arguments: str) -> Any:
    """What `everything.py` writes under some settings; its warnings are errors, as they are here."""
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "everything.py"), *arguments]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return json.loads(json.dumps(everything.run(tmp_path_factory.mktemp("here"))))


@pytest.mark.parametrize(
    "settings", [SETTINGS, pytest.param(OTHERS, marks=pytest.mark.thorough)], ids=["all", "others"]
)
def test_several_settings_at_once_change_no_step(settings: dict[str, str]) -> None:
    assert run_with(settings, "steps") == everything.steps()


@pytest.mark.thorough
def test_settings_change_no_result(expected: Any, tmp_path: Path) -> None:
    """Of the release's model, `generate`, an engine, weights on the disk, and commands."""
    assert run_with(SETTINGS, "run", str(tmp_path)) == expected


@pytest.mark.thorough
def test_the_older_threefry_draws_other_numbers_and_the_same_greedy_tokens(expected: Any, tmp_path: Path) -> None:
    """Beside one more precision of a user's own products."""
    settings = {"JAX_THREEFRY_PARTITIONABLE": "0", "JAX_DEFAULT_MATMUL_PRECISION": "BF16_BF16_F32_X3"}
    found = run_with(settings, "run", str(tmp_path))
    for name in ("drawn", "answered"):
        greedy, *drawn = found[name]
        assert greedy == expected[name][0]
        assert drawn != expected[name][1:]
    assert found["commanded"] == expected["commanded"]


@pytest.mark.thorough
def test_steps_and_draws_run_without_compilation() -> None:
    assert run_with({"JAX_DISABLE_JIT": "1"}, "steps") == everything.steps()


def test_draws_through_every_filter_run_without_compilation() -> None:
    logits = jax.random.normal(jax.random.key(1), (2, 50))
    keys, settings = jax.random.split(jax.random.key(2), 2), SampleSettings.create(2, top_k=9, top_p=0.8, min_p=0.01)
    expected = sample_token(keys, logits, settings, num_top=3)
    with jax.disable_jit():
        drawn = sample_token(keys, logits, settings, num_top=3)
    np.testing.assert_array_equal(drawn.token_id, expected.token_id)
    np.testing.assert_allclose(drawn.prob, expected.prob, rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_programs_do_not_depend_on_how_a_user_s_own_products_are_multiplied(platform: str) -> None:
    x, table = jax.ShapeDtypeStruct((2, 256), jnp.bfloat16), jax.ShapeDtypeStruct((512, 256), jnp.int8)
    product = functools.partial(unembed, platform=platform)
    plain = program_for(platform, product, x, table)
    with jax.default_matmul_precision("highest"):
        assert program_for(platform, product, x, table) == plain


@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_keys_of_any_generator_draw_for_a_row_as_if_it_were_alone(generator: str) -> None:
    logits, positions = jax.random.normal(jax.random.key(1), (3, 50)), jnp.arange(3, dtype=jnp.int32)
    keys = jnp.stack([jax.random.key(seed, impl=generator) for seed in (4, 5, 6)])

    def draw(rows: slice) -> list[int]:
        settings = SampleSettings.create(len(keys[rows]))
        return sample_token(row_keys(keys[rows], positions[rows]), logits[rows], settings).token_id.tolist()

    alone = [draw(slice(row, row + 1))[0] for row in range(3)]
    assert draw(slice(None)) == alone


def test_raw_keys_of_another_generator_are_refused() -> None:
    keys = jax.random.key_data(jax.random.split(jax.random.key(0, impl="rbg"), 2))
    with pytest.raises(ValueError, match=r"raw keys of uint32 \(2, 4\) are not those of threefry.*pass typed keys"):
        row_keys(keys, jnp.zeros(2, jnp.int32))


def run_command(platforms: str, *command: str) -> str:
    """The last line of what a command says that fails where JAX_PLATFORMS is this."""
    done = subprocess.run(
        [sys.executable, "-m", "grokjax", *command],
        env=os.environ | {"JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


JOINED = ("--coordinator", "localhost:{port}", "--num-processes", "1", "--process-id", "0")


@pytest.mark.parametrize(
    ("platforms", "joining"),
    or_thorough([("cuda", JOINED), ("tpu", ()), ("nonsense", ())], [("cuda", JOINED), ("tpu", ())]),
)
def test_a_platform_that_is_not_there_is_a_sentence(platforms: str, joining: tuple[str, ...]) -> None:
    """Also in a process that was joined to others, which knows its number though it has no device."""
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
    joining = tuple(option.format(port=port) for option in joining)
    last = run_command(platforms, "generate", "--random", "tiny", "hello", *joining)
    assert last.startswith(f"grokjax: error: JAX_PLATFORMS={platforms} asks for devices that JAX cannot find"), last
    assert last.endswith("or set it to cpu.")


def test_a_conversion_without_devices_begins_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(SMALL.to_json())
    last = run_command(
        "cuda", "convert", str(tmp_path), str(tmp_path / "new"), "--config", str(tmp_path / "config.json")
    )
    assert last.startswith("grokjax: error: JAX_PLATFORMS=cuda asks for devices that JAX cannot find"), last
    assert not (tmp_path / "new").exists()


def test_what_jax_refuses_is_not_said_to_be_short_of_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Disallowed host-to-device transfer.")

    monkeypatch.setattr("grokjax.cli.model.init", refuse)
    assert main(["generate", "--random", "tiny", "hello"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "grokjax: error: the model failed: INVALID_ARGUMENT: Disallowed host-to-device transfer."
