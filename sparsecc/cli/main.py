"""Entry point of the ``sparsecc`` command: finds the verb, turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import logging
import os
import sys

import click

import sparsecc
from sparsecc.errors import SparseccError

__all__ = ["EXIT_CODES", "cli", "main"]

#: What each exit code means; the documentation page is made from this table.
EXIT_CODES = {
    0: "ok",
    1: "internal error",
    2: "wrong usage: option, argument, recipe or calibration data, or a file that cannot be written",
    3: "the model is unreadable, unsafe or unsupported",
    4: "verification or the accuracy guard failed",
    5: "the budget cannot be reached",
    6: "an operator library, backend or optional package is missing",
    130: "interrupted",
}

#: Verb -> module:function, imported when the verb is used, so that ``--help`` stays quick.
_VERBS = {
    "optimize": ("optimize", "Prune if asked, and make a model faster where that is measured."),
    "inspect": ("inspect", "Show a model's linear sites: shape, density, pattern, bytes."),
    "verify": ("verify", "Compare the outputs of two models."),
    "benchmark": ("benchmark", "Time models against each other, interleaved."),
    "passes": ("passes", "List the passes, or show one with its options."),
    "targets": ("targets", "List the targets, or export this machine's measured costs."),
    "ops": ("ops", "Show the operator library: path, operators, instruction sets."),
    "doctor": ("doctor", "Check this installation and machine."),
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f"sparsecc.cli.{_VERBS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _VERBS.items()])


@click.command(
    cls=_Verbs,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
@click.version_option(sparsecc.__version__, prog_name="sparsecc")
@click.option("-v", "--verbose", count=True, help="More on stderr; twice for debugging.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors on stderr.")
def cli(verbose: int, quiet: bool) -> None:
    """Make trained ONNX models smaller and actually faster."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def _fail(message: str, code: int) -> int:
    click.echo(f"sparsecc: error: {message}", err=True)
    return code


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        result = cli.main(arguments, prog_name="sparsecc", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx is not None else ""
        return _fail(error.format_message().replace("\n", " ") + hint, 2)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted; nothing was written", 130)
    except SparseccError as error:
        return _fail(" ".join(str(error).split()), error.exit_code)
    except BrokenPipeError:
        # The reader of stdout is gone: say nothing more, also not when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _fail(f"cannot read or write{where}: {error.strerror or error}; no output was left behind", 2)
    except Exception as error:
        if os.environ.get("SPARSECC_TRACEBACK"):
            raise
        summary = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return _fail(f"internal error: {summary} (SPARSECC_TRACEBACK=1 shows where; please report it)", 1)


def main() -> None:
    """Console script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
