"""The command line: the group, what becomes of errors, and which commands there are."""

import sys
from itertools import chain
from typing import Any, NoReturn

import click

from analysis.errors import OF_PATHS, BadInput, Failed, full, one_line
from orchestrator.commands import keeping, laws, looking, measures, papers, reports, sweeps
from orchestrator.commands.options import INTERRUPTED

PARTS = {
    "Grids": (sweeps.new, sweeps.plan, sweeps.sweep),
    "While it runs": (looking.status, looking.logs, looking.ui),
    "Answers": (
        reports.report,
        reports.compare,
        looking.figures,
        looking.ranks,
        laws.fit,
        laws.onset,
    ),
    "Measurements": (measures.probe, measures.dimension, measures.bounds, papers.reproduce),
    "Upkeep": (keeping.verify, keeping.track, keeping.doctor, looking.completion),
}


class Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BadInput as error:
            _end(error, 2)
        except click.UsageError as error:
            _end(error.format_message(), 2)
        except (BrokenPipeError, KeyboardInterrupt, click.Abort):
            sys.exit(INTERRUPTED)
        except Failed as error:
            _end(error, 1)
        except OSError as error:
            if error.errno in OF_PATHS:
                _end(f"{error.filename}: {error.strerror}", 2)
            if not (why := full(error)):
                raise
            _end(why, 1)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """By what they are for."""
        wide = max(map(len, self.commands))
        for part, commands in PARTS.items():
            with formatter.section(part):
                short = [c.get_short_help_str(formatter.width - 6 - wide) for c in commands]
                names = [(c.name or "").ljust(wide) for c in commands]
                formatter.write_dl(list(zip(names, short, strict=True)))


def _end(error: Exception | str, code: int) -> NoReturn:
    click.echo(f"error: {one_line(error)}", err=True)
    sys.exit(code)


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with:  lmsat sweep --grid ranks.yaml",
)
@click.version_option(package_name="lmsat")
def main() -> None:
    """The laboratory for language-model saturation: train grids of model size x head rank, probe
    them along training, and see whether the softmax head is the bottleneck.

    Exit codes: 0 done, 1 the work failed, 2 bad input, 130 stopped with Ctrl-C.
    """


for command in chain(*PARTS.values()):
    main.add_command(command)
