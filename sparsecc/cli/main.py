"""Entry point of the ``sparsecc`` command: finds the verb, turns errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
from types import FrameType
from typing import Any

import click

import sparsecc
from sparsecc.errors import SparseccError
from sparsecc.target.spec import suggestion

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
    "plan": ("plan", "Show what optimize would do within a budget, and save it as a recipe."),
    "resize": ("resize", "Take a smaller model from one made with --method bitstack."),
    "analyze": ("analyze", "Show what each part of a model may become, and how much the model cares."),
    "inspect": ("inspect", "Show a model's linear sites, or how a tensor file's work is cut."),
    "diff": ("diff", "Show what differs between two models: sites, operators, weights, sizes."),
    "report": ("report", "Make a page out of what optimize --json printed."),
    "verify": ("verify", "Compare the outputs of two models."),
    "benchmark": ("benchmark", "Time models against each other, interleaved."),
    "bundle": ("bundle", "Put a model and all that a device needs to run it into one folder."),
    "recipe": ("recipe", "Make, check and show recipes and plans; their JSON Schema."),
    "passes": ("passes", "List the passes, or show one with its options."),
    "targets": ("targets", "List the targets, or export this machine's measured costs."),
    "ops": ("ops", "Show the operator library: path, operators, instruction sets."),
    "cache": ("cache", "Show what earlier runs have left, or clear it."),
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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:  # the latter is shell completion
            ctx.fail("no command given")
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _VERBS and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"no command '{args[0]}'{suggestion(args[0], _VERBS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would write an empty line
            raise click.Abort from None

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
    with contextlib.suppress(OSError):  # the terminal may be gone
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
        return _fail("interrupted; no unfinished file was left behind", 130)
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


#: Signals that ask a program to end. All end it as Ctrl-C does, so that temporary files go.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for other in _ENDING:
        signal.signal(other, _leave)
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    """The second signal does not wait for the cleaning up."""
    os._exit(130)


def main() -> None:
    """Console script."""
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and background jobs ignore some
            signal.signal(number, _interrupt)
    code = run()
    for number in _ENDING:  # all is written: nothing is left to interrupt
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    main()
