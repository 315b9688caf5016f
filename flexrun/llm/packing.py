"""The packed weights of a model behind LLM: written once, and one matrix of them compressed to see what that does."""

from __future__ import annotations

from contextlib import AbstractContextManager

from flexrun.compress import GroupFormat
from flexrun.llm.model_files import cache_stem
from flexrun.weights.packed import PackedWeights, open_packed, packed_bytes


class PackedModel:
    """What LLM inherits: it has ``files``, ``spec`` and the private fields that are named here."""

    def pack(self) -> PackedWeights:
        """Write the packed weights, unless they are there."""
        if self._packed is None:
            name, places = cache_stem(self.files), (self.files.reader, self.spec, self._packed_dir)
            self._packed = open_packed(*places, name=name, progress=self._progress, bits=self._bits)
        return self._packed

    def compressed(self, layer: int, name: str, form: GroupFormat) -> AbstractContextManager[None]:
        """See WeightStore.compressed; of the engine that the last call prepared."""
        return self._engine.weights.compressed(layer, name, form)

    def _packed_bytes(self) -> int:
        """Of the packed weights that are there already."""
        return packed_bytes(self.spec, self._packed_dir, name=cache_stem(self.files), bits=self._bits)
