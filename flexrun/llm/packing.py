"""The packed weights of a model: found or written once, when first asked for."""

from __future__ import annotations

from pathlib import Path

from flexrun.compress import WeightBits
from flexrun.errors import ConfigError
from flexrun.llm.model_files import ModelFiles, cache_stem
from flexrun.weights.packed import PackedWeights, open_packed, packed_bytes


class PackedModel:
    """In ``folder``, which is made, with the bits of ``bits``. progress: show a bar while writing.

    Raises ConfigError where the folder cannot be made.
    """

    def __init__(self, files: ModelFiles, folder: Path, bits: WeightBits, progress: bool):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the folder {folder} for weights cannot be made: {error.strerror}", "name another with --disk-dir"
            ) from error
        self.folder, self.bits = folder, bits
        self._files, self._progress = files, progress
        self._opened: PackedWeights | None = None

    def choose(self, bits: WeightBits) -> None:
        """Other bits than before; nothing where they are the same."""
        if bits != self.bits:
            self.bits, self._opened = bits, None

    def open(self) -> PackedWeights:
        """Raises what open_packed does."""
        if self._opened is None:
            name, places = cache_stem(self._files), (self._files.reader, self._files.spec, self.folder)
            self._opened = open_packed(*places, name=name, progress=self._progress, bits=self.bits)
        return self._opened

    def bytes_on_disk(self) -> int:
        """Of what is there already."""
        return packed_bytes(self._files.spec, self.folder, name=cache_stem(self._files), bits=self.bits)
