"""`tmc-export replay`: a device plays the recorded conversations and saves what came out."""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), metavar="FILE", help="The .npz to write; it appears whole or not at all.")
@click.option("--backend", default="onnxruntime", show_default=True, help="onnxruntime, tensorrt or tensorrt-rtx.")
@click.option("--threads", type=int, metavar="N", help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(bundle: str, output: str, backend: str, threads: int | None, as_json: bool) -> None:
    """Play the recorded conversations of BUNDLE and save every output to FILE; no torch, no checkpoint.

    For a board: `tmc-export verify BUNDLE --outputs FILE` compares it there, or on another machine. docs/outputs.md says what FILE holds.
    """
    import json
    from pathlib import Path

    from tmc_export.verify.replay import replay
    from tmc_export.verify.saved import write_outputs

    def say(conversation: str) -> None:
        if not as_json:
            click.echo(f"playing {conversation} ...", err=True)

    saved = replay(Path(bundle), backend=backend, threads=threads, progress=say)
    write_outputs(Path(output), saved)
    if as_json:
        told = {"file": output, "arrays": len(saved.arrays), "conversations": list(saved.conversations), "made_by": saved.made_by}
        click.echo(json.dumps(told, indent=2))
    else:
        click.echo(f"{output}: {len(saved.arrays)} outputs of {len(saved.conversations)} conversations; {saved.made_by}")
