"""`tmc-export debug`: which node of a bundle is at fault?"""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--check", type=click.Choice(["parity", "parse", "build"]), default="parity", show_default=True,
              help="parity: onnxruntime loads, runs and computes what it should; parse, build: TensorRT-RTX takes the graphs.")  # fmt: skip
@click.option("--subgraph", metavar="FILE", help="Look at this one only, such as onnx/block_1_prefill.onnx.")
@click.option("--against", type=click.Path(), metavar="BUNDLE", help="A bundle known to be good, such as one of another version.")
@click.option("--model", type=click.Path(), help="The checkpoint's folder: PyTorch judges each subgraph, and a bundle is built anew.")
@click.option("--recipe-folder", type=click.Path(), help="With --model: where the recipe's relative paths start.")
@click.option("--tolerance", "rtol", type=click.FloatRange(min=0, min_open=True), metavar="SHARE",
              help="Of a tensor's largest magnitude; by default the tolerance table's for one subgraph.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(), metavar="DIR", help="Where the reduced model goes; by default out/debug-<bundle>.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(
    bundle: str,
    check: str,
    subgraph: str | None,
    against: str | None,
    model: str | None,
    recipe_folder: str | None,
    rtol: float | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Find the first subgraph of BUNDLE that fails and the first node in it that is at fault; write the smallest model that still fails.

    What is right comes from --against, from --model, or, without either, from the same graph without onnxruntime's optimizations; this
    finds faults of onnxruntime only. Exit code 4: something fails. Needs the extra 'export'.
    """
    import json
    from pathlib import Path

    from tmc_export.bundle.read import open_manifest
    from tmc_export.bundle.write import check_replaceable
    from tmc_export.core.errors import ParityError
    from tmc_export.core.lazy import require

    folder, parity = Path(bundle), check == "parity"
    if not parity and (against is not None or model is not None or rtol is not None):
        raise click.UsageError(f"--check {check} compares nothing; leave --against, --model and --tolerance out")
    if recipe_folder is not None and model is None:
        raise click.UsageError("--recipe-folder goes with --model")
    open_manifest(folder)
    for package in ("onnx", "polygraphy", *(("torch", "transformers") if model is not None else ())):
        require(package, extra="export", purpose="debug a bundle")
    from tmc_export.debug.engines import find_refusal
    from tmc_export.debug.find import find
    from tmc_export.debug.graph import quiet
    from tmc_export.debug.write import REPORT, reproduce, write_fault

    target = Path("out") / f"debug-{folder.resolve().name}" if output is None else Path(output)
    check_replaceable(target, REPORT)

    def say(line: str) -> None:
        if not as_json:
            click.echo(f"{line} ...", err=True)

    with quiet():
        if parity:
            places = [None if p is None else Path(p) for p in (against, model, recipe_folder)]
            verdict = find(folder, subgraph=subgraph, against=places[0], model=places[1], recipe_folder=places[2], rtol=rtol, progress=say)
            fault, tried, compared = verdict.fault, verdict.tried, verdict.compared_with
            what = f"compared with {compared}"
        else:
            fault, tried = find_refusal(folder, check, subgraph, say)
            compared, what = "", f"TensorRT-RTX {'builds' if check == 'build' else 'parses'} them"
    if fault is None:
        told = {"fault": None, "subgraphs": tried, "check": check, "compared_with": compared}
        click.echo(json.dumps(told, indent=2) if as_json else f"nothing fails: {tried} subgraphs, {what}")
        return
    write_fault(fault, target)
    again = reproduce(fault, target)
    if as_json:
        click.echo(json.dumps({"fault": {**fault.to_json(), "folder": str(target), "reproduce": again}}, indent=2))
    else:
        click.echo(f"{fault.text()}: {target / 'model.onnx'}\n  reproduce: {again}")
    raise ParityError(f"{fault.subgraph}: {fault.node.operator} '{fault.node.name}' is at fault: {fault.node.note or 'it is refused'}")
