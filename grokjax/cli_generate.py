"""`grokjax generate`: continues a prompt, text to standard output as it is made."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from grokjax import ByteTokenizer, Grok, GrokConfig, TextGenerator, Tokenizer, init, load, load_tokenizer
from grokjax.console import ProgressLine, choose_mesh, read_config, say
from grokjax.layouts import open_checkpoint
from grokjax.sampling import SampleSettings
from grokjax.stored import Checkpoint
from grokjax.text import check_limits, encode_prompt

_PRESETS = {"tiny": GrokConfig.tiny, "bench_1b": GrokConfig.bench_1b, "grok_1": GrokConfig.grok_1}


def add_command(commands: Any) -> None:
    """Adds the command to the subparsers of `grokjax`."""
    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continues a prompt. The text goes to standard output, everything else to standard error.",
    )
    generate.add_argument("prompt", help="the text to continue")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="DIR", type=Path, help="a checkpoint of any layout")
    source.add_argument(
        "--random", metavar="NAME_OR_FILE", help="random weights: tiny, bench_1b, grok_1 or a configuration file"
    )
    generate.add_argument(
        "--config", metavar="FILE", type=Path, help="our JSON or the release's names; not needed for the released model"
    )
    generate.add_argument(
        "--tokenizer",
        metavar="FILE",
        type=Path,
        help="tokenizer.model (default: the one beside the checkpoint); or bytes, for checkpoints without a tokenizer",
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
    generate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
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
    say("compiling the first steps")
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
    say(f"{num_tokens} tokens; the first after {times[0] - start:.1f} s with compilation{rate}")


def _random_config(arguments: argparse.Namespace) -> GrokConfig:
    name = arguments.random
    if arguments.config is not None:
        raise ValueError("--config goes with --checkpoint: give a configuration file to --random itself.")
    if name not in _PRESETS and not Path(name).is_file():
        raise ValueError(f"--random {name}: neither a file nor one of {', '.join(_PRESETS)}.")
    return _PRESETS[name]() if name in _PRESETS else read_config("--random", Path(name))


def _random_model(config: GrokConfig, arguments: argparse.Namespace) -> Grok:
    say(f"the weights are random ({arguments.random}): expect noise")
    return init(config, mesh=choose_mesh(arguments.mesh, config), dtype=jnp.dtype(arguments.dtype))


def _open_checkpoint(arguments: argparse.Namespace) -> Checkpoint:
    config = None if arguments.config is None else read_config("--config", arguments.config)
    return open_checkpoint(arguments.checkpoint, config)


def _load_model(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Grok:
    return load(
        checkpoint.path,
        checkpoint.config,
        choose_mesh(arguments.mesh, checkpoint.config),
        jnp.dtype(arguments.dtype),
        progress=ProgressLine("loaded"),
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
    return ByteTokenizer(config.vocab_size) if path in (None, Path("bytes")) else load_tokenizer(path)
