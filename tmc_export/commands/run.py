"""`tmc-export run`: a bundle answers a question about pictures."""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--image", "images", multiple=True, type=click.Path(), metavar="PATH", help="A picture; repeat it for several.")
@click.option("--prompt", required=True, help="The question.")
@click.option("--chat/--plain", default=True, help="Use the model's chat template (default), or the prompt as it is.")
@click.option("--max-new-tokens", type=int, metavar="N", help="Tokens at most; by default what the bundle was built for.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw among the likeliest tokens that reach this probability.")
@click.option("--seed", type=int, help="Seed of the draw.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer where this text comes; repeat it for several.")
@click.option("--backend", default="onnxruntime", show_default=True, help="onnxruntime, tensorrt or tensorrt-rtx.")
@click.option("--provider", default="cpu", show_default=True, help="What onnxruntime uses: cpu, cuda or tensorrt.")
@click.option("--threads", type=int, metavar="N", help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with answer, tokens, timings and kept positions.")
def command(
    bundle: str,
    images: tuple[str, ...],
    prompt: str,
    chat: bool,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int | None,
    stop: tuple[str, ...],
    backend: str,
    provider: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Answer a question with BUNDLE; the answer is streamed to standard output. Needs no torch."""
    import json
    from dataclasses import asdict

    from tmc_export.runtime.session import Sampling, load

    session = load(bundle, backend=backend, threads=threads, provider=provider)
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)

    def show(piece: str) -> None:
        click.echo(piece, nl=False)

    answer = session.generate(
        images, prompt, chat=chat, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, on_text=None if as_json else show
    )
    if as_json:
        click.echo(json.dumps(asdict(answer), ensure_ascii=False))
        return
    click.echo()
    t = answer.timings
    rate = f", {1e3 / t.token_ms:.1f} tokens/s" if t.token_ms else ""
    ends = {"eos": "", "length": "; ended at --max-new-tokens", "stop": "; ended at a stop text", "context": "; the context is full"}
    click.echo(
        f"[{answer.prompt_tokens} prompt tokens, {len(answer.tokens)} new; "
        f"first token {t.first_token_ms:.0f} ms{rate}{ends[answer.finish]}]",
        err=True,
    )
