"""Calibrations on disk: one safetensors file of ``NAME:statistic`` tensors in float64, and the cache of those made before.

The metadata say what the numbers are of (fingerprints of model and data, the request), which places they belong to
and how many tokens came to each. A file is checked whole before a number of it is used. In the cache, the calibrations
that differ in nothing but the statistics asked for lie in one folder, so that a subset is found too.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.calibrate.statistics import STATISTICS
from espalier.checkpoint.atomic import atomic_file
from espalier.checkpoint.fingerprint import cache_directory, file_identity
from espalier.checkpoint.safetensors_file import SafetensorsFile, SafetensorsWriter
from espalier.errors import EspalierError, suggestion

if TYPE_CHECKING:
    import torch

FORMAT = 1
_KEY = "espalier_calibration"


@dataclass(frozen=True)
class Request:
    """What is asked of which model and data; everything that decides the numbers.

    ``tokens`` is the limit (0: none); ``rank`` that of ``singular_vectors``.
    """

    model: str
    data: str
    want: tuple[str, ...]
    targets: tuple[str, ...]
    tokens: int
    sequence_length: int
    seed: int
    dtype: str
    rank: int

    @classmethod
    def of(cls, *, want: Sequence[str], targets: str, dtype: torch.dtype, **others: Any) -> Request:
        """A request in the one spelling that the cache knows, from a list of targets with commas and a dtype."""
        patterns = tuple(part.strip() for part in targets.split(",") if part.strip())
        return cls(want=tuple(want), targets=patterns, dtype=str(dtype).removeprefix("torch."), **others)

    def folder(self) -> Path:
        """Where the cache keeps calibrations that differ from this one in ``want`` only."""
        same = {key: value for key, value in asdict(self).items() if key != "want"}
        name = hashlib.sha256(json.dumps([FORMAT, same], sort_keys=True).encode()).hexdigest()[:32]
        return cache_directory() / "calibrations" / name

    def name(self) -> str:
        """Of the file in that folder."""
        return hashlib.sha256(",".join(self.want).encode()).hexdigest()[:16]


def expected(facts: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, of all that a calibration with these facts holds."""
    shapes = {}
    for statistic in facts["request"]["want"]:
        cls = STATISTICS[statistic]
        for name, shape in facts["places"].get(cls.kind, {}).items():
            shapes[f"{name}:{statistic}"] = cls.shape(tuple(shape), facts["request"]["rank"], facts["sequences"])
    return shapes


class Calibration:
    """A calibration file, open for reading; tensors are read when they are asked for.

    Args:
        path: of the file.

    ``facts`` are its metadata: ``request``, ``sequences``, ``tokens`` (inputs seen), ``predictions`` (target tokens),
    ``loss`` (nats per target token; ``None`` without gradients), ``places``, ``sites``, ``coverage``, ``versions``.

    Raises:
        EspalierError: when the file cannot be read, is no calibration, or lacks or misshapes a tensor.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = SafetensorsFile(self.path)
        if _KEY not in self._file.metadata:
            raise EspalierError(f"{self.path} is no calibration; `espalier calibrate` makes one")
        try:
            self.facts: dict[str, Any] = json.loads(self._file.metadata[_KEY])
            version = self.facts["format"]
            shapes = expected(self.facts) if version == FORMAT else {}
            self.coverage: dict[str, list[int]] = {name: list(map(int, seen)) for name, seen in self.facts["coverage"].items()}
            self.sites: dict[str, str] = dict(self.facts["sites"])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise EspalierError(f"{self.path} is a damaged calibration: its metadata are malformed ({error})") from error
        if version != FORMAT:
            raise EspalierError(f"{self.path} is a calibration of format {version!r}; this version reads {FORMAT}")
        for name in shapes.keys() | self._file.tensors.keys():
            found = self._file.tensors.get(name)
            if name not in shapes or found is None or found.dtype != "F64" or found.shape != shapes[name]:
                seen = f"{found.dtype} {list(found.shape)}" if found else "missing"
                right = f"F64 {list(shapes[name])}" if name in shapes else "not there"
                raise EspalierError(f"{self.path} is a damaged calibration: tensor {name!r} is {seen}; it should be {right}")

    @property
    def statistics(self) -> list[str]:
        """The statistics it holds."""
        return list(self.facts["request"]["want"])

    def names(self, statistic: str) -> list[str]:
        """The places that have a statistic: input sites, or parameters for those of outputs and gradients."""
        return [name.rpartition(":")[0] for name in self._file.tensors if name.rpartition(":")[2] == statistic]

    def read(self, name: str, statistic: str) -> torch.Tensor:
        """One statistic of a parameter, in float64; of inputs, that of the site that the parameter reads.

        Args:
            name: of a parameter, as in ``model.named_parameters()``, or of an input site.
            statistic: see ``espalier calibrate --want``.

        Raises:
            EspalierError: when the file does not hold it.
        """
        return self._file.read(self._key(name, statistic))

    def part(self, name: str, statistic: str, start: int, count: int) -> torch.Tensor:
        """``count`` numbers of a statistic in the order of its entries, from one on, (count,), in float64.

        Raises:
            EspalierError: when the file does not hold it, or not so many.
        """
        import torch

        key = self._key(name, statistic)
        if not 0 <= start <= start + count <= math.prod(self._file.info(key).shape):
            raise EspalierError(f"{self.path}: {key!r} is {list(self._file.info(key).shape)}, it has no numbers {start} to {start + count}")
        made = torch.empty(count, dtype=torch.float64)
        self._file.read_into(made.numpy().view("u1").data, key, 8 * start)
        return made

    def __contains__(self, of: tuple[str, str]) -> bool:
        """Whether a statistic of a parameter or site is there, (name, statistic)."""
        name, statistic = of
        place = self.sites.get(name, name) if STATISTICS[statistic].kind == "input" else name
        return f"{place}:{statistic}" in self._file.tensors

    def shape(self, name: str, statistic: str) -> tuple[int, ...]:
        """The shape of one statistic.

        Raises:
            EspalierError: when the file does not hold it.
        """
        return self._file.info(self._key(name, statistic)).shape

    def _key(self, name: str, statistic: str) -> str:
        if statistic not in self.statistics:
            raise EspalierError(f"{self.path} does not hold {statistic!r} (it holds: {', '.join(self.statistics)})")
        place = self.sites.get(name, name) if STATISTICS[statistic].kind == "input" else name
        if f"{place}:{statistic}" not in self._file.tensors:
            known = [*self.sites, *self.names(statistic)]
            raise EspalierError(f"{self.path} holds no {statistic} of {name!r}{suggestion(name, known)}")
        return f"{place}:{statistic}"

    def tokens(self, name: str) -> list[int]:
        """Tokens that came to a parameter or input site: one number, or one per expert.

        Raises:
            EspalierError: when it was not watched.
        """
        place = self.sites.get(name, name)
        if place not in self.coverage:
            raise EspalierError(f"{self.path} counted no tokens at {name!r}{suggestion(name, list(self.sites))}")
        return self.coverage[place]

    def copy_to(self, path: Path, want: Sequence[str]) -> None:
        """Write a calibration of fewer statistics."""
        facts = {**self.facts, "request": {**self.facts["request"], "want": list(want)}}
        write(path, facts, dict.fromkeys(expected(facts), self._file))


def load(path: str | Path) -> Calibration:
    """Open a calibration file; see :class:`Calibration`."""
    return Calibration(path)


@functools.lru_cache(maxsize=256)
def _opened(path: str, identity: str) -> Calibration:
    return Calibration(path)


def of_models(paths: Sequence[str] | None, models: int, want: str) -> list[Calibration]:
    """One open calibration for each model of a merge; files that were opened before and have not changed are used again.

    Raises:
        EspalierError: when there are not as many as models, or a file cannot be read.
    """
    if paths is None or len(paths) != models:
        have = "no files" if paths is None else f"{len(paths)} files"
        raise EspalierError(
            f"statistics names {have}; there are {models} models, and each needs its own: espalier calibrate MODEL --want {want} --targets all"
        )
    try:
        return [_opened(path, file_identity(Path(path))) for path in paths]
    except OSError as error:
        raise EspalierError(f"{error.filename} cannot be read: {error.strerror}") from error


def write(path: Path, facts: Mapping[str, Any], sources: Mapping[str, SafetensorsFile]) -> None:
    """Write a calibration atomically, one tensor in memory at a time; ``sources`` are the files that hold them."""
    layout = {name: ("F64", shape) for name, shape in expected(facts).items()}
    with atomic_file(path) as temporary:
        writer = SafetensorsWriter(temporary, layout, {_KEY: json.dumps(facts)})
        for name in layout:
            writer.write(name, sources[name].read(name))
        writer.close()


def refuse_other(out: Path, request: Request) -> None:
    """Refuse an ``--out`` that is there and is not what this request gives.

    Raises:
        EspalierError: when there is such a file.
    """
    if out.exists() and not _holds(out, request):
        raise EspalierError(f"{out} already exists and is not the calibration that is asked for; give another --out, or remove it first")


def _holds(out: Path, request: Request) -> bool:
    try:
        return Calibration(out).facts["request"] == json.loads(json.dumps(asdict(request)))
    except EspalierError:
        return False


def deliver(made: Calibration, out: Path, request: Request) -> None:
    """Place what was asked for at ``out``; a whole file of the cache shares its disk blocks where the file system can."""
    if _holds(out, request):
        return
    if made.statistics != list(request.want):
        made.copy_to(out, request.want)
        return
    with atomic_file(out) as temporary:
        try:
            os.link(made.path, temporary)
        except OSError:
            shutil.copyfile(made.path, temporary)


def find(request: Request) -> Calibration | None:
    """The calibration of the cache that holds all that is asked for, the one with the same statistics first."""
    folder = request.folder()
    exact = folder / f"{request.name()}.safetensors"
    for path in [exact, *sorted(folder.glob("*.safetensors"))]:
        if not path.exists():
            continue
        try:
            found = Calibration(path)
        except EspalierError:
            path.unlink(missing_ok=True)  # everything in the cache can be computed again
            continue
        if set(request.want) <= set(found.statistics):
            return found
    return None
