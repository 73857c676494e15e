"""The floor of every test: 8 simulated CPU devices, strict dtypes and ranks, one cache of compiled programs.

And the fixtures that tests of several folders share: tokenizers, a release at full size.
"""

import gc
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# All of these must be set before jax is imported, which any test module may be the first to do. The workers of a run
# and the programs that tests start inherit them.
ROOT = Path(__file__).resolve().parents[1]
_DEVICES, _OPTIMIZATION = "--xla_force_host_platform_device_count", "--xla_backend_optimization_level"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = [os.environ.get("XLA_FLAGS", "")]
if _DEVICES not in _flags[0]:
    _flags.append(f"{_DEVICES}=8")
# Programs are compiled without optimisation, which takes half the time. Whoever names a level gets it, all else too.
if _OPTIMIZATION not in _flags[0]:
    _flags += [f"{_OPTIMIZATION}=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if importlib.metadata.version("jaxlib") < "0.11":  # later ones do not know it, and stop at what they do not know
        _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_flags).strip()
# A model that is given no mesh lies on one device, and not on all eight: it takes less to compile.
os.environ.setdefault("JAX_DEFAULT_DEVICE", "cpu")
# Operations carry no tracebacks to where the package made them: it takes a tenth less to trace and to compile.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# The checkout's own package and the modules beside this file, also where another grokjax is installed.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
sys.path.append(str(ROOT / "docs"))  # the commands that make pages, some of which are tested
# What one process has compiled, no other compiles again. A folder that is named outlives the run, and the next one is
# faster.
_own_cache = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _own_cache = tempfile.TemporaryDirectory(prefix="grokjax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _own_cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import make_notebooks
import pytest
import sentencepiece
from builders import write_full_release
from jax.experimental.compilation_cache import compilation_cache

from grokjax.tokenizer import SentencePieceTokenizer

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples at each run where a failure must be repeatable; elsewhere new ones, which find new bugs.
hypothesis.settings.register_profile(
    "grokjax", deadline=None, max_examples=50, database=None, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.load_profile("grokjax")


def pytest_configure(config: pytest.Config) -> None:
    if _own_cache is not None:
        config.add_cleanup(_own_cache.cleanup)


def pytest_sessionstart() -> None:
    found = len(jax.devices("cpu"))
    if found != 8:
        raise pytest.UsageError(
            f"the tests need 8 simulated CPU devices, jax has {found}: unset XLA_FLAGS, or put {_DEVICES}=8 into it."
        )


def pytest_collection_finish() -> None:
    """JAX makes many small objects, and Python's collector walks through all that live whenever some more were made.

    It took a twelfth of the time. What is here now stays to the end; of what comes, the collector waits for more.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs() -> Iterator[None]:
    """Each compiled program keeps memory maps, of which a process may have 65530: a whole run has more programs."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_afresh() -> Iterator[None]:
    """For a module that reads what the compiler made: a program from the cache on disk may have less to tell."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def release_tokenizer() -> Path | None:
    """The release's `tokenizer.model`: what GROKJAX_TOKENIZER names, else beside the checkout, in `shared/tokenizer/`.

    None if there is none.

    Raises:
      UsageError: GROKJAX_TOKENIZER names what is not a file.
    """
    named = os.environ.get("GROKJAX_TOKENIZER")
    if named and not Path(named).is_file():
        raise pytest.UsageError(f"GROKJAX_TOKENIZER={named!r} is not a file: set it to the release's tokenizer.model.")
    path = Path(named) if named else ROOT.parent / "shared" / "tokenizer" / "tokenizer.model"
    return path if path.is_file() else None


# Of markers whose tests need an extra: the extra, and whether it is installed.
EXTRAS = {
    "harness": ("eval", importlib.util.find_spec("lm_eval") is not None),
    "notebook": ("notebooks", make_notebooks.missing_package() is None),
}


def pytest_report_header() -> list[str]:
    packages = ("jax", "jaxlib", "flax", "orbax-checkpoint", "sentencepiece", "numpy")
    found = release_tokenizer()
    return [
        ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages),
        f"release tokenizer: {found or 'none; its tests are deselected, set GROKJAX_TOKENIZER to run them'}",
        *(
            f"extra {extra}: {'installed' if is_installed else f'none; for its tests install .[{extra}]'}"
            for extra, is_installed in EXTRAS.values()
        ),
    ]


# Workers take whole files in this order: one that takes long and is begun last would be waited for.
SLOWEST_FIRST = (
    "test_notebooks",
    "test_distributed",
    "test_docs",
    "test_contexts",
    "test_edit",
    "test_engine_model",
    "test_model_goldens",
    "test_conversion",
    "test_tap",
    "test_compiled_steps",
    "test_settings",
    "test_plans",
    "test_compiler",
    "test_sampling",
    "test_run_py",
    "test_harness",
    "test_saving",
    "test_resuming",
    "test_streams",
    "test_carrying",
    "test_streaming",
    "test_independence",
    "test_cli_plan",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    lacking = [] if release_tokenizer() else ["release_tokenizer"]
    lacking += [marker for marker, (_, is_installed) in EXTRAS.items() if not is_installed]
    absent = [item for item in items if any(item.get_closest_marker(name) for name in lacking)]
    config.hook.pytest_deselected(items=absent)
    items[:] = [item for item in items if item not in absent]


@pytest.fixture(scope="session")
def release_tokenizer_path() -> Path:
    """The release's `tokenizer.model`, for tests marked `release_tokenizer`: without the file they are deselected."""
    path = release_tokenizer()
    assert path is not None, "mark this test with pytest.mark.release_tokenizer"
    return path


@pytest.fixture(scope="session")
def trained_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 512 pieces, made with the release's settings: special ids, byte pieces, dummy prefix."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    spaces, newlines = (" " * n for n in range(2, 17)), ("\n" * n for n in range(1, 11))
    markers = ["<|separator|>", "<|mask|>", *(f"<|control{n}|>" for n in range(1, 5))]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter((ROOT / "LICENSE").read_text().splitlines()),
            model_writer=file,
            model_type="bpe",
            vocab_size=512,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece="[PAD]",
            bos_piece="[BOS]",
            eos_piece="[EOS]",
            unk_piece="[UNK]",
            unk_surface="[UNK]",
            user_defined_symbols=[*newlines, *"0123456789", "\t", *spaces, *markers],
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    return path


@pytest.fixture(scope="session")
def trained_tokenizer(trained_tokenizer_path: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(trained_tokenizer_path)


@pytest.fixture(scope="session")
def full_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a release at full size, which takes hardly any room."""
    folder = tmp_path_factory.mktemp("full") / "ckpt-0"
    folder.mkdir()
    write_full_release(folder)
    return folder
