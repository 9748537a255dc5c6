"""Merge match: line up the units of two models by permutations, and merge them as far as a width allows."""

from __future__ import annotations

from typing import Any, Literal

_BARRIER = 0.01
"""Share of A's loss from which on a barrier is worth a warning."""

_KINDS = {"residual": "units of the residual stream", "groups": "key-value groups", "channels": "channels"}


def merge_match(
    a: str,
    b: str,
    out: str,
    *,
    by: Literal["weights", "activations"] = "weights",
    to: Literal["delta", "model"] | None = None,
    width: float | None = None,
    flops: float | None = None,
    widen: Literal["all", "channels", "heads"] = "all",
    data: str | None = None,
    eval_data: str | None = None,
    tokens: int = 32768,
    sequence_length: int | None = None,
    ridge: float = 1e-6,
    sweeps: int = 100,
    points: int = 5,
    gamma: float = 0.3,
    report: bool = True,
    threads: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Permute the units of B so that they line up with those of A, which changes nothing that B computes; or merge the two.

    Args:
        a: a directory, `seedling`, or a hub id: what B is lined up with
        b: a model of the same architecture and tokens, trained on its own
        out: directory of what is written
        by: what must be alike: weights, or activations on --data
        to: write the delta that permutes B, or the permuted B; default: delta
        width: merge A and the permuted B (PLeaS), 1.0 into the width that they have, 2.0 keeping all channels and heads of both
        flops: merge within so many times the multiplications of one model, from 1.0 to 2.0; keeps apart what is least alike
        widen: what --width and --flops are for: all, only channels of feed-forwards, or only attention heads
        data: text for activations, for the least squares of a merge, and for the barrier
        eval_data: other text for the barrier; default: that of --data
        tokens: how many of each; 0: all
        sequence_length: longest sequence, in tokens; default: 512, or all positions of a model with fewer
        ridge: of the least squares: times the mean of the diagonal is added to it
        sweeps: of coordinate descent, at most
        points: places on the line from A to B where the loss is measured, both ends among them
        gamma: singular vectors count as top ones from this share of the largest singular value on
        report: measure distances and how singular vectors align; takes a decomposition of every matrix
        threads: CPU threads
        seed: of the order of the descent and of the choice of sequences
        quiet: print nothing but the result

    Returns:
        `out`, `wrote`, `objective` (start and end), `sweeps`, `moved` (units by kind, and of how many); with `report` the
        `distance` before, after and its relative `reduction`, and `alignment` before and after, of all singular vectors and of
        the top ones; with data `losses` along the line and `barrier`, before and after; for a merge `widths` (units before
        and after by kind), `flops` (of one model's), `fits` (relative squared error of every fitted layer before and after) and, with data, the
        `merged_loss`.

    Raises:
        EspalierError: when the models are not of one architecture or one vocabulary, the family's permutations are not known,
            or an option is wrong.
    """
    from pathlib import Path

    from espalier.anatomy.structure import logical_tensors
    from espalier.attach.load import load_model, torch_dtype
    from espalier.checkpoint.atomic import atomic_directory, refuse_existing
    from espalier.checkpoint.directory import ModelDirectory, resolve_model
    from espalier.display import Display
    from espalier.errors import EspalierError, at_least
    from espalier.evaluate.along_line import along, loss
    from espalier.exchange import alignment, matched, matching, pleas
    from espalier.exchange.merge_line import barrier
    from espalier.train import session
    from espalier.verbs._matching import read_text, require_one_vocabulary

    display, target = Display(quiet), Path(out)
    refuse_existing(target)
    for name, value, least in (("tokens", tokens, 0), ("sweeps", sweeps, 1), ("points", points, 3), ("ridge", ridge, 0), ("gamma", gamma, 0)):
        at_least(name, value, least)
    merges = width is not None or flops is not None
    if (width is not None) + (flops is not None) + (to is not None) > 1:
        raise EspalierError("--width and --flops merge the two models, --to writes the permutation alone; give one of them")
    if widen != "all" and not merges:
        raise EspalierError(f"--widen {widen} says what a merge makes wider; give its --width or --flops too")
    if by == "activations" and data is None:
        raise EspalierError("--by activations needs text to see them on: --data")
    session.seed_everything(seed, threads)
    names = str(a), str(b)
    directories = [ModelDirectory(resolve_model(name)) for name in names]
    require_one_vocabulary(names)
    first, second = (load_model(directory.path, "fp32", "cpu") for directory in directories)
    matching.require_alike(first, second, names)
    if merges:  # refuses what cannot be merged before anything is measured
        pleas.widths(first, 1.0 if width is None else width, widen)
        if flops is not None:
            pleas.require_budget(flops)
    texts = read_text(names[0], first.config, data, eval_data, tokens, sequence_length, seed)
    fitted_on, measured_on = texts or (None, None)

    result: dict[str, Any] = {"out": str(target), "wrote": "merged model" if merges else to or "delta"}
    losses = {"before": along(first, second, measured_on, points)} if measured_on else {}
    tensors = logical_tensors(first), logical_tensors(second)
    if report:
        far = alignment.distance(*tensors)
        one, other = (alignment.spectra(model, of) for model, of in zip((first, second), tensors, strict=True))
    evidence = None
    if by == "activations":
        assert fitted_on is not None
        with display.bar("reading activations", 2 * first.config.num_hidden_layers, "layers") as update:
            evidence = matching.correlations(first, second, fitted_on, update)
    found = matching.match(first, second, evidence=evidence, seed=seed, sweeps=sweeps)
    result |= {"by": by, "objective": [found.objectives[0], found.objectives[-1]], "sweeps": found.sweeps, "moved": found.moved}
    display.note(f"moved: {', '.join(f'{away} of {units} {_KINDS[kind]}' for kind, (away, units) in found.moved.items())} ({found.sweeps} sweeps)")
    if not any(away for away, _ in found.moved.values()):
        display.note("nothing lines up better than it did: these may be changes of one model, which `espalier merge` merges as they are")
    if report:
        near = alignment.distance(*tensors)
        result["distance"] = {"before": far, "after": near, "reduction": (far - near) / far if far else 0.0}
        after = {name: alignment.permuted(spectrum, name, found.reordered) for name, spectrum in other.items()}
        result["alignment"] = {
            kind: {
                when: sum(alignment.alignment(one[name], side[name], share) for name in one) / len(one)
                for when, side in (("before", other), ("after", after))
            }
            for kind, share in (("all", 0.0), ("top", gamma))
        }
    if measured_on:
        losses["after"] = along(first, second, measured_on, points)
        result["losses"], result["barrier"] = losses, {when: barrier(values) for when, values in losses.items()}
        if not quiet:
            rows = [(when, *(f"{value:.4f}" for value in values), f"{result['barrier'][when]:.4f}") for when, values in losses.items()]
            display.table("loss along the line from A to B", ("matching", *(f"{i / (points - 1):.2f}" for i in range(points)), "barrier"), rows)
        if result["barrier"]["after"] > _BARRIER * losses["after"][0]:
            display.warn(
                f"even matched, an average of the two loses up to {result['barrier']['after']:.3f} nats a token against what lies between them; "
                "a merge with --width or --flops and --data loses less"
            )
    with atomic_directory(target) as temporary:
        if not merges:
            options = {"by": by, "seed": seed, "sweeps": sweeps}
            delta = matched.permutation(second, found, directories[1], names, options)
            if to == "model":
                matched.write_permuted(temporary, target, delta, directories[1], names)
            else:
                matched.write_delta(temporary, delta, names)
        else:
            if width is not None:
                sizes = pleas.widths(first, width, widen)
            else:
                assert flops is not None
                sizes = pleas.budgeted(first, flops, widen, found.similarity)
            with display.bar("fitting layers", 4 * first.config.num_hidden_layers + 1, "inputs") as update:
                merged, fits = matched.merged(first, second, found, sizes, fitted_on, ridge, update)
            result["widths"], result["flops"] = sizes, pleas.flops_of(first, sizes)
            result["fits"] = {name: {"before": fit.before, "after": fit.after} for name, fit in fits.items()}
            matched.write_merged(temporary, target, merged, directories[0], torch_dtype(None, directories[0]), names)
            if measured_on:
                result["merged_loss"] = loss(merged.float(), measured_on)
            display.note(f"in each block {', '.join(f'{old} {_KINDS[kind]} became {new}' for kind, (old, new) in sizes.items())}")
    display.note(f"the {result['wrote']} is in {target}")
    return result
