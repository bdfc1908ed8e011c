"""`tmc-export bench`: how fast a bundle is, alone or against another."""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--against", type=click.Path(), metavar="BUNDLE", help="Another bundle, timed in turns with the first.")
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Processes for each bundle.")
@click.option("--image", "images", multiple=True, type=click.Path(), metavar="PATH", help="A picture; noise when there is none.")
@click.option("--prompt", default="what is in the picture", show_default=True, help="The question.")
@click.option("--answers", type=click.IntRange(min=1), default=3, show_default=True, help="Timed answers in each process.")
@click.option("--tokens", type=click.IntRange(min=0), default=16, show_default=True, help="Timed single tokens in each process.")
@click.option("--backend", default="onnxruntime", show_default=True, help="onnxruntime, tensorrt or tensorrt-rtx.")
@click.option("--provider", default="cpu", show_default=True, help="What onnxruntime uses: cpu, cuda or tensorrt.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(
    bundle: str,
    against: str | None,
    runs: int,
    images: tuple[str, ...],
    prompt: str,
    answers: int,
    tokens: int,
    backend: str,
    provider: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Time BUNDLE: first token, per token, peak memory, with what its plan predicted beside it.

    Every run is a process of its own. With --against the two bundles take turns, and each pair gives a ratio. Needs no torch.
    """
    import json
    from dataclasses import asdict

    from tmc_export.report._bench_text import render
    from tmc_export.report.bench import bench

    def say(line: str) -> None:
        click.echo(line, err=True)

    result = bench(
        bundle, against, runs=runs, images=images, prompt=prompt, answers=answers, tokens=tokens,
        backend=backend, threads=threads, provider=provider, progress=say,
    )  # fmt: skip
    click.echo(json.dumps(asdict(result), indent=2) if as_json else render(result))
