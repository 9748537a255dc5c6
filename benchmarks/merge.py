"""``merge`` against mergekit and against plain copies of the same bytes.

    python benchmarks/merge.py [--sizes 374M,1.1B] [--rounds 2] [--threads 2] [--jobs ties,linear]

Random Llama-shaped checkpoints in bf16: a base and fine-tunes of it, three of 374 M parameters, four of 1.1 B. Every job is
a fresh process; ours and mergekit's alternate. mergekit runs the same YAML with ``dtype: bfloat16``, as its users do, from
its Python function, lazily; PCB it does not have. ``first`` is the first round, ``seconds`` the best of all: the whole
process; ``past start`` leaves out the interpreter and imports, measured inside. ``cold`` is a first run with an empty cache
of compiled loops, on tiny models: what compilation costs once. ``anonymous`` is the peak of memory that the process itself
allocated (RssAnon, sampled every 5 ms), ``total`` its VmHWM, which also counts mapped pages of files.

Results measured on the same machine before (another size, other jobs) stay in results/merge.json.

The floors, from the page cache as everything else: ``copy`` (the output's bytes read and written with fsync) and ``read N
and write`` (N models are read, the output is written with fsync); every job is compared with that of as many models.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import RESULTS, machine, make_llama, table, write_result

SIZES = {
    "tiny": {"hidden": 64, "layers": 2, "intermediate": 160, "heads": 4, "vocabulary": 1024},
    "374M": {"hidden": 1024, "layers": 24, "intermediate": 2816, "heads": 16, "vocabulary": 32000},
    "1.1B": {"hidden": 2048, "layers": 22, "intermediate": 5632, "heads": 32, "vocabulary": 32000},
}
TUNED = {"tiny": 3, "374M": 3, "1.1B": 4}
JOBS = ("linear", "task arithmetic", "ties", "dare-ties", "slerp", "pcb")
BLOCK = 1 << 20


def watch() -> dict[str, int]:
    """The largest anonymous memory of this process, sampled from a thread."""
    peak = {"anonymous": 0}

    def look() -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak["anonymous"] = max(peak["anonymous"], int(line.split()[1]) * 1024)
            time.sleep(0.005)

    threading.Thread(target=look, daemon=True).start()
    return peak


def recipe(name: str, folder: Path) -> dict[str, Any]:
    """mergekit's YAML of a job."""
    tuned = [str(path) for path in sorted(folder.glob("tuned*"))]
    base = str(folder / "base")
    settings: dict[str, Any] = {"weight": round(1 / len(tuned), 4)}
    made: dict[str, Any] = {"dtype": "bfloat16", "base_model": base}
    if name == "linear":
        del made["base_model"]
    if name in ("ties", "dare-ties"):
        settings["density"] = 0.3
    if name == "slerp":
        return {**made, "merge_method": "slerp", "models": [{"model": base}, {"model": tuned[0]}], "parameters": {"t": 0.4}}
    method = {"task arithmetic": "task_arithmetic", "dare-ties": "dare_ties"}.get(name, name)
    return {**made, "merge_method": method, "models": [{"model": path, "parameters": settings} for path in tuned]}


def floor(name: str, folder: Path, out: Path) -> None:
    """Read what is read and write what is written, with fsync."""
    out.mkdir()
    buffer = memoryview(bytearray(BLOCK))
    base = folder / "base"
    models = [base, *sorted(folder.glob("tuned*"))][: 1 if name == "copy" else int(name.split()[1])]
    for model in models:
        for file in sorted(model.glob("*.safetensors")):
            with file.open("rb", buffering=0) as source, (out / file.name if model == base else Path(os.devnull)).open("wb", buffering=0) as sink:
                while count := source.readinto(buffer):
                    if model == base:
                        sink.write(buffer[:count])
                if model == base:
                    os.fsync(sink.fileno())


def job(tool: str, name: str, folder: Path, out: Path, threads: int) -> float:
    """Do one job in this process; returns when its work began."""
    if tool == "floor":
        began = time.perf_counter()
        floor(name, folder, out)
        return began
    import torch
    import yaml

    torch.set_num_threads(threads)
    file = folder / f"{name}.yaml"
    if tool == "mergekit":
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        content = recipe(name, folder)
        began = time.perf_counter()
        run_merge(MergeConfiguration.model_validate(content), str(out), MergeOptions(lazy_unpickle=True, copy_tokenizer=True, random_seed=0, quiet=True))
        for written in out.iterdir():
            with written.open("rb") as opened:
                os.fsync(opened.fileno())
        return began
    import espalier
    import espalier.exchange.merging

    began = time.perf_counter()
    if name == "pcb":
        tuned = [str(path) for path in sorted(folder.glob("tuned*"))]
        espalier.merge(tuned, str(out), method="pcb", model=str(folder / "base"), quiet=True)
    else:
        file.write_text(yaml.safe_dump(recipe(name, folder)))
        espalier.merge([str(file)], str(out), quiet=True)
    return began


def reads(name: str, size: str) -> str:
    """The floor of a job: how many models it reads."""
    if not name.startswith(("copy", "read")):
        return f"read { {'linear': TUNED[size], 'slerp': 2}.get(name, TUNED[size] + 1)} and write"
    return name


def worker(tool: str, name: str, folder: Path, threads: int) -> None:
    """Run one job and print what it took; or make the models, of which this process's parent then keeps no memory."""
    if tool == "prepare":
        print(prepare(folder, name))
        return
    peak = watch()
    began = job(tool, name, folder, folder / "out", threads)
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text()
    total = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(json.dumps({"past_start": seconds, "anonymous": peak["anonymous"], "total": total}))


def run(tool: str, name: str, folder: Path, threads: int, more: dict[str, str] | None = None) -> Any:
    """What one fresh process prints."""
    command = [sys.executable, __file__, "--worker", name, "--tool", tool, "--folder", str(folder), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **(more or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} {name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(tool: str, name: str, folder: Path, threads: int, more: dict[str, str] | None = None) -> dict[str, float]:
    """One job in a fresh process."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    began = time.perf_counter()
    found = run(tool, name, folder, threads, more)
    return {"seconds": time.perf_counter() - began, **found}


def prepare(folder: Path, size: str) -> int:
    """The base and its fine-tunes: every number moves a little, by tensor in memory. Returns the bytes of one."""
    import torch

    from espalier.checkpoint.directory import ModelDirectory
    from espalier.checkpoint.safetensors_file import SafetensorsFile, write_safetensors

    make_llama(folder / "base", **SIZES[size])
    directory = ModelDirectory(folder / "base")
    for number in range(TUNED[size]):
        tuned = folder / f"tuned{number}"
        shutil.copytree(folder / "base", tuned)
        generator = torch.Generator().manual_seed(number)
        for file in directory.files():
            with SafetensorsFile(folder / "base" / file) as opened:
                tensors = {name: opened.read(name) for name in opened.tensors}
            for tensor in tensors.values():
                tensor += torch.randn(tensor.shape, generator=generator).mul_(0.002).to(tensor.dtype)
            write_safetensors(tuned / file, tensors)
    return directory.nbytes()


def cold(name: str, threads: int) -> float:
    """Seconds of a first run on tiny models with nothing compiled before."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run("prepare", "tiny", folder, threads)
        cache = {"NUMBA_CACHE_DIR": str(folder / "numba"), "ESPALIER_CACHE": str(folder / "cache")}
        return measure("espalier", name, folder, threads, cache)["past_start"]


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="374M,1.1B")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scratch", type=Path, help="folder for the models and results of the merges; default: the system's temporary one")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--tool", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(a.tool, a.worker, a.folder, a.threads)
        return
    jobs = a.jobs.split(",")
    compiled = {name: cold(name, a.threads) for name in jobs}
    rows: list[dict[str, Any]] = []
    for size in a.sizes.split(","):
        with tempfile.TemporaryDirectory(dir=a.scratch) as temporary:
            folder = Path(temporary)
            nbytes = run("prepare", size, folder, a.threads)
            todo = [("floor", name) for name in dict.fromkeys(["copy", *(reads(name, size) for name in jobs)])]
            for name in jobs:
                todo += [("espalier", name)] + ([("mergekit", name)] if name != "pcb" else [])
            found: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in todo}
            for _ in range(a.rounds):
                for (tool, name), results in found.items():
                    results.append(measure(tool, name, folder, a.threads))
                    print(size, tool, name, results[-1], file=sys.stderr, flush=True)
        best = {key: min(results, key=lambda r: r["seconds"]) for key, results in found.items()}
        for (tool, name), r in best.items():
            peer = best.get(("mergekit", name))
            rows.append({
                "model": f"{size} x {TUNED[size]}", "job": name, "by": tool, "seconds": round(r["seconds"], 2),
                "first": round(found[tool, name][0]["seconds"], 2), "past start": round(r["past_start"], 2),
                "mergekit's / ours": round(peer["seconds"] / r["seconds"], 1) if peer and tool == "espalier" else "",
                "of copy": round(r["past_start"] / best["floor", "copy"]["past_start"], 2),
                "of read and write": round(r["past_start"] / best["floor", reads(name, size)]["past_start"], 2),
                "anonymous MiB": round(r["anonymous"] / 2**20), "total MiB": round(r["total"] / 2**20),
                "cold": round(compiled[name], 2) if tool == "espalier" else "", "GB written": round(nbytes / 1e9, 2),
            })  # fmt: skip
        print(table(list(rows[0]), [list(row.values()) for row in rows if row["model"].startswith(size)]), flush=True)
    if a.sizes != "tiny":
        conditions = {"machine": machine(), "threads": a.threads, "rounds": a.rounds}
        path = RESULTS / "merge.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        again = {(row["model"], row["job"], row["by"]) for row in rows}
        kept = before.get("rows", []) if all(before.get(key) == value for key, value in conditions.items()) else []
        rows = [row for row in kept if (row["model"], row["job"], row["by"]) not in again] + rows
        write_result("merge", {**conditions, "rows": rows})


if __name__ == "__main__":
    main()
