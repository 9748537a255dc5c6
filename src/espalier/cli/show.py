"""Results for people, on standard output."""

from __future__ import annotations

import json
from typing import Any


def facts(result: dict[str, Any]) -> None:
    """A line per fact; nested ones as JSON."""
    width = max((len(name) for name in result), default=0)
    for name, value in result.items():
        if isinstance(value, float):
            text = f"{value:.6g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            text = f"{value:,}"
        else:
            text = value if isinstance(value, str) else json.dumps(value)
        print(f"{name.replace('_', ' '):<{width}}  {text}")


def training(result: dict[str, Any]) -> None:
    """The end of a run: how the held-out losses moved."""
    from espalier.memory.meter import format_bytes

    print(f"{result['out']}: {format_bytes(result['bytes'])}, {result['steps']:,} steps, {result['tokens']:,} tokens")
    for name, scores in result["evaluation"].items():
        after, before = scores["after"], scores.get("before")
        if "accuracy" in after:
            line = f"{name}: accuracy {after['accuracy']:.1%}, macro-F1 {after['macro_f1']:.3f}"
            print(line + (f" (was {before['accuracy']:.1%}, {before['macro_f1']:.3f})" if before else ""))
            continue
        line = f"{name}: perplexity {after['perplexity']:.3f}, {after['bits_per_byte']:.4f} bits per byte"
        if before:
            change = after["bits_per_byte"] / before["bits_per_byte"] - 1
            line += f" (was {before['perplexity']:.3f}, {before['bits_per_byte']:.4f}: {change:+.1%})"
        print(line)


def planned(result: dict[str, Any]) -> None:
    """A table of phases and kinds in MiB, and the settings."""
    phases, peaks = result["phases"], result["peaks"]
    kinds = [kind for kind in next(iter(phases.values())) if any(found[kind] for found in phases.values())]
    print(" " * 12 + "".join(f"{phase:>14}" for phase in phases) + "   MiB")
    for kind in kinds:
        print(f"{kind:<12}" + "".join(f"{found[kind] / 2**20:>14,.1f}" for found in phases.values()))
    print(f"{'together':<12}" + "".join(f"{peaks[phase] / 2**20:>14,.1f}" for phase in phases))
    from espalier.memory.meter import format_bytes

    activations = "recomputing" if result["recompute"] else "keeping"
    print(
        f"\n{result['method']}, {result['trained']:,} numbers train by {result['optimizer']} ({result['state']}); {result['batch_tokens']:,} tokens a step "
        f"in micro-batches of {result['micro_tokens']:,}, {activations} activations, logits of {result['logits_chunk']:,} tokens at a time"
    )
    print(
        f"predicted peak {format_bytes(result['predicted_peak'])} ({result['worst']}), of which {format_bytes(result['baseline'])} are imports; "
        f"--budget {format_bytes(result['needs'])} allows it, {format_bytes(result['least'])} the leanest settings"
    )
    print(f"a checkpoint takes {format_bytes(result['checkpoint_bytes'])} on disk, and two are kept")


def text(result: dict[str, Any]) -> None:
    """Prompt and completion."""
    print(result["prompt"] + result["completion"])


def applied(result: dict[str, Any]) -> None:
    """Where the new model is."""
    print(f"{result['out']}: {result['changed']} tensors changed")


def differed(result: dict[str, Any]) -> None:
    """Where the delta is, and how much of the model it changes."""
    from espalier.memory.meter import format_bytes

    print(f"{result['out']}: {format_bytes(result['bytes'])}, {len(result['tensors'])} tensors changed, {result['unchanged']:.2%} of the entries did not")


def refitted(result: dict[str, Any]) -> None:
    """Facts about a compressed or converted delta; the list of its tensors is for ``--json``."""
    facts({key: value for key, value in result.items() if key not in ("tensors", "tried") and value != []})


def merged(result: dict[str, Any]) -> None:
    """Facts about a merge; the list of its updates is for ``--json``."""
    facts({key: value for key, value in result.items() if key != "updates"})


def searched(result: dict[str, Any]) -> None:
    """What won, and what each model loses alone."""
    print(f"{result['recipe']}: {result['method']}, {result['trials']} candidates tried by {result['strategy']}")
    rows = {"the winner": result["losses"], **{f"{path} alone": losses for path, losses in result["alone"].items()}}
    for name, losses in rows.items():
        print(f"{name}: {', '.join(f'{data} {loss:.4f}' for data, loss in losses.items())}")
    if result["selected"]:
        print(f"the winner on the selection data: {', '.join(f'{data} {loss:.4f}' for data, loss in result['selected'].items())}")


def matched(result: dict[str, Any]) -> None:
    """Where what was matched is, and what matching did; losses along the line and fits of layers are for ``--json``."""
    facts({key: value for key, value in result.items() if key not in ("losses", "fits")})


def calibrated(result: dict[str, Any]) -> None:
    """Where the statistics are, and of what."""
    print(f"{result['out']}: {', '.join(result['statistics'])} over {result['tokens']:,} tokens")


def reported(result: dict[str, Any]) -> None:
    """Tables of models, pairs and lines, and what they say."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from espalier.exchange.merge_report import tables

    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, width=140)
    for title, head, rows in tables(result, ("roles",) if len(result["pairs"]) == 1 else (), narrow=True):
        table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
        for position, column in enumerate(head):
            table.add_column(column, justify="right" if position else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for note in result["notes"]:
        console.print(f"- {note}", markup=False, soft_wrap=True)


def methods(result: list[dict[str, Any]]) -> None:
    """A line per method and one per option."""
    for method in result:
        papers = ", ".join(f"#{i}" for i in method["ids"])
        source = " ".join(part for part in (method["paper"], papers) if part)
        print(f"{method['kind']}/{method['name']}  {method['summary']}  {source and '(' + source + ')'}")
        for h in method["hyperparameters"]:
            print(f"    --{h['name'].replace('_', '-')} {h['type']} = {h['default']}  {h['help']}")
