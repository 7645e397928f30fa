"""Sampling scripts: their options, their pipeline, and the flow that they share."""

from __future__ import annotations

import argparse
import importlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser, add_run_options
from qdiff.errors import UserError

if TYPE_CHECKING:  # it loads torch, which `scripts/families.py` need not wait for
    from qdiff.pipeline import Pipeline


@dataclass(frozen=True)
class Script:
    """A sampling script, as a row of scripts/families.py describes it.

    Attributes:
        name: name of the script's file, also for ``--like``.
        add_options: adds the options of the model and the sampler.
        pipeline: ``module:class`` of the `Pipeline`, imported when it is needed.
        add_more_options: replaces ``add_options`` in the script itself, which samples images; None uses
            ``add_options``.
        folder: names of the option for the run folder.
        preset: EDA-DM's values for this family, a file of configs/eda-dm.
        resume: see `add_ptq_options`.
        also_import: modules that define what the pipeline may load.
    """

    name: str
    add_options: Callable[[argparse.ArgumentParser], None]
    pipeline: str
    add_more_options: Callable[[argparse.ArgumentParser], None] | None = None
    folder: tuple[str, ...] = ("-l", "--logdir")
    preset: str | None = None
    resume: bool = True
    also_import: tuple[str, ...] = ()

    def pipeline_of(self, args: Namespace) -> Pipeline:
        """Return the pipeline that options name."""
        module, attribute = self.pipeline.split(":")
        try:
            for name in (*self.also_import, module):
                found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != "diffusers":
                raise
            raise UserError('diffusers is not installed; pip install "qdiff[diffusers]"') from None
        return getattr(found, attribute).from_args(args)


Scripts = Mapping[str, Script]
"""The sampling scripts by name; the first is the default of ``--like``."""


def script_like(arguments: list[str], scripts: Scripts) -> Script | None:
    """Return the script that ``--like SCRIPT`` names among other options; None if there is no such script."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--like", nargs="?", default=next(iter(scripts)))
    return scripts.get(first.parse_known_args(arguments)[0].like)


def parser_like(about: str | None, arguments: list[str], scripts: Scripts) -> Parser:
    """Return a parser with ``--like SCRIPT`` and the model and sampler options of the script that it names."""
    parser = Parser(about)
    parser.add_argument("--like", choices=list(scripts), default=next(iter(scripts)), help="a sampling script")
    if script := script_like(arguments, scripts):
        script.add_options(parser)
    return parser


def sampling_script(script: Script, about: str | None) -> Callable[..., None]:
    """Return the ``main`` of a sampling script.

    Args:
        about: help text of the script.
    """

    @exits_cleanly
    def main(arguments: list[str] | None = None) -> None:
        from qdiff.cli.options.mixed_precision import add_mixed_precision_options
        from qdiff.cli.options.ptq import add_ptq_options

        parser = Parser(about)
        (script.add_more_options or script.add_options)(parser)
        add_ptq_options(parser, script.resume)
        add_mixed_precision_options(parser)
        add_run_options(parser, script.folder)
        args = parser.parse_args(arguments)
        from qdiff.cli.sample import SampleCommand

        command = SampleCommand(script.name, script.pipeline_of(args), args, script.preset)
        with command.notes_told():
            if args.dry_run:
                print(json.dumps(command.config, indent=1))
            else:
                command.run()

    return main
