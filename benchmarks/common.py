"""What the benchmarks share: the machine, tables, made models, and where results go."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Work = TypeVar("Work")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions, to be written beside every result."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {}
    for name in ("torch", "transformers", "peft", "trl", "mergekit", "numba", "espalier"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_GiB": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        **versions,
    }


def versions() -> dict[str, str]:
    """Of what computes: rows that differ in these are not put side by side."""
    return {name: version for name, version in machine().items() if name in ("torch", "transformers", "peft")}


SHAPES: dict[str, dict[str, int]] = {"70m": {}, "350m": {"hidden": 1024, "layers": 24, "intermediate": 2816, "heads": 16}}
"""Arguments of :func:`llama_config` by the parameters that they make."""


def llama_config(hidden: int = 512, layers: int = 12, intermediate: int = 1376, heads: int = 8, vocabulary: int = 32000) -> Any:
    """The config of a Llama, by default of about 70 M parameters."""
    import transformers

    return transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def make_llama(path: Path, **shape: int) -> Path:
    """A random Llama in bf16 with seedling's tokenizer, written to ``path``; ``shape`` as of :func:`llama_config`."""
    import torch
    import transformers

    from espalier.checkpoint.directory import resolve_model

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama_config(**shape)).to(torch.bfloat16)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(path)
    return path


def digest(file: str) -> str:
    """Of the code in a method's file, by its name in the registry: what was measured with another one does not count. Docstrings and comments do not matter."""
    from espalier import registry

    return digest_of((Path(registry.__file__).parents[1] / file).read_text(encoding="utf-8"))


def digest_of(source: str) -> str:
    """Of what a Python file says without its docstrings and comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for body in (part for name in ("body", "orelse", "finalbody") if isinstance(part := getattr(node, name, None), list)):
            body[:] = [one for one in body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """While no other process is in here with the same path: a benchmark may run in several parts at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class RunFailed(SystemExit):
    """A run broke; nothing is kept of it. Caught, the benchmark goes on with what else there is, and ends with this."""


IMPORTED = ["torch", "transformers.models.llama.modeling_llama", "espalier.verbs._training", "espalier.verbs.tune", "espalier.verbs.pretrain"]


def apart(function: Callable[[dict[str, Any], Path], dict[str, Any]], spec: dict[str, Any]) -> dict[str, Any]:
    """What a function of a script finds by a spec and an empty folder, in a process of its own of ``threads`` of the spec; ``failed``: why Espalier refused.

    Processes are forks of one that has imported :data:`IMPORTED` and done nothing: they begin at once, and the peak of each is its own.

    Raises:
        RunFailed: when it breaks, with what it said last.
    """
    os.environ.update({"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    answers, answer = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(function, spec, answer))
    process.start()
    answer.close()
    try:
        found = answers.recv()
    except EOFError:
        found = None
    process.join()
    if not isinstance(found, dict):
        raise RunFailed(f"{function.__name__} of {spec} failed:\n{found or f'its process ended with exit code {process.exitcode}'}")
    return found


def _answer(function: Callable[[dict[str, Any], Path], dict[str, Any]], spec: dict[str, Any], answer: Any) -> None:
    from espalier.errors import EspalierError

    with tempfile.TemporaryDirectory() as folder:
        try:
            answer.send(function(spec, Path(folder) / "out"))
        except EspalierError as error:
            answer.send({"failed": str(error)})
        except Exception:
            answer.send(traceback.format_exc()[-3000:])


def rows_of(work: Iterable[Work], make: Callable[[Work], Row], keep: Callable[[Row], None]) -> tuple[list[Row], RunFailed | None]:
    """The rows of some work, each kept as soon as it is made, and the last failure: what broke is said, and the rest goes on."""
    rows, broken = [], None
    for one in work:
        try:
            rows.append(make(one))
        except RunFailed as error:
            print(broken := error, file=sys.stderr)
        else:
            keep(rows[-1])
    return rows, broken


def best_rate(loss_at: Callable[[float], float | None], middle: float, grid: Sequence[float], more: int = 0) -> tuple[float | None, dict[float, float | None]]:
    """The learning rate of the lowest loss (``None`` where none is finite), and the loss of every one tried, ascending.

    ``grid``: factors of ``middle``, ascending. While the best is at an edge, and at most ``more`` times, one more rate is
    tried beyond it, a grid's step away.
    """
    step = grid[-1] / grid[-2] if len(grid) > 1 else 1.0
    tried: dict[float, float | None] = {}

    def attempt(rate: float) -> None:
        loss = loss_at(rate := float(f"{rate:.3g}"))
        tried[rate] = loss if loss is not None and math.isfinite(loss) else None

    def best() -> float | None:
        return min((rate for rate in tried if tried[rate] is not None), key=lambda rate: tried[rate] or 0.0, default=None)

    for factor in grid:
        attempt(middle * factor)
    for _ in range(more):
        if best() == max(tried):
            attempt(max(tried) * step)
        elif best() == min(tried):
            attempt(min(tried) / step)
    return best(), dict(sorted(tried.items()))


def say_rows(columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Print rows that have a loss, the lowest first."""
    done = sorted((row for row in rows if "loss" in row), key=lambda row: row["loss"])
    print(table(columns, [[f"{v:.4g}" if isinstance(v := row[c], float) else v for c in columns] for row in done]))


class Ledger:
    """What has been measured, by name; kept in a file, so that nothing is measured twice, and that several processes add to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        with alone(path):
            self._read()

    def _read(self) -> None:
        """What is in the file, without the line that a kill cut short."""
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):
                self.path.write_text("".join(lines := lines[:-1]))
            self.entries |= {entry["key"]: entry["value"] for entry in map(json.loads, lines)}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of a key, made and kept if no process has made it yet."""
        if key not in self.entries:
            with alone(self.path):
                self._read()
        if key not in self.entries:
            self.entries[key] = make()
            with alone(self.path), self.path.open("a") as file:
                file.write(json.dumps({"key": key, "value": self.entries[key]}) + "\n")
        return self.entries[key]


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def read_result(name: str) -> dict[str, Any]:
    """What ``results/NAME.json`` holds; nothing where there is none."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write_result(name: str, content: dict[str, Any]) -> None:
    """Write ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def with_row(rows: Sequence[dict[str, Any]], row: dict[str, Any], by: Sequence[str]) -> list[dict[str, Any]]:
    """Rows with one more, in the place of the one that has the same values of ``by``."""
    return [r for r in rows if [r[k] for k in by] != [row[k] for k in by]] + [row]


def with_rows(part: dict[str, Any], conditions: dict[str, Any], rows: Sequence[Row], by: Sequence[str]) -> dict[str, Any]:
    """A part of some results with more rows, among those that were measured under the same conditions; whatever else it has stays.

    Every row says on what processor it was measured: a benchmark of hours may end on another machine than it began on.
    """
    now = machine()
    kept = part["rows"] if part.get("conditions") == conditions else []
    for row in rows:
        kept = with_row(kept, {"processor": now["processor"], **row}, by)
    return {**part, "conditions": conditions, "machine": now, "rows": kept}
