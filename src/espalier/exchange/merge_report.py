"""The report of models that may be merged: from counts to statistics of pairs, what they suggest, and a page.

The judgement says facts with their numbers. Its thresholds are rules of thumb, stated in docs/merge-report.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from espalier.anatomy.parameters import role_of
from espalier.exchange.merge_line import BASE, Line
from espalier.exchange.merge_recipe import block_of
from espalier.exchange.merge_statistics import Counts, Found, total
from espalier.exchange.merging import Item

ONE_BASE, INDEPENDENT = 0.9, 0.5
"""Cosines of two models' matrices: from the first on they are close enough to average; below the second they are unrelated."""
OUTSIDE = "outside"
"""Stands for a block where a tensor is in none."""


def names_of(paths: Sequence[str]) -> list[str]:
    """Short names of models: the last part of the path, or all of it where that is another's too."""
    short = [Path(path).name or path for path in paths]
    return [name if short.count(name) == 1 else path if paths.count(path) == 1 else f"{name} ({i + 1})" for i, (name, path) in enumerate(zip(short, paths, strict=True))]


def assembled(paths: Sequence[str], base: str | None, items: Sequence[Item], found: Mapping[str, Found], density: float, rank: int) -> dict[str, Any]:
    """Statistics of every model and every pair: in total, by role, by block and by tensor."""
    has_base = base is not None
    counts = {name: f.counts for name, f in found.items()}
    groups = {"roles": _grouped(counts, role_of), "blocks": _grouped(counts, _block)}
    everything = total(counts.values())
    matrices = total(counts[item.name] for item in items if item.name in counts and len(item.shape) > 1)
    names = names_of(paths)

    def everywhere(of: Callable[[Counts], dict[str, Any]], angles: tuple[int, int] | None = None) -> dict[str, Any]:
        made: dict[str, Any] = {"total": of(everything)}
        for kind, grouped in groups.items():
            made[kind] = {group: of(some) for group, some in grouped.items()}
        made["tensors"] = {name: of(some) for name, some in counts.items()}
        for name, f in found.items() if angles else ():
            if angles in f.angles:
                made["tensors"][name]["angles"] = f.angles[angles]
        return made

    pairs = []
    for i, j in itertools.combinations(range(len(paths)), 2):
        statistics = everywhere(partial(_of_pair, i=i, j=j, has_base=has_base), (i, j))
        statistics["total"]["matrix_cosine"] = _cosine(matrices, i, j)
        pairs.append({"a": names[i], "b": names[j], **statistics})
    models = []
    for i, path in enumerate(paths):
        statistics = everywhere(partial(_of_model, i=i, has_base=has_base))
        if has_base:
            statistics["total"]["matrix_cosine_to_base"] = _cosine(matrices, i, len(paths))
        models.append({"name": names[i], "path": path, **statistics})
    report: dict[str, Any] = {
        "of": "changes" if has_base else "models", "base": base, "density": density, "rank": rank,
        "entries": int(everything["entries"]), "tensors": len(found), "models": models, "pairs": pairs, "lines": [],
    }  # fmt: skip
    if has_base:
        report["election"] = {
            "lost": _lost(everything["mass"].diag().sum() / 2, everything["all_mass"]),
            "lost_kept": _lost(everything["kept_mass"].diag().sum() / 2, everything["kept_all_mass"]),
        }
    return report


def add_lines(report: dict[str, Any], lines: Mapping[tuple[int, int], Mapping[str, Line]]) -> None:
    """Put the losses along lines into a report."""
    names = [model["name"] for model in report["models"]]
    name: Callable[[int], str] = lambda model: "base" if model == BASE else names[model]  # noqa: E731
    for (first, second), by_data in lines.items():
        for data, line in by_data.items():
            report["lines"].append(
                {"a": name(first), "b": name(second), "from_base": first == BASE, "data": data, "points": line.points, "losses": line.losses, "barrier": line.barrier, "at": line.at}
            )


def _grouped(counts: Mapping[str, Counts], group: Callable[[str], str]) -> dict[str, Counts]:
    members: dict[str, list[Counts]] = {}
    for name, some in counts.items():
        members.setdefault(group(name), []).append(some)
    return {key: total(members[key]) for key in sorted(members, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0))}


def _block(name: str) -> str:
    return OUTSIDE if (block := block_of(name)) is None else str(block)


def _share(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    return float(part / whole) if float(whole) else None


def _lost(mass: torch.Tensor, together: torch.Tensor) -> float | None:
    """The share of the magnitudes of changes whose sign loses the election by mass: (sum |a| + |b| - |a + b|) / 2 of it."""
    return max(0.0, float((mass - together) / 2 / mass)) if float(mass) else None


def _cosine(counts: Counts, i: int, j: int, of: str = "gram") -> float | None:
    gram = counts[of]
    size = math.sqrt(gram[i, i]) * math.sqrt(gram[j, j])
    return max(-1.0, min(1.0, float(gram[i, j]) / size)) if size else None


def _of_model(counts: Counts, i: int, has_base: bool) -> dict[str, Any]:
    made: dict[str, Any] = {"norm": math.sqrt(counts["gram"][i, i])}
    if has_base:
        change = counts["changes"][i, i]
        made |= {
            "change": math.sqrt(change),
            "relative": math.sqrt(change / counts["gram"][-1, -1]) if float(counts["gram"][-1, -1]) else None,
            "changed": float(counts["touched"][i, i] / counts["entries"]),
            "kept_energy": _share(counts["kept_squares"][i], change),
        }
    if "captured" in counts:
        made["captured"] = _share(counts["captured"][i], counts["captured_of"][i])
    return made


def _of_pair(counts: Counts, i: int, j: int, has_base: bool) -> dict[str, Any]:
    gram = counts["gram"]
    size = (math.sqrt(gram[i, i]) + math.sqrt(gram[j, j])) / 2
    made: dict[str, Any] = {"distance": math.sqrt(counts["apart"][i, j]) / size if size else None, "model_cosine": _cosine(counts, i, j)}
    if has_base:
        touched, kept = counts["touched"], counts["kept"]
        made |= {
            "cosine": _cosine(counts, i, j, "changes"),
            "sign_conflict": _share((touched[i, j] - counts["signs"][i, j]) / 2, touched[i, j]),
            "lost": _lost((counts["mass"][i, i] + counts["mass"][j, j]) / 2, counts["mass"][i, j]),
            "overlap": _share(kept[i, j], kept[i, i] + kept[j, j] - kept[i, j]),
            "sign_conflict_kept": _share((kept[i, j] - counts["kept_signs"][i, j]) / 2, kept[i, j]),
            "lost_kept": _lost((counts["kept_mass"][i, i] + counts["kept_mass"][j, j]) / 2, counts["kept_mass"][i, j]),
        }
    if "directions" in counts:
        of = counts["directions"][i, j]
        made |= {f"{side}_overlap": _share(counts[side][i, j], of) for side in ("left", "right")}
        made |= {f"{side}_chance": _share(counts[f"{side}_chance"][i, j], of) for side in ("left", "right")}
        made["alignment"] = _share(counts["aligned"][i, j], counts["aligned_of"][i, j])
    return made


# what the numbers say


def judged(report: dict[str, Any]) -> None:
    """Put a verdict of every pair into a report, and what the statistics suggest, each with the number that it comes from."""
    notes = []
    for pair in report["pairs"]:
        pair["verdict"] = _verdict(pair["total"]["matrix_cosine"], pair["total"]["distance"])
    independent = [pair for pair in report["pairs"] if pair["verdict"] == "independently trained"]
    for pair in report["pairs"]:
        cosine, both = pair["total"]["matrix_cosine"], f"{pair['a']} and {pair['b']}"
        if pair["verdict"] == "the same weights":
            notes.append(f"{both} have the same weights.")
        elif pair["verdict"] == "independently trained":
            notes.append(f"{both} look independently trained (cosine of their matrices {cosine:.3f}): averaging will likely fail; match first (espalier merge match).")
        elif pair["verdict"] == "far apart":
            notes.append(
                f"{both} are far apart (cosine of their matrices {cosine:.3f}): whether they average cannot be told from the weights; "
                "measure the loss along the line (--data)."
            )
        elif pair["verdict"] == "fine-tunes of one base":
            notes.append(f"{both} are close, as fine-tunes of one base are (cosine of their matrices {cosine:.4f}, distance {pair['total']['distance']:.3g} of their norm).")
    if report["base"] is None:
        notes.append("Sign conflicts, overlap and election are of changes; they need the base: --model BASE.")
    elif not independent:
        notes += _of_changes(report)
    for model in report["models"] if report["base"] is not None else ():
        cosine = model["total"]["matrix_cosine_to_base"]
        if cosine is not None and cosine < INDEPENDENT:
            notes.append(f"{model['name']} is no fine-tune of the base given (cosine of their matrices {cosine:.3f}); is --model right?")
    report["notes"] = notes + [_of_line(line) for line in report["lines"] if not line["from_base"] or line["barrier"] > 0]


def _verdict(cosine: float | None, distance: float | None) -> str:
    if distance == 0:
        return "the same weights"
    if cosine is None:
        return "nothing to compare"
    return "fine-tunes of one base" if cosine >= ONE_BASE else "independently trained" if cosine < INDEPENDENT else "far apart"


def _of_changes(report: dict[str, Any]) -> list[str]:
    notes = []
    sizes = {model["name"]: model["total"]["change"] for model in report["models"]}
    for name in (name for name, size in sizes.items() if not size):
        notes.append(f"{name} is the base itself.")
    largest, smallest = max(sizes, key=lambda n: sizes[n]), min((n for n in sizes if sizes[n]), key=lambda n: sizes[n], default="")
    if smallest and sizes[largest] > 2 * sizes[smallest]:
        notes.append(f"The change of {largest} is {sizes[largest] / sizes[smallest]:.1f} times as long as that of {smallest}, and outweighs it unless weights (--weights) say otherwise.")
    cosines = [pair["total"]["cosine"] for pair in report["pairs"] if pair["total"]["cosine"] is not None]
    if cosines:
        mean, count = sum(cosines) / len(cosines), len(sizes)
        if mean < -0.1:
            notes.append(f"The changes oppose one another (mean cosine {mean:.2f}): what one model learnt, the sum takes from another.")
        elif mean < 0.2:
            notes.append(f"The changes are nearly orthogonal (mean cosine {mean:.2f}): a sum (task_arithmetic) keeps each of them whole; a mean (linear) leaves 1/{count} of each.")
        elif mean > 0.6:
            notes.append(f"The changes are much alike (mean cosine {mean:.2f}): a mean keeps what they share; a sum (task_arithmetic at scale 1) takes it up to {count} times.")
    density, election = report["density"], report["election"]
    if (lost := election["lost_kept"]) is not None:
        kept = [model["total"]["kept_energy"] for model in report["models"] if model["total"]["kept_energy"] is not None]
        notes.append(
            f"The largest {density:.0%} of the entries of each tensor hold {_range(kept)} of the changes' squared norm; "
            f"electing a sign among them (ties, density {density:g}) would drop {lost:.1%} of their magnitude, "
            f"among all entries {election['lost']:.1%}."
        )
        if lost < 0.02:
            notes.append("So few signs conflict that election makes little difference to a sum of the trimmed changes.")
    return notes


def _range(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"


def _of_line(line: Mapping[str, Any]) -> str:
    ends, best = (line["losses"][0], line["losses"][-1]), min(line["losses"])
    at = line["points"][line["losses"].index(best)]
    text = f"From {line['a']} to {line['b']} on {line['data']} "
    if line["barrier"] > 0:
        text += f"the barrier is {line['barrier']:.4f} nats per token, at {line['at']:.2f} of the way; "
    else:
        text += "there is no barrier; "
    if (top := max(line["losses"])) > max(ends):
        text += f"the loss rises to {top:.4f}, above both ends ({ends[0]:.4f} and {ends[1]:.4f}); "
    return text + ("no point between is better than the better end." if best == min(ends) else f"the best point is {at:.2f} of the way, with {best:.4f}.")


# for people

_PAIR = (
    ("distance", "distance, of the models' norm", "distance"),
    ("model_cosine", "cosine of the models", "models' cosine"),
    ("cosine", "cosine of the changes", "cosine"),
    ("overlap", "overlap of the largest entries", "overlap"),
    ("sign_conflict_kept", "signs that conflict in the overlap", "conflict"),
    ("sign_conflict", "signs that conflict, all entries", "all signs"),
    ("lost_kept", "magnitude that election drops, of the largest", "lost"),
    ("lost", "magnitude that election drops, of all", "lost of all"),
    ("left_overlap", "overlap of left singular subspaces", "left"),
    ("left_chance", "    to be expected of unrelated ones", ""),
    ("right_overlap", "overlap of right singular subspaces", "right"),
    ("right_chance", "    to be expected of unrelated ones", ""),
    ("alignment", "R, alignment of dominant directions", "R"),
)
"""Key, name, and short name where it is a column (else it is none)."""
_MODEL = (
    ("norm", "norm"), ("change", "change"), ("relative", "of base's"), ("changed", "entries"), ("kept_energy", "in largest"), ("captured", "in directions"),
)  # fmt: skip
MOST_COLUMNS = 4
"""More pairs than these are rows."""

Table = tuple[str, list[str], list[list[str]]]
"""Title, head and rows."""


def tables(report: Mapping[str, Any], by: Sequence[str] = (), narrow: bool = False) -> list[Table]:
    """The tables of a report: of the models, of the pairs and, for each of ``by`` (``roles``, ``blocks``), of every pair.

    Args:
        narrow: leave out columns, for 80 characters.
    """
    left_out = {"model_cosine", *(("sign_conflict", "lost", *(("distance",) if report["base"] is not None else ())) if narrow else ())}
    short = [(key, head) for key, _, head in _PAIR if head]
    made = [_table("Models", "model", _MODEL, {m["name"]: m["total"] for m in report["models"]})]
    totals = {f"{p['a']} / {p['b']}": p["total"] for p in report["pairs"]}
    if len(totals) > MOST_COLUMNS:
        made.append(_table("Pairs", "pair", short, totals))
    else:
        rows = [[name, *(_number(row.get(key)) for row in totals.values())] for key, name, _ in _PAIR]
        made.append(("Pairs", ["", *totals], [row for row in rows if set(row[1:]) != {"-"}]))
    for pair, kind in itertools.product(report["pairs"], by):
        one = kind.removesuffix("s")
        made.append(_table(f"{pair['a']} / {pair['b']} by {one}", one, [c for c in short if c[0] not in left_out], pair[kind]))
    if report["lines"]:
        rows = [[f"{x['a']} / {x['b']}", x["data"], *(_number(v) for v in (x["losses"][0], x["losses"][-1], min(x["losses"]), x["barrier"], x["at"]))] for x in report["lines"]]
        made.append(("Loss along the line, nats per token", ["from / to", "data", "first", "second", "lowest", "barrier", "at"], rows))
    return made


def _table(title: str, first: str, columns: Sequence[tuple[str, str]], rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Columns that no row has are left out."""
    present = [(key, head) for key, head in columns if any(row.get(key) is not None for row in rows.values())]
    return title, [first, *(head for _, head in present)], [[name, *(_number(row.get(key)) for key, _ in present)] for name, row in rows.items()]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.1e}"


def page(report: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The report as Markdown, with links to the plots."""
    of = f"changes of {report['base']}" if report["base"] is not None else "the models themselves"
    lines = [
        "# Before merging: " + ", ".join(model["name"] for model in report["models"]), "",
        f"Statistics of {of}, over {report['tensors']} tensors of {report['entries']:,} numbers; the largest {report['density']:.0%} of each tensor"
        f", the leading {report['rank']} singular directions of each matrix. What the columns mean is in Espalier's docs/merge-report.md.", "",
        *(f"- {note}" for note in report["notes"]), "",
    ]  # fmt: skip
    for title, head, rows in tables(report, ("roles", "blocks")):
        lines += [f"## {title}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows)] + [""]
    for plot in plots:
        lines += [f"![{Path(plot).stem}]({plot})", ""]
    return "\n".join(lines)
