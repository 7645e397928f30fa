"""What a sampling script is: its options, its model, and the flow that all of them share."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from typing import Any

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser, add_run_options
from qdiff.cli.options.ptq import add_ptq_options

# script → (options, model class); both are imported when they are needed
LIKE = {
    "sample_diffusion_ddim": ("ddim.options:add_options", "ddim.command:DdimModel"),
    "sample_diffusion_ldm": ("ldm.options:add_unconditional_options", "ldm.command:UnconditionalModel"),
    "sample_diffusion_ldm_imagenet": ("ldm.options:add_class_options", "ldm.command:ClassModel"),
    "sample_diffusion_ldm_bedroom": ("ldm.options:add_lsun_options", "ldm.command:UnconditionalModel"),
    "sample_diffusion_ldm_church": ("ldm.options:add_lsun_options", "ldm.command:UnconditionalModel"),
    "txt2img": ("ldm.options:add_text_options", "ldm.command:TextModel"),
    "sample_txt2img": ("ldm.options:add_caption_options", "ldm.command:CaptionModel"),
}


def load_object(name: str) -> Any:
    """Import ``module:attribute``."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def parser_like(about: str | None, arguments: list[str]) -> Parser:
    """Return a parser with ``--like SCRIPT`` and the model and sampler options of the script that it names."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--like", nargs="?", default="sample_diffusion_ddim")
    like = first.parse_known_args(arguments)[0].like
    parser = Parser(about)
    parser.add_argument("--like", choices=list(LIKE), default="sample_diffusion_ddim", help="a sampling script")
    if like in LIKE:
        load_object(LIKE[like][0])(parser)
    return parser


def sampling_script(
    name: str,
    about: str | None,
    add_options: Callable[[argparse.ArgumentParser], None],
    model: str,
    folder: tuple[str, ...] = ("-l", "--logdir"),
    preset: str | None = None,
    resume: bool = True,
) -> Callable[..., None]:
    """Return the ``main`` of a sampling script.

    Args:
        name: of the script, for the manifest.
        about: its help text.
        add_options: adds the options of its model and sampler.
        model: ``module:class`` of its `qdiff.cli.sample.FloatModel`, imported when it is needed.
        folder: what the option for the run folder is called.
        preset: EDA-DM's values for this family, a file of configs/eda-dm.
        resume: see `add_ptq_options`.
    """

    @exits_cleanly
    def main(arguments: list[str] | None = None) -> None:
        parser = Parser(about)
        add_options(parser)
        add_ptq_options(parser, resume)
        add_run_options(parser, folder)
        args = parser.parse_args(arguments)
        from qdiff.cli.sample import SampleCommand

        command = SampleCommand(name, load_object(model)(args), preset)
        with command.notes_told():
            if args.dry_run:
                print(json.dumps(command.config, indent=1))
            else:
                command.run()

    return main
