"""Make seedling, the embedded model, from nothing: tokenizer, pretraining, evaluation, publication.

    python seedling/build.py                            # what `make seedling` does: all of it, hours
    python seedling/build.py --model DIR                # evaluate a model directory, train nothing
    python seedling/build.py --from-checkpoint DIR      # make a model of a running run's checkpoint, evaluate it
    python seedling/build.py ... --publish              # also put it into the package, in place of the one there

Each stage is skipped when its result exists, and pretraining goes on after its last checkpoint, so the same
command repairs whatever stopped it. Results lie in --out (default runs/seedling): ``tokenizer/``, ``model/`` or
``step-N/``, ``figures-HASH.json`` with ``completions-HASH.jsonl`` (the syntax test's pieces), and ``report/``.
Without a bundled model the one that was trained here by seedling's own recipe is published; an existing one is
replaced only with --publish. Exit code 1 when a bar is not met, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import results
import syntax

from espalier.checkpoint.atomic import atomic_directory, write_text
from espalier.checkpoint.directory import ModelDirectory, read_json, resolve_model
from espalier.checkpoint.fingerprint import file_digest
from espalier.errors import EspalierError

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "src" / "espalier" / "bundled" / "seedling"
RECIPE = ROOT / "seedling" / "recipe.yaml"
LARGEST = 12_000_000
"""Bytes that the published directory may have."""
LEAST, AIM = 0.15, 0.25
"""How far bits per byte must be, and should be, under the Kneser-Ney model's, as a share of them."""
SYNTAX = 0.7
"""Least share of parsing completions, in units of the share that the files reach."""
SEQUENCE_LENGTH = 1024
HELD_OUT, VALID = ("stdlib:asyncio", "stdlib:email", "stdlib:xml"), "stdlib:valid"
_SUFFIX = ".espalier.weight:full.values"


def say(text: str) -> None:
    """A line of progress."""
    print(f"seedling: {text}", flush=True)


def _from_root(path: Path) -> str:
    """A path as the recipe of the run records it: relative inside the checkout, so that the checkout may move."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


# -- making the model


def make_tokenizer(folder: Path) -> None:
    """Stage 1: train the tokenizer."""
    if folder.exists():
        say(f"tokenizer: {folder} exists")
        return
    from tokenizer import build

    say("tokenizer: training")
    with atomic_directory(folder) as temporary:
        build().save_pretrained(temporary)


def pretrain(recipe: Path, tokenizer: Path, out: Path, threads: int | None) -> None:
    """Stage 2: `espalier pretrain`, from its last checkpoint where there is one.

    Raises:
        SystemExit: with its exit code when it fails.
    """
    if (out / "run" / "result.json").exists():
        say(f"pretrain: {out} is trained")
        return
    command = [sys.executable, "-m", "espalier", "pretrain", "--config", _from_root(recipe), "--tokenizer", _from_root(tokenizer)]
    command += ["--out", _from_root(out), "--resume", *(["--threads", str(threads)] if threads else [])]
    say(f"pretrain: {' '.join(command[1:])}")
    if code := subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(code if code > 0 else 128 - code)  # a signal's, as a shell gives it


def model_of_checkpoint(checkpoint: Path, out: Path) -> Path:
    """An ordinary model directory from a checkpoint of a pretraining run, which may still be going on.

    Its trained float32 values are rounded to bf16 as the end of the run would round them. The run's record up
    to that step is copied into ``run/``.

    Raises:
        EspalierError: when it is damaged, or no checkpoint of a run with the method ``full``.
    """
    import torch
    import transformers

    from espalier.attach.load import load_tokenizer
    from espalier.checkpoint.safetensors_file import read_safetensors
    from espalier.train.checkpoint import check

    state = check(checkpoint)
    run = checkpoint.resolve().parents[1]
    record = read_json(run / "run.json")
    if record["verb"] != "pretrain" or not record["resolved"]["architecture"]:
        raise EspalierError(f"{run} is a run of {record['verb']}; --from-checkpoint takes one of pretrain from an architecture")
    target = out / f"step-{state['step']:08d}"
    if target.exists():
        say(f"{target} exists")
        return target
    trained = read_safetensors(checkpoint / "trained.safetensors")
    if odd := [name for name in trained if not name.endswith(_SUFFIX)]:
        raise EspalierError(f"{checkpoint} holds {odd[0]!r}; only checkpoints of full pretraining become models by themselves")
    values = {name.removesuffix(_SUFFIX) + ".weight": tensor.to(torch.bfloat16) for name, tensor in trained.items()}
    config = transformers.AutoConfig.from_pretrained(ROOT / record["resolved"]["architecture"])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    missing, unexpected = model.load_state_dict(values, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:  # the head is the embedding, and holds what that was given
        raise EspalierError(f"{checkpoint} does not fit {record['resolved']['architecture']}: {[*missing, *unexpected][:3]}")
    with atomic_directory(target) as temporary:
        model.save_pretrained(temporary)
        load_tokenizer(ROOT / record["resolved"]["tokenizer"]).save_pretrained(temporary)
        (temporary / "run").mkdir()
        shutil.copy(run / "run.json", temporary / "run")
        shutil.copy(checkpoint / "state.json", temporary / "run")
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        # the run may be writing its last line now; those up to the checkpoint are whole
        done = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
        (temporary / "run" / "metrics.jsonl").write_text("".join(done))
    say(f"step {state['step']:,} is now the model {target}")
    return target


# -- measuring it


def _split_sizes(encoder: Any) -> dict[str, dict[str, int]]:
    from espalier.data.sources import open_source
    from espalier.data.store import open_store

    sizes = {}
    for name in ("stdlib:train", VALID, *HELD_OUT):
        source = open_source(name)
        store = open_store(source, encoder)
        sizes[name] = {"files": len(source.files), "bytes": int(store.nbytes.sum()), "tokens": store.tokens}
    return sizes


def measure_bits(model: Path, encoder: Any, threads: int | None) -> dict[str, dict[str, Any]]:
    """Bits per byte of the model and of both Kneser-Ney models, by data set and over the held-out packages together."""
    from kneser_ney import KneserNey, bits_per_byte, documents

    import espalier
    from espalier.data.sources import open_source
    from espalier.data.store import open_store

    train = documents(open_store(open_source("stdlib:train"), encoder))
    plain = KneserNey(train, len(encoder.tokenizer))
    modified = KneserNey(train, len(encoder.tokenizer), modified=True)
    figures: dict[str, dict[str, Any]] = {}
    for name in (VALID, *HELD_OUT):
        store = open_store(open_source(name), encoder)
        # the chosen path is the public one, so that anybody's `espalier eval` prints the same number
        score = espalier.eval(str(model), name, sequence_length=SEQUENCE_LENGTH, micro_batch_size=4, threads=threads, quiet=True)
        figures[name] = {
            "model": score["bits_per_byte"], "kneser_ney": float(bits_per_byte(plain, store)),
            "modified_kneser_ney": float(bits_per_byte(modified, store)), "bytes": score["bytes"], "tokens": score["tokens"],
        }  # fmt: skip
        say(f"evaluate: {name}: {figures[name]['model']:.4f} bits per byte, Kneser-Ney {figures[name]['kneser_ney']:.4f}")
    parts = [figures[name] for name in HELD_OUT]
    figures["held-out"] = {
        key: results.pooled([{"bits_per_byte": part[key], "bytes": part["bytes"]} for part in parts])
        for key in ("model", "kneser_ney", "modified_kneser_ney")
    }
    return figures


def measure_syntax(model: Path, encoder: Any, samples: int, completions: Path) -> dict[str, Any]:
    """Counts of pieces that parse, of the model's and of the files'; the pieces go to ``completions``."""
    from kneser_ney import documents

    import espalier
    from espalier.data.sources import open_source
    from espalier.data.store import open_store

    texts = [document for name in HELD_OUT for document in documents(open_store(open_source(name), encoder))]
    drawn = syntax.places(texts, encoder.tokenizer, samples)
    records = list(syntax.compare(espalier.load(str(model)), encoder.tokenizer, drawn))
    write_text(completions, "".join(json.dumps(record) + "\n" for record in records))
    figures: dict[str, Any] = {
        "samples": samples, "tokens": syntax.LENGTH, "context": syntax.CONTEXT, "temperature": syntax.TEMPERATURE,
        "top_p": syntax.TOP_P,
    }  # fmt: skip
    for rule, key in (("running", "parses"), ("textwrap", "parses_by_textwrap")):
        ours, files = (sum(record[who][key] for record in records) for who in ("model", "file"))
        figures[rule] = {"model": ours, "file": files, "ratio": ours / files if files else None}
    say(f"evaluate: {figures['running']['model']} of {samples} completions parse, {figures['running']['file']} of the files' own")
    return figures


def evaluate(model: Path, out: Path, samples: int, threads: int | None) -> dict[str, Any]:
    """Stage 3: all figures of a model; they are kept by the hash of its weights."""
    import torch

    from espalier.attach.load import load_tokenizer
    from espalier.data.encode import Encoder

    if threads:
        torch.set_num_threads(threads)
    digest = file_digest(model / "model.safetensors")
    kept = out / f"figures-{digest[:12]}.json"
    if kept.exists() and (figures := read_json(kept))["syntax"]["samples"] == samples:
        say(f"evaluate: {kept} has the figures of {model}")
        return figures
    encoder = Encoder(load_tokenizer(model))
    directory = ModelDirectory(model)
    bits = measure_bits(model, encoder, threads)
    pieces = measure_syntax(model, encoder, samples, out / f"completions-{digest[:12]}.jsonl")
    under, ratio = 1 - bits["held-out"]["model"] / bits["held-out"]["kneser_ney"], pieces["running"]["ratio"]
    figures = {
        "sha256": digest, "parameters": sum(torch.Size(directory.info(name).shape).numel() for name in directory),
        "sequence_length": SEQUENCE_LENGTH, "splits": _split_sizes(encoder), "bits_per_byte": bits, "syntax": pieces,
        "bars": {
            "bits_per_byte": {"value": under, "least": LEAST, "aim": AIM, "met": under >= LEAST},
            "syntax": {"value": ratio, "least": SYNTAX, "met": ratio is not None and ratio >= SYNTAX},
        },
    }  # fmt: skip
    write_text(kept, json.dumps(figures, indent=1) + "\n")
    return figures


# -- telling and shipping it


def write_report(folder: Path, model: Path, figures: dict[str, Any]) -> None:
    """``RESULTS.md`` and, where the model's run is known, the curve."""
    run = results.RunRecord(model / "run") if (model / "run" / "run.json").exists() else None
    write_text(folder / "RESULTS.md", results.results_markdown(run, figures))
    if run is not None:
        write_text(folder / "curve.csv", results.curve_csv(run))
        results.curve_png(run, figures, folder / "curve.png")
    say(f"the report is in {folder}")


def corpus_record() -> str:
    """The content of ``stdlib.json``: Python's version, the hash of every file of the data sets, and their split."""
    from espalier.bundled import corpus

    files = corpus.hashes()
    splits: dict[str, list[str]] = {}
    for name in files:
        splits.setdefault(corpus.split_of(name), []).append(name)
    return json.dumps({"python": platform.python_version(), "files": files, "splits": splits}, indent=1) + "\n"


def publish(model: Path, figures: dict[str, Any]) -> None:
    """Stage 4: put the model, its report and the record of its data where the package and the repository have them.

    Raises:
        EspalierError: when it is not in bf16, or too large.
    """
    directory = ModelDirectory(model)
    if kinds := {directory.info(name).dtype for name in directory} - {"BF16"}:
        raise EspalierError(f"{model} holds tensors of {', '.join(sorted(kinds))}; seedling is shipped in bf16")
    files = [model / name for name in directory.files()] + list(directory.side_files().values())
    if (size := sum(file.stat().st_size for file in files)) > LARGEST:
        raise EspalierError(f"{model} has {size:,} bytes; at most {LARGEST:,} are shipped")
    fresh = BUNDLED.with_name(".seedling-new")
    shutil.rmtree(fresh, ignore_errors=True)
    with atomic_directory(fresh) as temporary:
        for file in files:
            shutil.copyfile(file, temporary / file.name)
    shutil.rmtree(BUNDLED, ignore_errors=True)
    fresh.rename(BUNDLED)
    write_text(BUNDLED.with_name("stdlib.json"), corpus_record())
    write_report(ROOT / "seedling", model, figures)
    say(f"published {model} to {BUNDLED} ({size:,} bytes)")


def main() -> int:
    """Run the stages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "seedling", help="where everything goes")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="of the pretraining")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="DIR", help="evaluate this model directory (or `seedling`) instead of training one")
    which.add_argument("--from-checkpoint", type=Path, metavar="DIR", help="such as OUT/model/run/checkpoints/step-00000100")
    parser.add_argument("--samples", type=int, default=50, help="completions of the syntax test; the bar is on 50")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--publish", action="store_true", help="put the model into the package, also over another")
    a = parser.parse_args()
    out: Path = a.out.resolve()
    if a.from_checkpoint:
        model = model_of_checkpoint(a.from_checkpoint, out)
    elif a.model:
        model = resolve_model(a.model)
    else:
        make_tokenizer(out / "tokenizer")
        model = out / "model"
        pretrain(a.recipe, out / "tokenizer", model, a.threads)
    figures = evaluate(model, out, a.samples, a.threads)
    ours = not (a.model or a.from_checkpoint) and a.recipe.resolve() == RECIPE
    if a.publish or (ours and not (BUNDLED / "model.safetensors").exists()):
        publish(model, figures)
    else:
        write_report(out / "report", model, figures)
        say("not published: --publish puts it into the package")
    print()
    for line in results.bar_lines(figures):
        print(line)
    return 0 if all(bar["met"] for bar in figures["bars"].values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EspalierError as error:
        print(f"seedling/build.py: {error}", file=sys.stderr)
        sys.exit(2)
