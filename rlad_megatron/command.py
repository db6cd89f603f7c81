"""What `rlad` and `rlad-nemo` share."""

from __future__ import annotations

import argparse
import contextlib
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

from rlad_megatron.errors import USER_ERROR


class CommandParser(argparse.ArgumentParser):
    """Prints its errors as one line, like every other error the user can fix."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"rlad: {message}; `{self.prog} --help` describes it\n")


def add_command(commands: Any, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """A command named like its function, whose docstring is its help."""
    summary, _, details = inspect.cleandoc(run.__doc__ or "").partition("\n")
    help = summary[0].lower() + summary[1:].removesuffix(".")
    command = commands.add_parser(run.__name__.strip("_"), help=help, description=f"{summary} {details}")
    command.set_defaults(run=run)
    return command


def print_out(text: str) -> None:
    """Print a command's result. A closed pipe, as in `rlad show RECIPE | head -1`, is not an error."""
    with contextlib.suppress(BrokenPipeError):
        print(text, end="", flush=True)
