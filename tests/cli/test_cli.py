"""The command line: what goes to which stream, exit statuses, and the main job from files to text."""

import contextlib
import functools
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from builders import TINY_DENSE
from fake_steps import FakeModel, FakeSteps
from goldens import GOLDEN_DIR, load_e2e

from grokjax import Grok, __version__, load_tokenizer
from grokjax.cli import main
from grokjax.engine import Engine
from grokjax.quantization import QuantizedTable
from grokjax.testing import write_release_checkpoint

E2E = GOLDEN_DIR / "e2e"
SMALL = TINY_DENSE.replace(max_seq_len=32)
LONG = 400 * "9"
INTEGERS = ("--seed", "--top-k", "--max-len", "--guesses")


@pytest.fixture(scope="module")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(SMALL.to_json())
    return path


@pytest.mark.release_tokenizer
def test_the_release_s_files_give_the_release_s_text(release_tokenizer_path: Path) -> None:
    """The release's files and tokenizer in, the release's text out behind the prompt, in a process of its own."""
    request, tokenizer = load_e2e().requests[0], load_tokenizer(release_tokenizer_path)
    command = [
        sys.executable,
        "-m",
        "grokjax",
        "generate",
        "--checkpoint",
        str(E2E),
        "--config",
        str(E2E / "config.json"),
    ]
    command += ["--tokenizer", str(release_tokenizer_path), "--temperature", "0.01", "--top-p", "1.0", "--seed", "42"]
    command += ["--max-new-tokens", str(request["max_len"]), "--ignore-eos", request["prompt"]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert request["prompt"] + done.stdout == tokenizer.decode(request["prompt_ids"] + request["token_ids"]) + "\n"
    assert re.search(r"loaded .*\d [kM]?B/s", done.stderr)
    assert "16 tokens" in done.stderr


@pytest.mark.release_tokenizer
@pytest.mark.thorough
def test_every_greedy_text_is_the_release_s(release_tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(release_tokenizer_path)
    requests = [r for r in load_e2e().requests if r["temperature"] == 0.01 and r["strict_identical"]]
    assert len(requests) == 7
    for request in requests:
        command = ["generate", "--checkpoint", str(E2E), "--config", str(E2E / "config.json")]
        command += ["--tokenizer", str(release_tokenizer_path), "--temperature", "0.01", "--top-p", "1"]
        command += ["--seed", str(request["rng_seed"]), "--max-new-tokens", str(request["max_len"])]
        assert main([*command, "--ignore-eos", "--", request["prompt"]]) == 0
        # The release gives two tokens where one is asked for.
        expected = tokenizer.decode(request["prompt_ids"] + request["token_ids"][: request["max_len"]])
        assert request["prompt"] + capsys.readouterr().out == expected + "\n"


def test_a_random_model_says_so_and_is_the_same_on_every_mesh(
    small_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--random", str(small_config), "--max-new-tokens", "3", "--temperature", "0", "--ignore-eos"]
    assert main([*command, "--mesh", "1,1", "hello"]) == 0
    first = capsys.readouterr()
    assert "the weights are random" in first.err
    assert "1 x cpu (of 8), mesh 1 x 1, int8 weights, bfloat16" in first.err
    assert "3 tokens" in first.err
    assert "random" not in first.out
    with jax.default_device(None):
        assert main([*command, "hello"]) == 0
    second = capsys.readouterr()
    assert "8 x cpu, mesh 1 x 8, int8 weights, bfloat16" in second.err
    assert second.out == first.out


def test_stop_strings_end_the_text(small_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--random", str(small_config), "--max-new-tokens", "9", "--ignore-eos", "--mesh", "1,1"]
    assert main([*command, "hello"]) == 0
    whole = capsys.readouterr()
    assert "1 x cpu (of 8), mesh 1 x 1, int8 weights, bfloat16" in whole.err
    text = whole.out.removesuffix("\n")
    stop = text[2:4]
    assert main([*command, "--stop", "never there", f"--stop={stop}", "hello"]) == 0
    stopped = capsys.readouterr()
    assert stopped.out == text[: text.find(stop)] + "\n"
    assert "9 tokens" not in stopped.err


def test_a_tokenizer_beside_the_checkpoint_is_found(
    trained_tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_release_checkpoint(tmp_path / "ckpt-0", SMALL, scale_blocks=1)
    (tmp_path / "config.json").write_text(SMALL.to_json())
    command = ["generate", "--checkpoint", str(tmp_path), "--config", str(tmp_path / "config.json")]
    command += ["--max-new-tokens", "2", "--mesh", "1,1", "--add-bos", "hello"]
    assert main(command) == 2
    assert "name the release's tokenizer.model with --tokenizer" in capsys.readouterr().err
    (tmp_path / "tokenizer.model").write_bytes(trained_tokenizer_path.read_bytes())
    assert main(command) == 0
    assert "2 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random", "huge", "hi"], "--random huge: neither a file nor one of tiny, bench_1b, grok_1"),
        (["--random", "tiny", ""], "the prompt is empty"),
        (["--random", "tiny", "--mesh", "8", "hi"], "--mesh '8': give two numbers between 1 and 32768"),
        (["--random", "tiny", "--mesh", "1,64", "hi"], "needs 64 devices and there are 8"),
        (["--random", "tiny", "--mesh", "1,3", "hi"], "does not divide num_heads=8"),
        (["--random", "tiny", "--temperature", "-1", "hi"], "temperature"),
        (["--random", "tiny", "--tokenizer", "nowhere.model", "hi"], "nowhere.model"),
        (["--checkpoint", "nowhere", "--tokenizer", "x", "hi"], "nowhere"),
        (["--checkpoint", str(E2E), "--tokenizer", "x", "hi"], "there is no tokenizer file 'x'"),
        (
            ["--checkpoint", str(E2E), "--tokenizer", "x", "--config", "nowhere.json", "hi"],
            "nowhere.json: cannot be read",
        ),
    ],
    ids=str,
)
def test_errors_are_sentences(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "words",
    [
        *((f"generate --random tiny hi {option}", number) for option in INTEGERS for number in (LONG, f"-{LONG}")),
        *((f"generate --random tiny hi {option}", f"-{LONG}") for option in ("--max-new-tokens", "--cpu-devices")),
        *((f"generate --random tiny hi {option}", "x" + LONG) for option in ("--seed", "--temperature")),
        ("generate --random tiny hi --seed", 12 * LONG),  # which Python does not even read
        ("generate --random tiny hi --mesh", f"1,{LONG}"),
        ("generate --random tiny hi --coordinator a:1 --process-id 0 --num-processes", f"-{LONG}"),
        ("generate --random tiny hi --coordinator a:1 --num-processes 1 --process-id", LONG),
        ("generate --random tiny hi --coordinator a:1 --num-processes 1 --process-id 0 --heartbeat", f"-{LONG}"),
        *((f"plan --config tiny {option}", LONG) for option in ("--batch", "--max-len", "--devices", "--mesh")),
        *((f"plan --config tiny {option}", f"-{LONG}") for option in ("--prompt", "--prefill-rows")),
        ("plan --config tiny --target", f"cpu:{LONG}"),
        ("make-release-fixture new --scale-blocks", LONG),
        ("make-release-fixture new --layers", LONG),
        ("make-release-fixture new --seed", f"-{LONG}"),
    ],
    ids=lambda words: f"{words[0].split()[0]} {words[0].split()[-1]} {words[1][:2]}",
)
def test_a_number_of_400_digits_is_repeated_in_short(
    words: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        assert main([*words[0].split(), words[1]]) == 2
    assert 20 < len(capsys.readouterr().err.splitlines()[-1]) < 320


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hi", "--seed", "4294967296"], "seed=4294967296 must be an integer between 0 and"),
        (["hi", "--max-new-tokens", "0"], "max_new_tokens=0 must be an integer, 1 or more"),
        (["hi", "--top-k", "-1"], "top_k=-1"),
        (["hi", "--guesses", "-1"], "--guesses=-1 must be an integer between 0 and 31"),
        (["hi", "--stop", ""], "stop=[''] must be strings of at least one character"),
        (["hi", "--top-p", "2"], "top_p=2.0 must be a number, from 0 to 1"),
        (["a" * 32], "the prompt has 32 tokens and at most 31"),
        (["hi", "--config", "nowhere.json"], "--config goes with --checkpoint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_requests_are_refused_before_the_model_is_made(
    arguments: list[str],
    message: str,
    small_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("grokjax.cli.model.init", lambda *_, **__: pytest.fail("the model was made"))
    assert main(["generate", "--random", str(small_config), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_tokenizer_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_release_checkpoint(tmp_path / "ckpt-0", SMALL, scale_blocks=1)
    (tmp_path / "config.json").write_text(SMALL.to_json())
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    monkeypatch.setattr("grokjax.cli.model.load", lambda *_, **__: pytest.fail("the model was loaded"))
    command = ["generate", "--checkpoint", str(tmp_path), "--config", str(tmp_path / "config.json"), "hi"]
    assert main(command) == 2
    assert "is not a SentencePiece model" in capsys.readouterr().err


def test_a_binary_configuration_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.bin"
    path.write_bytes(b"\xff\xfe")
    assert main(["generate", "--random", str(path), "hi"]) == 2
    assert f"--random {path}: not JSON" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(
    small_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("grokjax.cli.model.init", interrupt)
    assert main(["generate", "--random", str(small_config), "hello"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failing", "error", "message"),
    [
        (
            "model.init",
            MemoryError(),
            "the model failed: MemoryError. If memory was short, give it a smaller --max-len.",
        ),
        (
            "generate.Engine.stream",
            jax.errors.JaxRuntimeError("INTERNAL: no.\nDetails"),
            "the model failed: INTERNAL: no. If memory was short, give it a smaller --max-len.",
        ),
    ],
)
def test_a_model_that_fails_is_a_sentence(
    failing: str,
    error: Exception,
    message: str,
    small_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"grokjax.cli.{failing}", fail)
    assert main(["generate", "--random", str(small_config), "hello"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"grokjax: error: {message}"


@pytest.mark.parametrize(
    ("what", "rows", "smaller"),
    [
        (["hello"], "--max-len 8192", "a smaller --max-len"),
        (
            ["--prompts", "prompts.txt", "--output", "out.jsonl"],
            "--slots 8 and --max-len 8192",
            "fewer --slots or a smaller",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_any_of_it_is_made(
    what: list[str],
    rows: str,
    smaller: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("hello")
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=24 << 30))
    made = []
    monkeypatch.setattr("grokjax.cli.model.init", lambda *_, **options: made.append(options) or sys.exit(3))
    assert main(["generate", "--random", "grok_1", *what]) == 2
    shown = capsys.readouterr().err
    assert re.search(rf"the model with {rows} needs \d+\.\d GiB on one device \(cpu\), and 24\.0 GiB is left", shown)
    assert f"{smaller}" in shown
    assert "--allow-oom" in shown
    assert not made
    with pytest.raises(SystemExit, match="3"):
        main(["generate", "--random", "grok_1", "--allow-oom", *what])
    assert made[0]["allow_oom"] is True


def test_usage_errors_end_with_2_and_the_version_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "hello"])
    assert "--checkpoint --random is required" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"grokjax {__version__}\n"


def test_no_option_is_taken_by_its_beginning_alone(small_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--prompt` would else be `--prompts`."""
    for command, option in (
        (["generate", "--random", str(small_config)], "--prompt"),
        (["plan", "--config", "tiny"], "--mes"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*command, option, "hello"])
        assert f"unrecognized arguments: {option}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["genrate", "--random", "tiny"], "genrate is no command: did you mean generate?"),
        (
            ["generate", "--random", "tiny", "--prompst", "x"],
            "--prompst is no option of generate: did you mean --prompts?",
        ),
        (["generate", "--checkpont=x", "hi"], "--checkpont is no option of generate: did you mean --checkpoint?"),
        (["plan", "--sugest"], "--sugest is no option of plan: did you mean --suggest?"),
        (["--verison"], "--verison is no option: did you mean --version?"),
        (["generate", "--random", "tiny", "--zzzz", "hi"], None),
        (["generate", "--", "--prompst"], None),
    ],
    ids=str,
)
def test_a_mistyped_word_is_told_what_it_is_close_to(
    words: list[str], meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    said = [line for line in capsys.readouterr().err.splitlines() if "did you mean" in line]
    assert said == ([] if meant is None else [f"grokjax: error: {meant}"])


@pytest.mark.thorough
def test_a_reader_may_leave(small_config: Path) -> None:
    """`grokjax ... | head -c 1` ends quietly."""
    command = f"{sys.executable} -m grokjax generate --random {small_config} --max-new-tokens 20 hello | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_a_terminal_may_lack_the_characters(
    small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--random", str(small_config), "--mesh", "1,1", "--max-new-tokens", "20", "--ignore-eos"]
    assert main([*command, "hello"]) == 0
    whole = capsys.readouterr()
    assert "20 tokens" in whole.err
    assert not whole.out.isascii()
    with (tmp_path / "out.txt").open("w", encoding="ascii") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main([*command, "hello"]) == 0
    assert "20 tokens" in capsys.readouterr().err
    assert len((tmp_path / "out.txt").read_text(encoding="ascii")) == len(whole.out)


@pytest.mark.parametrize("is_batch", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_int8_is_passed_on_for_the_cache_and_the_table(
    is_batch: bool, small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    create = Grok.new_cache

    def noted(*arguments, **options):
        assert isinstance(arguments[0].embedding.table.get_value(), QuantizedTable)
        made.append(create(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(Grok, "new_cache", noted)
    (tmp_path / "prompts.txt").write_text("hi")
    what = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out.jsonl")] if is_batch else ["hi"]
    options = [
        "--mesh",
        "1,1",
        "--max-len",
        "16",
        "--max-new-tokens",
        "2",
        "--cache-dtype",
        "int8",
        "--quantized-table",
    ]
    assert main(["generate", "--random", str(small_config), *options, *what]) == 0
    assert [cache.keys.dtype.name for cache in made] == ["int8"]


@pytest.mark.parametrize("guesses", [0, 7])
def test_the_steps_that_guess_are_compiled_before_the_first_token_and_the_right_guesses_counted(
    guesses: int, small_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, compiled = FakeModel(SMALL, repeats=True), list[int]()
    monkeypatch.setattr("grokjax.cli.model.init", lambda *_, **__: model)
    monkeypatch.setattr("grokjax.engine.text.Engine", functools.partial(Engine, make_steps=FakeSteps))
    monkeypatch.setattr("grokjax.cli.generate.write", lambda _: compiled.append(len(model.steps.compiled)))
    options = ["--max-new-tokens", "25", "--ignore-eos", "--guesses", str(guesses)]
    assert main(["generate", "--random", str(small_config), "--mesh", "1,1", *options, "hi"]) == 0
    assert compiled == [len(model.steps.compiled)] * 27  # the tokens, what the decoder held back, the end of the line
    shapes = [shape for name, shape in model.steps.compiled if name == "decode_guesses"]
    assert sorted(shapes) == ([(1, 1), (1, 4), (1, 8)] if guesses else [])  # several are compiled at a time
    said = capsys.readouterr().err.splitlines()[-1]
    hits = r"; [1-9]\d* of [1-9]\d* guesses were right" if guesses else ""
    rate = r"25 tokens; the first after [\d.]+ s with compilation, then [\d.]+ tokens/s"
    assert re.fullmatch(f"grokjax: {rate}{hits}", said)
