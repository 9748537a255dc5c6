"""Merge search: the merge of models that does best on data, as an ordinary recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from espalier.verbs._merge_problem import MergeProblem, Trial


def merge_search(
    models: list[str],
    out: str,
    data: list[str],
    *,
    strategy: str = "cma",
    budget: int | None = None,
    select: list[str] | None = None,
    finalists: int = 5,
    relative: bool = False,
    method: str | None = None,
    model: str | None = None,
    any_base: bool = False,
    no_model: bool = False,
    sequence_length: int | None = None,
    micro_batch_size: int = 8,
    device: str | None = None,
    threads: int | None = None,
    seed: int = 0,
    resume: bool = False,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Find the merge of models, or deltas, that loses least on data; the winner is an ordinary recipe.

    Args:
        models: directories of models or deltas, hub ids; or one recipe that leaves numbers open ({search: [low, high]})
        out: directory of the search: recipe.yaml, model, report.md and the record of every candidate
        data: what candidates are tried on; of several the mean counts; may be given several times
        strategy: how candidates are chosen (see `espalier methods --kind search`)
        budget: candidates that may be tried, or steps; default: the strategy's
        select: data that choose the winner among the best candidates, for the search may overfit its own; may be given several times
        finalists: with --select: among how many
        relative: divide each data set's loss by that of the best single model there, so that all count the same
        method: of the merge, for models without a recipe; its weights are searched from 0 to 1
        model: the base: what changes are changes of; default: the one that a delta names
        any_base: accept deltas that were made for another base
        no_model: write no model, only its recipe
        sequence_length: longest context, in tokens; default: 512, or all positions of a model with fewer
        micro_batch_size: sequences that run at a time
        device: such as cpu or cuda; default: cuda where there is one
        threads: CPU threads
        seed: of the strategy's random numbers, and of the recipe's where it has none
        resume: go on with a search that was cut off; what it tried is not tried again
        quiet: print nothing but the result
        options: the strategy's options, and those of the merge's method

    Returns:
        `out`, `strategy`, `method`, `trials`, `budget`, `loss` (what was minimized), `losses` and `selected` (by data set, nats per
        token), `alone` (model to its losses), `recipe` and `model` (paths), `notes`, `seconds`.

    Raises:
        EspalierError: for a recipe or an option that is wrong, models that do not merge, or a search that cannot be resumed.
    """
    import math
    import time
    from contextlib import ExitStack
    from pathlib import Path

    from espalier import registry
    from espalier.checkpoint.atomic import write_text
    from espalier.data.sources import open_source
    from espalier.display import Display
    from espalier.errors import EspalierError, at_least
    from espalier.exchange import merge_plan, merge_recipe
    from espalier.exchange.answers import Answers
    from espalier.exchange.merge_space import Space
    from espalier.train import session
    from espalier.verbs._merge_problem import MergeProblem
    from espalier.verbs._search_report import write_report
    from espalier.verbs.merge import merge

    display = Display(quiet)
    began = time.perf_counter()
    target, data, select = Path(out), _listed(data), _listed(select or [])
    at_least("finalists", finalists, 1)
    if not data or len(set(data)) < len(data) or len(set(select)) < len(select):
        raise EspalierError(f"--data is {data} and --select {select}; give each data set once, and at least one to try candidates on")
    if set(data) & set(select):
        raise EspalierError(f"{(set(data) & set(select)).pop()} is in --data and in --select; what chooses the winner must be other data")
    info = registry.find(strategy, "searcher")
    own = {name: value for name, value in options.items() if name in [h.name for h in info.hyperparameters]}
    of_method = {name: value for name, value in options.items() if name not in own}
    search, own = registry.options_of(strategy, "searcher", own)
    budget = info.settings["budget"] if budget is None else budget
    at_least("budget", budget, 1)
    where, content = _content(_listed(models), method, model, any_base, seed, info.settings["genes"])
    if not info.settings["genes"] and (method is not None or of_method):
        what = next(iter(of_method), "method")
        raise EspalierError(f"{strategy} chooses the method of the merge and its options by itself; leave out --{what.replace('_', '-')}")
    if of_method:
        if "method" not in content:
            raise EspalierError(f"{next(iter(of_method))} is no option of {strategy}, and there is no method of merging that it could be one of")
        given = merge_recipe.given_options(content["method"], of_method)[1]
        content["options"] = {**(content.get("options") or {}), **given}
    content.setdefault("method", "linear")  # the strategy takes its own
    opened = merge_plan.opened(_alike(content, where))
    space = Space(content, len(content["models"]), _blocks(content, opened))
    if info.settings["genes"] and not space.genes:
        raise EspalierError(f"{where} leaves nothing open for {strategy} to choose; write {{search: [low, high]}} in the place of a number")
    if space.genes and not info.settings["genes"]:
        raise EspalierError(f"{strategy} chooses by itself; {where} leaves {space.genes[0].name} open, which it would not look at")
    recipe = merge_recipe.Recipe.of(space.at([0.5] * len(space.genes)), where)
    arguments = {
        "strategy": strategy, "options": own, "budget": budget, "seed": seed, "data": data, "select": select, "finalists": finalists, "content": content,
        "relative": relative, "sequence_length": sequence_length, "micro_batch_size": micro_batch_size, "device": device,
        "files": [open_source(name).identity() for name in [*data, *select]] + [_files(path) for path in [opened.like.path, *(m.path for m in opened.members)]],
    }  # fmt: skip
    _open(target, arguments, resume)
    answers = Answers(target / "trials.jsonl")
    session.seed_everything(seed, threads)
    with ExitStack() as stack:
        counts = info.settings.get("counts", "candidates")
        update = stack.enter_context(display.bar(strategy, budget, counts))
        problem = MergeProblem(
            space, recipe, opened, data=data, relative=relative, budget=budget, seed=seed, answers=answers, sequence_length=sequence_length,
            micro_batch_size=micro_batch_size, device=device, display=display, stack=stack,
            progress=lambda trials, gradients, best: update(gradients if counts == "steps" else trials - (counts == "rounds"), best=f"{best:.4f}"),
        )  # fmt: skip
        alone = {}
        for number in [*range(problem.models), *([None] if opened.base_name is not None else [])]:
            name = str(opened.base_name) if number is None else problem.paths[number]
            alone[name] = problem.losses_alone(number)
            display.note(f"{name} alone: {', '.join(f'{file} {loss:.4f}' for file, loss in alone[name].items())}")
        search(problem, **own)
        if not problem.trials or not math.isfinite(problem.best.loss):
            raise EspalierError(f"{strategy} found no candidate that can be merged; see {answers.path}")
        winner, selected = _winner(problem, select, finalists)
        single = min(range(problem.models), key=problem.alone)
        chosen_single = problem.losses_alone(single, select) if select else {}
    if problem.alone(single) < winner.loss:
        display.warn(f"no candidate does better than {problem.paths[single]} alone: {problem.alone(single):.4f} against {winner.loss:.4f}")
    final = merge_recipe.Recipe.of(winner.recipe, "the winner")
    write_text(target / "recipe.yaml", merge_recipe.as_yaml(final, registry.find(final.method, "merger")))
    if not no_model and not (target / "model").exists():
        merge([str(target / "recipe.yaml")], str(target / "model"), threads=threads, quiet=True)
    seconds = time.perf_counter() - began
    write_report(
        target, problem, winner, selected, alone, (problem.paths[single], chosen_single), strategy=strategy, options=own, data=data, select=select, budget=budget,
        display=display,
    )  # fmt: skip
    display.note(f"{len(problem.trials)} candidates in {seconds:.0f} s; the best loses {winner.loss:.4f} ({winner.about}); its recipe is {target / 'recipe.yaml'}")
    return {
        "out": str(target),
        "strategy": strategy,
        "method": final.method,
        "trials": len(problem.trials),
        "budget": budget,
        "loss": winner.loss,
        "losses": dict(winner.losses),
        "selected": dict(selected),
        "alone": {path: dict(losses) for path, losses in alone.items()},
        "recipe": str(target / "recipe.yaml"),
        "model": None if no_model else str(target / "model"),
        "notes": problem.notes,
        "seconds": seconds,
    }


def _listed(given: list[str] | str) -> list[str]:
    return [given] if isinstance(given, str) else [str(path) for path in given]


def _content(models: list[str], method: str | None, model: str | None, any_base: bool, seed: int, genes: bool) -> tuple[str, dict[str, Any]]:
    """What the recipe says, or a recipe of the models on the command line, and where that is from."""

    from espalier.errors import EspalierError
    from espalier.exchange import mergekit_recipe

    where = "the command line"
    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        where = models[0]
        content = mergekit_recipe.read(where)
        if not isinstance(content.get("models"), list) or not content["models"]:
            raise EspalierError(f"{where}: models: it must be a list of models (it is {str(content.get('models'))[:80]})")
        if content.get("to", "model") != "model" or content.get("space"):
            raise EspalierError(f"{where}: a search makes models; leave to and space out, and merge its recipe.yaml with --to delta")
    else:
        content = {"models": [{"path": path} for path in models]}
        if genes:
            if method is None:
                raise EspalierError("merge search needs a recipe that leaves numbers open, or --method and models whose weights it may choose")
            content["models"] = [{"path": path, "weight": {"search": [0.0, 1.0]}} for path in models]
    given = {"method": method, "model": None if model is None else str(model), "any_base": any_base or None}
    content |= {entry: value for entry, value in given.items() if value is not None}
    content.setdefault("seed", seed)
    return where, content


def _alike(content: dict[str, Any], where: str) -> Any:
    """A recipe that opens the same models."""
    from espalier.exchange.merge_recipe import Recipe

    models = [{"path": m.get("path")} if isinstance(m, dict) else m for m in content["models"]]
    kept = {entry: content[entry] for entry in ("model", "any_base", "vocabulary") if entry in content}
    return Recipe.of({"method": "linear", "models": models, **kept}, where)


def _blocks(content: dict[str, Any], opened: Any) -> int:
    """How many blocks the new model has."""
    from espalier.exchange.merge_recipe import block_of

    try:
        return sum(stop - start for part in content["stack"] for start, stop in list(part["blocks"].values())[:1])
    except (KeyError, TypeError, ValueError, AttributeError):  # no stack, or one that is open or wrong, which is said later
        return 1 + max((block for name in opened.like.names if (block := block_of(name)) is not None), default=0)


def _files(folder: Path) -> str:
    """Which weights are in a directory."""
    found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors*"))]
    return f"{folder} {found}"


def _open(target: Path, arguments: dict[str, Any], resume: bool) -> None:
    """Begin a search in its directory, or see that it is the one to go on with."""
    import json

    from espalier.checkpoint.atomic import refuse_existing, write_text
    from espalier.checkpoint.directory import read_json
    from espalier.errors import EspalierError

    file, now = target / "search.json", json.loads(json.dumps(arguments))
    if not file.exists():
        refuse_existing(target)
        target.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(now, indent=1) + "\n")
        return
    if not resume:
        raise EspalierError(f"{target} holds a search; go on with it by --resume, or give another --out")
    before = read_json(file)
    if not isinstance(before, dict):
        raise EspalierError(f"{file} does not say which search this is; give another --out")
    for name, value in now.items():
        if before.get(name) != value:
            raise EspalierError(f"{target} holds a search with {name} {str(before.get(name))[:80]}, this one has {str(value)[:80]}; give another --out")


def _winner(problem: MergeProblem, select: list[str], finalists: int) -> tuple[Trial, dict[str, float]]:
    """The best trial, or of the best ones the best on other data; and its losses there."""
    import math

    ordered = sorted((trial for trial in problem.trials if math.isfinite(trial.loss)), key=lambda trial: trial.loss)
    if not select:
        return ordered[0], {}
    best: dict[str, Trial] = {}
    for trial in ordered:  # of equal recipes the first
        best.setdefault(str(trial.recipe), trial)
    scored = [(trial, dict(problem.losses(trial.recipe, f"selection: trial {trial.number}", select))) for trial in list(best.values())[:finalists]]
    return min(scored, key=lambda pair: problem.objective(pair[1]))
