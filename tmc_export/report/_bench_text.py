"""A benchmark's result as text."""

from __future__ import annotations

from tmc_export.report.bench import BenchResult, Compared, Measured, Spread

__all__ = ["render"]


def render(result: BenchResult) -> str:
    """Return the lines that `tmc-export bench` prints."""
    lines: list[str] = []
    for letter, measured in zip("AB", result.bundles, strict=False):
        lines += _bundle(letter if result.compared else "", measured)
    if result.compared is not None:
        lines += _compared(result.compared)
    return "\n".join(lines)


def _figure(found: Spread | None, unit: str) -> str:
    if found is None:
        return "not measured"
    digits = 1 if found.median >= 10 else 3
    return f"{found.median:.{digits}f} {unit} ({found.least:.{digits}f}..{found.most:.{digits}f}, {found.count} runs)"


def _bundle(letter: str, m: Measured) -> list[str]:
    guess = m.predicted
    why = "not predicted: the bundle has no plan report" if guess is None else f"not predicted: {guess.why_not}"

    def predicted(value: float | None, unit: str) -> str:
        return why if guess is None or value is None else f"predicted {value:.1f} {unit} on {guess.device} (lower bound)"

    visual = " -> ".join(map(str, m.visual_tokens)) or "none"
    first = predicted(guess.first_token_ms if guess else None, "ms")
    token = predicted(guess.token_ms if guess else None, "ms")
    memory = f"predicted {guess.memory_mib:.1f} MiB" if guess and guess.memory_mib is not None else "not predicted"
    return [
        f"{letter + ': ' if letter else ''}{m.name} ({m.folder})",
        f"  prompt        {m.prompt_tokens} tokens; visual tokens {visual}",
        f"  first token   {_figure(m.first_token_ms, 'ms')}; {first}",
        f"  per token     {_figure(m.token_ms, 'ms')}; {token}",
        f"  peak memory   {_figure(m.peak_mib, 'MiB')}; {memory}, the runtime itself not counted",
        f"  loading       {_figure(m.load_ms, 'ms')}",
        f"  onnx/         {m.bundle_bytes / 1e6:.1f} MB",
    ]


def _compared(c: Compared) -> list[str]:
    def ratio(found: Spread | None) -> str:
        return "not measured" if found is None else f"{found.median:.3f} ({found.least:.3f}..{found.most:.3f})"

    predicted = "not predicted" if c.prompt_operations is None else f"operations before it, predicted: {c.prompt_operations:.3f}"
    return [
        "A / B, process by process",
        f"  first token   {ratio(c.first_token)}; {predicted}",
        f"  per token     {ratio(c.token)}",
        f"  peak memory   {ratio(c.peak)}",
        f"  onnx/         {c.bundle:.3f}",
    ]
