"""Two networks trained apart: how far permutations bring them together, and what PLeaS makes of them at each width.

    python benchmarks/merge_match.py [--steps 1200] [--quick] [--keep DIR]

Two Llamas of 1.2 M parameters are trained from nothing on the standard library, from different seeds and in different orders
of the data. Rows: the loss on held-out files of the two, of their logits' mean (an upper bound that costs twice as much), of
the average of the weights without matching, matched by weights and by activations, and of PLeaS at several widths, with the
least squares and without (``blocks``). Heads and channels both grow. ``barrier`` is the most that the loss along the line
from A to B exceeds what lies straight between theirs. --keep keeps the two models and uses them again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, machine, table, write_result

import espalier
from espalier.checkpoint.directory import resolve_model

WIDTHS = (1.0, 1.25, 1.5, 2.0)
TEXT = {"data": "stdlib:train", "eval_data": "stdlib:valid"}


def train(folder: Path, steps: int, seed: int, quick: bool) -> Path:
    """One network, unless it is there."""
    out = folder / f"seed{seed}"
    if out.exists():
        return out
    import transformers

    # head counts of 4, 5, 6 and 8 divide the hidden size, which Llama's config asks for
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=120, intermediate_size=64 if quick else 320, num_hidden_layers=2 if quick else 4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=30, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    config.save_pretrained(folder)
    espalier.pretrain(
        TEXT["data"], str(out), architecture=str(folder / "config.json"), tokenizer=str(resolve_model("seedling")), steps=steps,
        batch_size=16, sequence_length=128, learning_rate=2e-3, dtype="fp32", seed=seed, threads=1, checkpoint_every=0, quiet=True,
    )  # fmt: skip
    return out


def ensemble(a: Path, b: Path, tokens: int) -> float:
    """The loss of the mean of both models' logits, on the text that the others are measured on."""
    import torch
    from torch.nn import functional

    from espalier.attach.load import load_model
    from espalier.verbs._matching import read_text

    models = [load_model(path, "fp32", "cpu") for path in (a, b)]
    texts = read_text(str(a), models[0].config, None, TEXT["eval_data"], tokens, 128, 0)
    assert texts is not None
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, targets in texts[1]:
            logits = (models[0](input_ids=ids).logits + models[1](input_ids=ids).logits) / 2
            total += float(functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            count += targets.numel()
    return total / count


def plot(path: Path, lines: dict[str, list[float]], by_width: dict[str, list[tuple[float, float]]]) -> None:
    """Loss along the line, and loss over width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, losses in lines.items():
        left.plot([i / (len(losses) - 1) for i in range(len(losses))], losses, marker="o", label=name)
    left.set(xlabel="from A to B", ylabel="loss (nats per token)", title="along the line")
    for name, points in by_width.items():
        right.plot(*zip(*points, strict=True), marker="o", label=name)
    right.set(xlabel="width", ylabel="loss (nats per token)", title="merged")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measure(folder: Path, quick: bool, steps: int) -> dict[str, Any]:
    """Everything about one pair."""
    a, b = train(folder, steps, 1, quick), train(folder, steps, 2, quick)
    tokens = 2048 if quick else 32768
    common: dict[str, Any] = {"tokens": tokens, "sequence_length": 128, "threads": 1, "quiet": True, **TEXT}
    with tempfile.TemporaryDirectory() as temporary:
        matched = {
            by: espalier.merge_match(str(a), str(b), f"{temporary}/{by}", by=by, points=3 if quick else 11, **common)
            for by in ("weights", "activations")
        }
        merged: list[dict[str, Any]] = []
        for by in ("weights", "activations"):
            for width in WIDTHS:
                for fits in (False, True) if by == "weights" else (True,):
                    given = common if fits else {key: value for key, value in common.items() if key != "data"}
                    out = f"{temporary}/{by}-{width}-{fits}"
                    found = espalier.merge_match(str(a), str(b), out, by=by, width=width, report=False, points=3, **given)
                    size = sum(file.stat().st_size for file in Path(out).glob("*.safetensors")) // 4
                    merged.append({"by": by, "width": width, "least squares": fits, "parameters": size, **found})
    losses = {"as they are": matched["weights"]["losses"]["before"]} | {
        f"matched by {by}": found["losses"]["after"] for by, found in matched.items()
    }
    return {"losses": losses, "matched": matched, "merged": merged, "ensemble": ensemble(a, b, tokens)}


def main() -> None:
    """Train, match, merge, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--quick", action="store_true", help="smaller models, a few steps; to see that it runs")
    parser.add_argument("--keep", type=Path, help="folder for the two models")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, arguments.quick, 4 if arguments.quick else arguments.steps)
    lines = found["losses"]
    ends = lines["as they are"]
    rows: list[tuple[Any, ...]] = [("A", "", "", f"{ends[0]:.4f}", ""), ("B", "", "", f"{ends[-1]:.4f}", "")]
    rows.append(("mean of logits", "", "", f"{found['ensemble']:.4f}", ""))
    for name, losses in lines.items():
        result = found["matched"]["activations" if "activations" in name else "weights"]
        rows.append((f"average, {name}", "1.0", "", f"{losses[len(losses) // 2]:.4f}", f"{result['barrier']['before' if name == 'as they are' else 'after']:.4f}"))
    by_width: dict[str, list[tuple[float, float]]] = {}
    for one in found["merged"]:
        name = f"{'PLeaS' if one['least squares'] else 'blocks'}, by {one['by']}"
        by_width.setdefault(name, []).append((one["width"], one["merged_loss"]))
        rows.append((name, one["width"], json.dumps(one["widths"]), f"{one['merged_loss']:.4f}", f"{one['parameters']:,} parameters"))
    print(table(("model", "width", "units", "loss", "barrier or size"), rows))
    for by, result in found["matched"].items():
        print(f"\nby {by}: distance {result['distance']}, alignment {result['alignment']}, moved {result['moved']}")
    if not arguments.quick:
        keep = ("by", "width", "least squares", "parameters", "widths", "merged_loss")
        summary = {
            **{key: found[key] for key in ("losses", "ensemble")},
            "matched": {by: {k: v for k, v in r.items() if k not in ("out", "losses")} for by, r in found["matched"].items()},
            "merged": [{key: one[key] for key in keep} for one in found["merged"]],
        }
        write_result("merge_match", {"machine": machine(), "steps": arguments.steps, **summary})
        plot(RESULTS / "merge_match.png", lines, by_width)


if __name__ == "__main__":
    main()
