"""The command `fastsae`. Its help, and that of every command, is there before torch is: commands import what they need."""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "train": "train an SAE; without arguments on the small language model that comes along",
    "eval": "what an SAE does on activations, and to the language model they come from",
    "convert": "write an SAE in another library's format",
    "plot": "pictures and a table of runs",
    "plan": "what fits into a memory, and how fast it could be",
    "doctor": "what this machine and its packages can do",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for what the user can mend, 128 + signal after an interruption."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version"):
        from .. import __version__

        print(f"fastsae {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"pass one of {', '.join(COMMANDS)}"
        print(f"fastsae: unknown command {command!r}: {hint}", file=sys.stderr)
        return 2
    try:
        import_module(f".{command}", __name__).main(rest)
    except SystemExit as left:  # an argument parser's
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except (ValueError, TypeError, OSError, MemoryError, ArithmeticError, ModuleNotFoundError) as error:
        if os.environ.get("FASTSAE_TRACEBACK"):
            raise
        print(f"fastsae {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        if type(error).__name__ != "Interrupted":
            raise
        from ..interrupt import exit_code

        print(f"fastsae {command}: {error}; the same command goes on", file=sys.stderr)
        return exit_code(error.signum)  # type: ignore[attr-defined]
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "Sparse autoencoders at the speed of their encoder's GEMM.",
            "",
            "usage: fastsae COMMAND [--help] ...",
            "",
            *lines,
            "",
            "With FASTSAE_TRACEBACK=1 errors show where they come from.",
        ]
    )


def run() -> None:
    """The console script."""
    sys.exit(main())
