"""The plots of a merge report, as PNG, with matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier.exchange.merge_report import OUTSIDE

MOST_LINES = 8
"""More pairs than these are drawn as their range and mean."""
_PAIR_PANELS = (
    ("cosine", "cosine of the changes"), ("overlap", "overlap of the largest entries"),
    ("sign_conflict_kept", "signs that conflict in the overlap"), ("lost_kept", "magnitude that election drops"),
)  # fmt: skip
_MODEL_PANELS = (("distance", "distance, of the models' norm"), ("model_cosine", "cosine of the models"))
_SUBSPACES = (("left_overlap", "left_chance", "column spaces (left vectors)"), ("right_overlap", "right_chance", "row spaces (right vectors)"), ("alignment", None, "R: alignment of dominant directions"))


def is_there() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def write(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Write the plots that a report has numbers for; returns their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []

    def save(name: str, figure: Any) -> None:
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=110)
        pyplot.close(figure)
        made.append(f"{name}.png")

    with pyplot.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "lines.markersize": 3.5}):
        if report["base"] is not None:
            save("changes", _changes(report, pyplot))
        save("pairs", _pairs(report, pyplot))
        if report["rank"]:
            save("subspaces", _subspaces(report, pyplot))
        if report["lines"]:
            save("line", _lines(report, pyplot))
    return made


def _blocks(report: Mapping[str, Any]) -> list[str]:
    return [block for block in report["pairs"][0]["blocks"] if block != OUTSIDE] + [b for b in report["pairs"][0]["blocks"] if b == OUTSIDE]


def _by_block(axes: Any, blocks: Sequence[str], values: Mapping[str, Sequence[float | None]]) -> None:
    """A line for each of ``values`` over the blocks; what is outside of blocks, if it has any, stands apart, at the right."""
    if blocks[-1] == OUTSIDE and all(row[-1] is None for row in values.values()):
        blocks, values = blocks[:-1], {name: row[:-1] for name, row in values.items()}
    inside = [i for i, block in enumerate(blocks) if block != OUTSIDE]
    outside = [len(inside) * 1.05 + 0.2] if len(inside) < len(blocks) else []
    places = [*range(len(inside)), *outside]
    series = {name: [float("nan") if v is None else v for v in row] for name, row in values.items()}
    if len(series) > MOST_LINES:
        columns = list(zip(*series.values(), strict=True))
        low, high = ([pick(c) for c in columns] for pick in (min, max))
        axes.fill_between(places[: len(inside)], low[: len(inside)], high[: len(inside)], alpha=0.2, color="C0", label=f"range of {len(series)}")
        axes.vlines(outside, low[len(inside) :], high[len(inside) :], color="C0", alpha=0.4)
        series = {"mean": [sum(c) / len(c) for c in columns]}
    for number, (name, row) in enumerate(series.items()):
        (drawn,) = axes.plot(places[: len(inside)], row[: len(inside)], marker="o", label=name, color=f"C{number % 10}")
        axes.plot(outside, row[len(inside) :], marker="D", linestyle="", color=drawn.get_color())
    every = max(1, -(-len(inside) // 12))
    ticks = [i for i in range(len(inside)) if i % every == 0]
    axes.set_xticks([*ticks, *outside], [*(blocks[i] for i in ticks), *([OUTSIDE] * len(outside))])
    axes.set_xlabel("block")


def _from_zero(axes: Any, least: float = 0.0) -> None:
    """Let the y axis begin at zero, and end above everything that is drawn."""
    axes.set_ylim(0, 1.08 * max(axes.dataLim.ymax, least) or 1.0)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3 if max(map(len, labels)) > 20 else 4), frameon=False)


def _pair_name(pair: Mapping[str, Any]) -> str:
    return f"{pair['a']} / {pair['b']}"


def _changes(report: Mapping[str, Any], pyplot: Any) -> Any:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    blocks = _blocks(report)
    _by_block(left, blocks, {m["name"]: [m["blocks"][b]["relative"] for b in blocks] for m in report["models"]})
    left.set(title="norm of the change, as a share of the base's")
    _from_zero(left)
    roles = list(report["models"][0]["roles"])
    height = 0.8 / len(report["models"])
    for number, model in enumerate(report["models"]):
        places = [row + (number - (len(report["models"]) - 1) / 2) * height for row in range(len(roles))]
        right.barh(places, [model["roles"][role]["relative"] or 0.0 for role in roles], height, color=f"C{number % 10}")
    right.set_yticks(range(len(roles)), roles)
    right.invert_yaxis()
    right.set(title="the same by role")
    right.grid(axis="y", visible=False)
    _legend(figure, left)
    return figure


def _pairs(report: Mapping[str, Any], pyplot: Any) -> Any:
    panels = _PAIR_PANELS if report["base"] is not None else _MODEL_PANELS
    figure, grid = pyplot.subplots(len(panels) // 2, 2, figsize=(10, 3.2 * (len(panels) // 2) + 0.6), layout="constrained", squeeze=False)
    blocks = _blocks(report)
    for axes, (key, title) in zip(grid.flat, panels, strict=True):
        _by_block(axes, blocks, {_pair_name(p): [p["blocks"][b][key] for b in blocks] for p in report["pairs"]})
        axes.set_title(title)
        if "conflict" in key:
            axes.axhline(0.5, color="grey", linestyle=":", linewidth=1)
            axes.annotate("chance", (1, 0.5), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey")
        if key == "cosine":
            axes.axhline(0, color="grey", linewidth=1)
        else:
            _from_zero(axes, 0.5 if "conflict" in key else 0.0)
    _legend(figure, grid.flat[0])
    return figure


def _subspaces(report: Mapping[str, Any], pyplot: Any) -> Any:
    figure, row = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    blocks = [b for b in _blocks(report) if any(p["blocks"][b].get("left_overlap") is not None for p in report["pairs"])]
    for axes, (key, chance, title) in zip(row, _SUBSPACES, strict=True):
        _by_block(axes, blocks, {_pair_name(p): [p["blocks"][b].get(key) for b in blocks] for p in report["pairs"]})
        if chance:
            expected = [report["pairs"][0]["blocks"][b].get(chance) for b in blocks]
            inside = [v for b, v in zip(blocks, expected, strict=True) if b != OUTSIDE]
            axes.plot(range(len(inside)), inside, color="grey", linestyle=":", linewidth=1.2, label="expected of unrelated ones, in the blocks")
            axes.set_ylim(0, 1.03)
        else:
            axes.axhline(0, color="grey", linewidth=1)
        axes.set_title(title)
    row[0].set_ylabel(f"mean squared cosine, rank {report['rank']}")
    _legend(figure, row[0])
    return figure


def _lines(report: Mapping[str, Any], pyplot: Any) -> Any:
    datas = list(dict.fromkeys(line["data"] for line in report["lines"]))
    figure, row = pyplot.subplots(1, len(datas), figsize=(min(5.5 * len(datas), 16) + (1 if len(datas) == 1 else 0), 4.2), layout="constrained", squeeze=False)
    for axes, data in zip(row.flat, datas, strict=True):
        for number, line in enumerate(x for x in report["lines"] if x["data"] == data):
            color, style = f"C{number % 10}", "--" if line["from_base"] else "-"
            axes.plot(line["points"], line["losses"], style, marker="o", color=color, label=f"{line['a']} to {line['b']}")
            if not line["from_base"]:
                axes.plot([0, 1], [line["losses"][0], line["losses"][-1]], color=color, linestyle=":", linewidth=1)
        axes.plot([], [], color="grey", linestyle=":", linewidth=1, label="straight between the ends")
        axes.set(title=data, xlabel="share of the way", xlim=(-0.02, 1.02))
    row.flat[0].set_ylabel("loss, nats per token")
    _legend(figure, row.flat[0])
    return figure
