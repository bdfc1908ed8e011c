"""`tmc-export doctor [BUNDLE]`: what this machine has, and whether a bundle's engines fit it."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]

_MARKS = {"ok": "ok     ", "absent": "-      ", "problem": "PROBLEM"}


@click.command(name="doctor")
@click.argument("bundle", required=False, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(bundle: Path | None, as_json: bool) -> None:
    """Say what this machine has: JetPack, TensorRT, CUDA, GPU, memory, power mode, disk, Python, extras.

    With BUNDLE, also whether its engines fit this TensorRT and this GPU. Exit code 0, also when something is missing:
    the findings say so.
    """
    import json
    from dataclasses import asdict

    from tmc_export.bundle.read import open_manifest
    from tmc_export.engine.doctor import examine_engines, examine_machine

    if bundle is not None:
        open_manifest(bundle)
    findings, builders, device = examine_machine(folder=bundle or Path("."))
    if bundle is not None:
        findings += examine_engines(bundle, builders, device)
    if as_json:
        click.echo(json.dumps({"schema": 1, "findings": [asdict(finding) for finding in findings]}, indent=1))
        return
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        click.echo(f"{_MARKS[finding.state]} {finding.name:<{width}}  {finding.value}")
        if finding.advice:
            click.echo(f"{'':8}{'':<{width}}  -> {finding.advice}")
