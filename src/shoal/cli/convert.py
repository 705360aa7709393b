"""`shoal convert`: a pickled checkpoint as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoal.cli import options


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A checkpoint directory or a hub id with pytorch_model.bin.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DESTINATION", help="A new directory; none is overwritten.")],
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Write a pickled checkpoint as safetensors, which every other command reads.

    Pickles are read as plain tensors; code in them is never run.

    shoal convert facebook/opt-1.3b models/opt-1.3b
    """
    from shoal.models.convert import convert_checkpoint

    convert_checkpoint(source, destination, revision=revision, token=token)
    Console().print(f"{destination} is ready: shoal info {destination}", highlight=False, soft_wrap=True)
