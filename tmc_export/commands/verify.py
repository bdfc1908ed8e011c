"""`tmc-export verify`: is a bundle whole, and does it compute what the model computes?"""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--model", type=click.Path(), help="The checkpoint's folder: climb the full ladder (needs the extra 'export').")
@click.option("--recipe-folder", type=click.Path(), help="With --model: where the recipe's relative paths start (learned weights).")
@click.option("--outputs", type=click.Path(), metavar="FILE", help="What `tmc-export replay` saved on a device: compare that instead.")
@click.option("--backend", default="onnxruntime", show_default=True, help="Play with onnxruntime, tensorrt or tensorrt-rtx.")
@click.option("--provider", default="cpu", show_default=True, help="What onnxruntime uses: cpu, cuda or tensorrt.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(
    bundle: str, model: str | None, recipe_folder: str | None, outputs: str | None, backend: str, provider: str, as_json: bool
) -> None:
    """Check the hashes of BUNDLE and play its recorded conversations; no torch, no checkpoint.

    With --model every subgraph, and the bundle as a whole, is compared with the model itself. With --outputs nothing is played: what a
    device saved is judged by the same tolerances. With --backend or --provider the device plays the conversations itself; float32 is judged
    there as half precision, because products are TF32. A rung that cannot run says so; where it is the one that was asked for by
    --backend or --provider, the exit code is 2. Exit code 4 means that something differs; the first bad subgraph is named.
    """
    import json
    from pathlib import Path

    from tmc_export.core.errors import RuntimeInputError
    from tmc_export.core.lazy import require
    from tmc_export.verify.ladder import climb, device_ladder, recorded_ladder, saved_ladder

    def say(rung: str) -> None:
        if not as_json:
            click.echo(f"checking {rung} ...", err=True)

    on_device = (backend, provider) != ("onnxruntime", "cpu")
    if outputs is not None:
        if on_device:
            raise click.UsageError("--outputs compares what a device has saved, nothing is played; leave --backend and --provider out")
        if model is not None or recipe_folder is not None:
            raise click.UsageError("--outputs compares saved outputs with what the bundle recorded; leave --model and --recipe-folder out")
        ladder = saved_ladder(Path(bundle), Path(outputs), say)
    elif model is None:
        ladder = device_ladder(Path(bundle), backend, provider, say) if on_device else recorded_ladder(Path(bundle), say)
    else:
        for package in ("torch", "transformers"):
            require(package, extra="export", purpose="verify against a checkpoint")
        start = None if recipe_folder is None else Path(recipe_folder)
        ladder = climb(Path(bundle), Path(model), say, recipe_folder=start, backend=backend, provider=provider)
    click.echo(json.dumps(ladder.to_json(), indent=2) if as_json else ladder.text())
    ladder.raise_if_failed()
    if on_device and (last := ladder.rungs[-1]).status == "not run":
        raise RuntimeInputError(f"{bundle} was not played on the device: {last.note}")
