"""The command line: `python -m grokjax`. Results go to standard output, everything else to standard error."""

import argparse
import difflib
import functools
import itertools
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax

from grokjax import __version__
from grokjax.cli import checkpoints, evaluate, generate, plan, score
from grokjax.cli.console import messages, say, say_error, set_level
from grokjax.cli.options import tell_of_options
from grokjax.cli.streams import ReaderLeft, standard_streams, write
from grokjax.distributed import DistributedError, sharing_errors
from grokjax.errors import first_line

# Characters of a word of the command line that an error repeats.
_LONGEST_WORD = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    Returns:
      0 if all is done, or the reader of the text has left; 1 for errors among results, 2 for a user's error, 130 if it
      was interrupted.
    """
    _drop_late_callbacks()
    with standard_streams(), messages():
        try:
            arguments = _arguments(argv)
            set_level(arguments.level)
            with sharing_errors():
                return arguments.run(arguments) or 0
        except KeyboardInterrupt as interrupt:
            say(str(interrupt) or "interrupted")
            return 130
        except ReaderLeft:
            return 0
        except (ValueError, OSError, DistributedError) as error:
            say_error(error)
            return 2
        except (RuntimeError, AssertionError) as error:
            if _has_devices():
                raise
            say_error(ValueError(_no_devices(error)))
            return 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser, commands = _parser()
    try:
        return parser.parse_args(argv)
    except SystemExit as ended:
        if ended.code:
            _say_what_was_meant(sys.argv[1:] if argv is None else argv, parser, commands)
            tell_of_options(argv)
        raise
    finally:
        write("")  # a help text is written, or cannot be, before the process ends with 0


def _has_devices() -> bool:
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):  # the second, without a word, where there is a plugin and no device
        return False


def _no_devices(error: Exception) -> str:
    asked, reason = jax.config.values["jax_platforms"], f" ({first_line(error)})" if str(error) else ""
    return (
        f"JAX_PLATFORMS={asked} asks for devices that JAX cannot find on this machine{reason}; its processor, cpu, is "
        "always there: leave JAX_PLATFORMS unset to use the best that JAX finds, or set it to cpu."
    )


class _Parser(argparse.ArgumentParser):
    """A parser, of the command or of a part of it, that takes no option by its beginning alone."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Ends the command; of a long word, such as a number of 400 digits, only the beginning and the end are said."""
        words = (word if len(word) <= _LONGEST_WORD else f"{word[:20]}...{word[-20:]}" for word in message.split(" "))
        super().error(" ".join(words))

    @property
    def options(self) -> list[str]:
        """The options that it takes."""
        return list(self._option_string_actions)


def _parser() -> tuple[_Parser, Mapping[str, _Parser]]:
    """The parser of a command line, and those of the commands by name."""
    parser = _Parser(prog="grokjax", description="Grok-1 in JAX.")
    parser.add_argument("--version", action="version", version=f"grokjax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate.add_command(commands)
    score.add_command(commands)
    evaluate.add_command(commands)
    checkpoints.add_commands(commands)
    plan.add_command(commands)
    for command in commands.choices.values():
        _add_level(command)
    return parser, commands.choices


def _say_what_was_meant(words: Sequence[str], parser: _Parser, commands: Mapping[str, _Parser]) -> None:
    """Names what a mistyped command or option is close to: `argparse` does so in some versions, of commands alone.

    Args:
      words: those of a command line that could not be read.
      parser: of the command line.
      commands: the parsers of the commands by name.
    """
    name = next((word for word in words if not word.startswith("-")), None)
    if name is not None and name not in commands:
        _say_close(name, "command", list(commands))
        return
    known = parser.options if name is None else commands[name].options
    of = "" if name is None else f" of {name}"
    for word in itertools.takewhile(lambda word: word != "--", words):
        if word.startswith("-"):
            _say_close(word.partition("=")[0], f"option{of}", known)


def _say_close(word: str, kind: str, known: Sequence[str]) -> None:
    close = difflib.get_close_matches(word, known, n=1)
    if close and word not in known:
        say_error(ValueError(f"{word} is no {kind}: did you mean {close[0]}?"))


def _add_level(command: argparse.ArgumentParser) -> None:
    command.set_defaults(level=logging.INFO)
    level = command.add_mutually_exclusive_group()
    constant = functools.partial(level.add_argument, dest="level", action="store_const")
    constant("-v", "--verbose", const=logging.DEBUG, help="name every array that is read or written, too")
    constant("-q", "--quiet", const=logging.WARNING, help="show no progress: only warnings and errors")


@functools.cache
def _drop_late_callbacks() -> None:
    """Once one array of a write has failed, the library's thread that ends another finds the event loop gone.

    The error of the write itself is raised and told; the traceback of that thread would bury it.
    """
    following = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            following(unraisable)

    sys.unraisablehook = hook
