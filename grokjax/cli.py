"""The command line: `python -m grokjax generate`. Text goes to standard output, everything else to standard error."""

import argparse
import importlib.metadata
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grokjax import ByteTokenizer, Grok, GrokConfig, TextGenerator, Tokenizer, init, load, load_tokenizer, make_mesh
from grokjax.release import ReleaseCheckpoint, open_release
from grokjax.sampling import SampleSettings
from grokjax.text import check_limits, encode_prompt

_PRESETS = {"tiny": GrokConfig.tiny, "bench_1b": GrokConfig.bench_1b, "grok_1": GrokConfig.grok_1}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 2 for a user's error, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of few characters must not end the run
    try:
        return _generate(arguments)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        # Nobody reads on; what Python would still flush at its exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        _say(f"error: {error}")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grokjax", description="Grok-1 in JAX.")
    parser.add_argument("--version", action="version", version=f"grokjax {importlib.metadata.version('grokjax')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continues a prompt. The text goes to standard output, everything else to standard error.",
    )
    generate.add_argument("prompt", help="the text to continue")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="DIR", type=Path, help="the release's files, or the folder of ckpt-0")
    source.add_argument(
        "--random", metavar="NAME_OR_FILE", help="random weights: tiny, bench_1b, grok_1 or a configuration file"
    )
    generate.add_argument(
        "--config", metavar="FILE", type=Path, help="our JSON or the release's names; not needed for the released model"
    )
    generate.add_argument(
        "--tokenizer", metavar="FILE", type=Path, help="tokenizer.model; by default the one beside the checkpoint"
    )
    generate.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    generate.add_argument("--top-p", type=float, default=1.0, help="probability mass kept (default: %(default)s, all)")
    generate.add_argument("--top-k", type=int, default=0, help="tokens kept (default: %(default)s, all)")
    generate.add_argument("--min-p", type=float, default=0.0, help="least probability, of the largest (default: 0)")
    generate.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    generate.add_argument("--max-new-tokens", type=int, default=128, help="(default: %(default)s)")
    generate.add_argument("--mesh", metavar="DATA,MODEL", help="devices (default: 1,N with all N devices that divide)")
    generate.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)")
    generate.add_argument("--add-bos", action="store_true", help="begin with the beginning-of-sequence token")
    generate.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-sequence token")
    return parser


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.random:
        config = _random_config(arguments)
        tokenizer = _tokenizer(config, arguments.tokenizer)
        _check_request(config, tokenizer, arguments)
        model = _random_model(config, arguments)
    else:
        path = _find_tokenizer(arguments.checkpoint, arguments.tokenizer)
        checkpoint = _open_checkpoint(arguments)
        tokenizer = _tokenizer(checkpoint.config, path)
        _check_request(checkpoint.config, tokenizer, arguments)
        model = _load_model(checkpoint, arguments)
    _stream(TextGenerator(model, tokenizer, add_bos=arguments.add_bos), arguments)
    return 0


def _check_request(config: GrokConfig, tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
    """Refuses now what `stream` would refuse after the model has loaded, which takes minutes."""
    check_limits(max_new_tokens=arguments.max_new_tokens, seed=arguments.seed)
    SampleSettings.create(
        1,
        temperature=arguments.temperature,
        nucleus_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
    )
    encode_prompt(tokenizer, arguments.prompt, max_len=config.max_seq_len, add_bos=arguments.add_bos)


def _stream(generator: TextGenerator, arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    pieces = generator.stream(
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
    )
    _say("compiling the first steps")
    times = []
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        times.append(time.perf_counter())
    sys.stdout.write("\n")
    sys.stdout.flush()
    num_tokens = len(times) - 1  # the last piece is what the decoder held back
    # The first steps compile; the rate is that of the others.
    rate = f", then {(num_tokens - 2) / (times[-2] - times[1]):.1f} tokens/s" if num_tokens > 8 else ""
    _say(f"{num_tokens} tokens; the first after {times[0] - start:.1f} s with compilation{rate}")


def _random_config(arguments: argparse.Namespace) -> GrokConfig:
    name = arguments.random
    if arguments.config is not None:
        raise ValueError("--config goes with --checkpoint: give a configuration file to --random itself.")
    if name not in _PRESETS and not Path(name).is_file():
        raise ValueError(f"--random {name}: neither a file nor one of {', '.join(_PRESETS)}.")
    return _PRESETS[name]() if name in _PRESETS else _read_config("--random", Path(name))


def _random_model(config: GrokConfig, arguments: argparse.Namespace) -> Grok:
    _say(f"the weights are random ({arguments.random}): expect noise")
    return init(config, mesh=_mesh(arguments.mesh, config), dtype=jnp.dtype(arguments.dtype))


def _open_checkpoint(arguments: argparse.Namespace) -> ReleaseCheckpoint:
    config = None if arguments.config is None else _read_config("--config", arguments.config)
    return open_release(arguments.checkpoint, config)


def _load_model(checkpoint: ReleaseCheckpoint, arguments: argparse.Namespace) -> Grok:
    return load(
        checkpoint.path,
        checkpoint.config,
        _mesh(arguments.mesh, checkpoint.config),
        jnp.dtype(arguments.dtype),
        progress=_LoadProgress(),
    )


def _read_config(option: str, path: Path) -> GrokConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path} is not a text file: give a JSON configuration.") from error
    return GrokConfig.from_json(text)


def _mesh(text: str | None, config: GrokConfig) -> Mesh:
    if text is None:
        return make_mesh((1, _widest_model_axis(config, jax.device_count())))
    try:
        data, model = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--mesh {text}: give two numbers, such as 1,8.") from None
    return make_mesh((data, model))


def _widest_model_axis(config: GrokConfig, num_devices: int) -> int:
    """The most devices that divide everything that tensor parallelism splits."""
    kv_heads = config.num_kv_heads
    return max(
        n
        for n in range(1, num_devices + 1)
        if not (config.num_heads % n or config.ffn_dim % n or config.vocab_size % n)
        and (kv_heads % n == 0 or n % kv_heads == 0)
    )


def _find_tokenizer(checkpoint: Path, given: Path | None) -> Path:
    if given is not None:
        return given
    found = [folder / "tokenizer.model" for folder in (checkpoint, checkpoint.absolute().parent)]
    for path in found:
        if path.is_file():
            return path
    raise ValueError(f"there is no {found[0]} and no {found[1]}: name the release's tokenizer.model with --tokenizer.")


def _tokenizer(config: GrokConfig, path: Path | None) -> Tokenizer:
    return ByteTokenizer(config.vocab_size) if path is None else load_tokenizer(path)


class _LoadProgress:
    """Says how many bytes are loaded, at what rate, and how long the rest takes."""

    def __init__(self) -> None:
        self.start = self.said = time.perf_counter()

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self.said < 1 and done < total:
            return
        self.said = now
        rate = done / (now - self.start)
        left = f"{rate / 1e9:.2f} GB/s, {(total - done) / rate:.0f} s left"
        _say(f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {left}: {name}")


def _say(text: str) -> None:
    print(f"grokjax: {text}", file=sys.stderr, flush=True)
