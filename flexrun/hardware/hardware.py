"""What a machine can do, as one JSON document: capacities, the speed of each lane, what lanes cost each other.

Measured by ``flexrun profile``, or read from configs/hardware to plan for a machine one does not have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexrun.core import DTYPES, nearest_name
from flexrun.errors import ConfigError
from flexrun.hardware.document import REMEDY, build, require_number, require_range
from flexrun.hardware.effort import FULL, QUICK, Effort
from flexrun.hardware.profiler import measure
from flexrun.hardware.rates import Processor, Transfer

# compute: the processor that runs the model's linear layers; host_attention: the CPU attending beside it;
# host_copy: a copy thread, which is what h2d and d2h are on a machine whose accelerator is emulated.
LANES = ("compute", "host_attention", "host_copy", "h2d", "d2h", "disk_read", "disk_write")
NOISY = 0.15  # spread of repeated readings, or share of the CPU that others used, beyond which nothing is sure
_MISFIT = 0.3  # of a curve, beyond which it does not describe the machine


@dataclass(frozen=True)
class Hardware:
    """One machine. Bytes, seconds, FLOP/s.

    gpu, h2d, d2h are None where there is none; host_copy is a copy thread's memcpy, which stands for the links of an
    emulated accelerator. duplex_share: speed that h2d and d2h keep while both run.
    contention[a][b]: share of its own speed that lane a keeps while lane b runs, for a, b of ``LANES``; absent is 1.
    noise: relative spread of repeated readings, misfit: relative error of the fitted curves, by what was read.
    measured: date. fingerprint: of the machine and software measured. disk_folder: where disk_read was measured.
    sources: where numbers that were not measured come from.
    Raises ConfigError for a number that cannot be.
    """

    name: str
    cpu: Processor
    cpu_memory_bytes: int
    disk_read: Transfer
    disk_write: Transfer
    host_copy: Transfer
    gpu: Processor | None = None
    gpu_memory_bytes: int = 0
    h2d: Transfer | None = None
    d2h: Transfer | None = None
    duplex_share: float = 1.0
    disk_bytes: int = 0
    cores: int = 1
    contention: dict[str, dict[str, float]] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    misfit: dict[str, float] = field(default_factory=dict)
    measured: str = ""
    fingerprint: str = ""
    disk_folder: str = ""
    sources: tuple[str, ...] = ()

    def __post_init__(self):
        require_range(self, ("cpu_memory_bytes", "cores"), 1)
        require_range(self, ("gpu_memory_bytes", "disk_bytes"), 0)
        require_range(self, ("duplex_share",), 0, 1, above=True)
        if self.gpu is not None:
            absent = [name for name in ("gpu_memory_bytes", "h2d", "d2h") if not getattr(self, name)]
            if absent:
                raise ConfigError(f"there is a gpu, but no {absent[0]}", REMEDY)
        for processor in filter(None, (self.cpu, self.gpu)):
            for dtype in processor.rates:
                if dtype not in DTYPES:
                    raise ConfigError(f"rates of an unknown dtype {dtype!r}", nearest_name(dtype, DTYPES))
        for lane, shares in self.contention.items():
            for beside, share in shares.items():
                for name in (lane, beside):
                    if name not in LANES:
                        raise ConfigError(f"contention of an unknown lane {name!r}", nearest_name(name, LANES))
                require_number(f"contention.{lane}.{beside}", share, 0, 1, above=True)
        for kind in ("noise", "misfit"):
            for name, share in getattr(self, kind).items():
                require_number(f"{kind}.{name}", share, 0)

    def keeps(self, lane: str, beside: str) -> float:
        """Share of its own speed that ``lane`` keeps while ``beside`` runs, both of ``LANES``."""
        return self.contention.get(lane, {}).get(beside, 1.0)

    @property
    def disturbed(self) -> bool:
        """Whether other programs kept the measurement from being one of this machine: use it once, do not keep it."""
        return self.noise.get("other programs", 0.0) > NOISY or max(self.misfit.values(), default=0.0) > _MISFIT

    @classmethod
    def measure(
        cls,
        folder: str | Path,
        *,
        quick: bool = False,
        progress: bool = False,
        dtypes: Sequence[str] | None = None,
        effort: Effort | None = None,
    ) -> Hardware:
        """Measure this machine: within a minute, or with ``quick`` in some seconds and less exactly.

        folder: on the disk that weights will be streamed from; about 1 GiB (quick: 256 MiB) is written there for the
        time. dtypes: default float32 and bfloat16, on a GPU float16 too. effort: in place of ``quick``.
        Raises ConfigError where the folder has no room, ExecutionError where the disk fails.
        """
        effort = effort or (QUICK if quick else FULL)
        return build(cls, measure(folder, effort, progress=progress, dtypes=dtypes), "measured profile")

    # Documents ----------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Hardware:
        """Read a hardware document. Raises ConfigError, naming file and key, on anything it should not hold."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(
                f"hardware file {path} does not exist",
                "measure this machine with flexrun profile, or take a file of configs/hardware/",
            ) from error
        except OSError as error:
            raise ConfigError(f"hardware file {path} cannot be read: {error.strerror}", "check the path") from error
        except ValueError as error:  # not JSON, or not even text
            raise ConfigError(f"hardware file {path} is not JSON: {error}", REMEDY) from error
        return build(cls, values, f"hardware {path}")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        """Write the document, whole or not at all. Raises ConfigError where that is impossible."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise ConfigError(
                f"hardware file {path} cannot be written: {error.strerror}", "name a file that can be"
            ) from error
