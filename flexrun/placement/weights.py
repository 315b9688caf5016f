"""Where each weight goes: the policy speaks in fractions, the executor needs whole tensors.

The tensors of a model are laid out once as columns, so that a placement of tens of thousands of experts costs
milliseconds and a search can try many.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy

from flexrun.compress import GroupFormat, WeightBits
from flexrun.config import Placement, Policy
from flexrun.core import PAGE_BYTES, Tier
from flexrun.errors import BudgetError
from flexrun.models.spec import ModelSpec, PackedTensor
from flexrun.steps import WeightUnit

SMALL_TENSOR_BYTES = 64 << 10  # norms and biases: never worth a transfer
EXPERT_UNIT_BYTES = 96 << 20  # routed experts that move together: a copy this large runs at the link's full rate
EXPERT_UNITS = 16  # at most so many of them a layer
COMPRESSION_GROUP = 64  # elements that share a 16-bit scale and a 16-bit minimum

TIERS = (Tier.GPU, Tier.CPU, Tier.DISK)  # a tier's code is its place here
STAYS, BY_ROWS, MOVES = range(3)  # how a tensor is placed: with the compute device, as an embedding, by fractions


@dataclass(frozen=True)
class PlacedTensor:
    """A packed tensor, its layer (-1: embedding, num_layers: head) and its tier; ``nbytes`` unpadded.

    form: how it is compressed, None where it is in its dtype. stays: of an expert that the CPU runs beside a device.
    """

    tensor: PackedTensor
    layer: int
    tier: Tier
    nbytes: int
    form: GroupFormat | None = None
    stays: bool = False


class _Columns:
    """The tensors of a model in order of use: bytes as stored, how each is placed, and the unit it moves with."""

    def __init__(self, spec: ModelSpec, bits: WeightBits, small_bytes: int):
        self.rows = tuple(spec.tensors_by_layer())
        self.forms = [bits.of(layer, tensor) for layer, tensor in self.rows]
        sizes = [stored_bytes(spec, tensor, form) for (_, tensor), form in zip(self.rows, self.forms)]
        self.nbytes = numpy.array(sizes, dtype=numpy.int64)
        self.padded = -(-self.nbytes // PAGE_BYTES) * PAGE_BYTES
        ways, units, keys, experts = [], [], {}, {}
        experts_a_unit = _experts_a_unit(spec)
        for (layer, tensor), nbytes in zip(self.rows, self.nbytes.tolist()):
            key = unit_of(spec, layer, tensor, experts_a_unit)
            units.append(-1 if key is None else keys.setdefault(key, len(keys)))
            if tensor.module == "experts":
                experts.setdefault(key, set()).add(expert_number(tensor))
            embedding = tensor.module == "embedding"
            if nbytes < small_bytes or (embedding and tensor.name != "token_embedding.weight"):
                ways.append(STAYS)
            else:
                ways.append(BY_ROWS if embedding and not spec.tie_word_embeddings else MOVES)
        self.ways, self.units = numpy.array(ways, dtype=numpy.int8), numpy.array(units)
        self.moving = numpy.flatnonzero(self.ways == MOVES)
        self.places = self._places()
        self.place_bytes = numpy.bincount(self.places, self.nbytes[self.moving].astype(float)).astype(int).tolist()
        self.hottest = self._hottest(spec) if spec.expert_counts else ()
        self.keys = list(keys)
        self.head = self._head_place(spec)
        self.unit_bytes = self._by_unit(self.nbytes, self.units >= 0)
        self.experts = [len(experts.get(key, ())) for key in self.keys]
        self.expert_places, self.expert_units, self.expert_of_rows = self._movable_experts()
        head = (spec.num_layers, "head")  # a tied one was met with the embedding, before the layers
        self.order = [number for number, key in enumerate(self.keys) if key != head] + [self.keys.index(head)]
        self.token_embedding = next(
            number for number, (_, tensor) in enumerate(self.rows) if tensor.name == "token_embedding.weight"
        )

    def _places(self) -> numpy.ndarray:
        """For each tensor that moves, its place in their order; the matrices of an expert share one."""
        numbers: dict[tuple, int] = {}
        places = []
        for row in self.moving.tolist():
            layer, tensor = self.rows[row]
            key = (layer, expert_number(tensor) if tensor.module == "experts" else tensor.name)
            places.append(numbers.setdefault(key, len(numbers)))
        return numpy.array(places, dtype=numpy.int64)

    def _movable_experts(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """The routed experts that can leave the compute device, layer by layer: their places and units; and of each
        tensor the place of its expert (-1: of none)."""
        keys = [(layer, expert_number(tensor)) if tensor.module == "experts" else None for layer, tensor in self.rows]
        found: dict[tuple[int, int], tuple[int, int]] = {}
        for row, place in zip(self.moving.tolist(), self.places.tolist()):
            if keys[row] is not None:
                found.setdefault(keys[row], (place, self.units[row]))
        places, units = numpy.array(list(found.values()), dtype=numpy.int64).reshape(-1, 2).T
        return places, units, numpy.array([found.get(key, (-1, -1))[0] for key in keys])

    def _hottest(self, spec: ModelSpec) -> list[numpy.ndarray]:
        """Of each sparse layer the places of its experts of one size, those first that had the most tokens."""
        groups: dict[tuple[int, int], dict[int, int]] = {}
        for place, row in zip(self.places.tolist(), self.moving.tolist()):
            layer, tensor = self.rows[row]
            if tensor.module == "experts":
                group = groups.setdefault((layer, self.place_bytes[place]), {})
                group[place] = -spec.expert_counts[layer][expert_number(tensor)]
        return [numpy.array(sorted(group, key=group.get)) for group in groups.values()]

    def _head_place(self, spec: ModelSpec) -> int:
        """Place of the head's matrix (or the embedding tied to it) among the tensors that move; -1 if it stays."""
        name = "token_embedding.weight" if spec.tie_word_embeddings else "lm_head.weight"
        found = [place for place, row in zip(self.places.tolist(), self.moving) if self.rows[row][1].name == name]
        return found[0] if found else -1

    def _by_unit(self, nbytes: numpy.ndarray, chosen: numpy.ndarray) -> numpy.ndarray:
        sums = numpy.bincount(self.units[chosen], nbytes[chosen].astype(float), len(self.keys))
        return sums.astype(numpy.int64)  # exact: sums of whole numbers below 2^53

    def weight_units(
        self, tiers: numpy.ndarray, on_device: bool, stays: numpy.ndarray, by_cpu: numpy.ndarray
    ) -> tuple[WeightUnit, ...]:
        has_unit = self.units >= 0
        disk = self._by_unit(self.padded, has_unit & (tiers == TIERS.index(Tier.DISK))).tolist()
        host = self._by_unit(self.padded, has_unit & (tiers == TIERS.index(Tier.CPU)) & ~stays & on_device).tolist()
        experts = numpy.bincount(self.expert_units[by_cpu[self.expert_places]], minlength=len(self.keys)).tolist()
        return tuple(
            WeightUnit(index, *self.keys[number], disk[number], host[number], self.experts[number], experts[number])
            for index, number in enumerate(self.order)
        )


@lru_cache(maxsize=16)
def _columns(spec: ModelSpec, bits: WeightBits, small_bytes: int) -> _Columns:
    return _Columns(spec, bits, small_bytes)


class WeightPlacement:
    """A tier for every tensor. units: what moves in each pass, in order of use. cpu_experts: how many routed experts
    the CPU runs beside a device, all layers together."""

    def __init__(self, columns: _Columns, tiers: numpy.ndarray, on_device: bool, by_cpu: numpy.ndarray):
        """tiers: of each tensor. by_cpu: of each place, whether it is an expert that the CPU runs."""
        self._columns, self._tiers = columns, tiers
        self._stays = numpy.append(by_cpu, False)[columns.expert_of_rows]
        tiers[self._stays] = TIERS.index(Tier.CPU)  # biases, which would stay with the device, go with their expert
        self.cpu_experts = int(by_cpu.sum())
        self.units = columns.weight_units(tiers, on_device, self._stays, by_cpu)
        self.embedding_on_disk = bool(tiers[columns.token_embedding] == TIERS.index(Tier.DISK))

    @cached_property
    def tensors(self) -> tuple[PlacedTensor, ...]:
        columns = self._columns
        return tuple(
            PlacedTensor(tensor, layer, TIERS[tier], nbytes, form, stays)
            for (layer, tensor), tier, nbytes, form, stays in zip(
                columns.rows, self._tiers.tolist(), columns.nbytes.tolist(), columns.forms, self._stays.tolist()
            )
        )

    def bytes_on(self, tier: Tier) -> int:
        """Page-aligned bytes of the weights whose home is ``tier``."""
        return int(self._columns.padded[self._tiers == TIERS.index(tier)].sum())

    @property
    def stored_bytes(self) -> int:
        """Page-aligned bytes of all weights: what their packed files take on disk."""
        return int(self._columns.padded.sum())

    @property
    def moved_shares(self) -> list[float]:
        """Of each unit, the share of its bytes that is not where it is computed with."""
        columns = self._columns
        whole = columns.unit_bytes[columns.order].tolist()
        return [min((unit.disk_bytes + unit.host_bytes) / max(size, 1), 1.0) for unit, size in zip(self.units, whole)]

    @property
    def moved_share(self) -> float:
        """Of all units together."""
        moved = sum(unit.disk_bytes + unit.host_bytes for unit in self.units)
        return min(moved / int(self._columns.unit_bytes.sum()), 1.0)

    @cached_property
    def max_layer_stream_bytes(self) -> tuple[int, int]:
        """Largest (disk, disk + host) bytes that one layer moves in each pass."""
        layers: dict[int, list[int]] = {}
        for unit in self.units:
            if unit.module == "head":
                continue
            sums = layers.setdefault(unit.layer, [0, 0])
            sums[0] += unit.disk_bytes
            sums[1] += unit.disk_bytes + unit.host_bytes
        return max(sums[0] for sums in layers.values()), max(sums[1] for sums in layers.values())

    @cached_property
    def max_unit_stream_bytes(self) -> tuple[int, int]:
        return (
            max(unit.disk_bytes for unit in self.units),
            max(unit.disk_bytes + unit.host_bytes for unit in self.units),
        )


def place_weights(spec: ModelSpec, policy: Policy, *, on_device: bool) -> WeightPlacement:
    """Give every tensor a tier so that each tier holds at most its fraction and all layers stream alike.

    Works like error diffusion: each tensor (of experts, each expert) adds its share to a tier's credit, and goes to the
    fastest tier whose credit covers it, so the moved bytes spread evenly over the layers. The head goes first, to
    the fastest tier of whose share it takes no more than half: moved, it would be one lump at the end of each pass and
    need a ring of its size. Where a profile of the experts is known, the most used ones of a layer take the fastest of
    the tiers that its experts got. Tensors under 64 KiB live with the compute device. An untied token embedding is
    gathered by rows, so it is the first to leave RAM and never counts towards the fractions.
    """
    fractions = policy.weights
    if not on_device and fractions.gpu:
        raise BudgetError(
            f"the policy places {fractions.gpu:.0%} of the weights on a GPU, but there is no GPU memory",
            "give --gpu-memory, or a policy with weights.gpu = 0",
        )
    columns = _columns(spec, weight_bits_of(policy), SMALL_TENSOR_BYTES)
    return _placed(columns, fractions, on_device, policy.cpu_experts_share if on_device else 0.0)


@lru_cache(maxsize=64)
def _placed(columns: _Columns, fractions: Placement, on_device: bool, cpu_experts_share: float) -> WeightPlacement:
    # The slowest tier in use takes what the credit of the faster ones does not cover.
    rest = 2 if fractions.disk > 1e-9 else 1 if fractions.cpu > 1e-9 else 0
    tiers = numpy.full(len(columns.rows), rest, dtype=numpy.int8)
    tiers[columns.ways == STAYS] = TIERS.index(Tier.GPU if on_device else Tier.CPU)
    of_places = _diffused(columns.place_bytes, columns.head, fractions, rest)
    for experts in columns.hottest:
        of_places[experts] = numpy.sort(of_places[experts])  # each tier keeps its bytes
    tiers[columns.moving] = of_places[columns.places]
    return WeightPlacement(columns, tiers, on_device, _run_by_cpu(columns, of_places, cpu_experts_share))


def _run_by_cpu(columns: _Columns, of_places: numpy.ndarray, share: float) -> numpy.ndarray:
    """Of each place whether it is an expert that the CPU runs: so large a share of those in RAM, as evenly over the
    layers as can be. Of a layer, those with the fewest tokens where that is known. of_places: their tiers."""
    tier, by_cpu = TIERS.index(Tier.CPU), numpy.zeros(len(of_places), dtype=bool)
    in_ram = of_places[columns.expert_places] == tier
    due = numpy.floor(numpy.cumsum(in_ram) * share + 1e-9)
    by_cpu[columns.expert_places] = numpy.diff(due, prepend=0) > 0
    for experts in columns.hottest:
        of_layer = experts[of_places[experts] == tier]
        by_cpu[of_layer] = numpy.sort(by_cpu[of_layer])
    return by_cpu


def _diffused(sizes: list[int], head: int, fractions: Placement, rest: int) -> numpy.ndarray:
    """The tier of each place (a tensor that moves, or an expert). head: place of the head, or -1."""
    gpu, cpu = fractions.gpu, fractions.cpu
    if rest == 0 or (gpu <= 1e-9 and (rest == 1 or cpu <= 1e-9)):
        return numpy.full(len(sizes), rest)
    head_tier, total = rest, sum(sizes)
    if head >= 0:
        shares = {0: gpu, 1: cpu if rest == 2 else 0.0}
        head_tier = next((tier for tier, share in shares.items() if 2 * sizes[head] <= share * total), rest)
        others = max(total - sizes[head], 1)
        gpu = (gpu * total - (sizes[head] if head_tier == 0 else 0)) / others
        cpu = (cpu * total - (sizes[head] if head_tier == 1 and rest == 2 else 0)) / others
    gpu_credit = cpu_credit = 0.0
    tiers = []
    for place, size in enumerate(sizes):
        if place == head:
            tiers.append(head_tier)
            continue
        gpu_credit += gpu * size
        cpu_credit += cpu * size
        needed = size * (1 - 1e-9)
        if gpu_credit >= needed:
            tiers.append(0)
            gpu_credit -= size
        elif rest == 1 or cpu_credit >= needed:
            tiers.append(1)
            cpu_credit -= size
        else:
            tiers.append(2)
    return numpy.array(tiers)


def weight_bits_of(policy: Policy) -> WeightBits:
    """Which matrices a policy compresses."""
    return WeightBits(policy.weight_bits, policy.keep, policy.weight_group)


def stored_bytes(spec: ModelSpec, tensor: PackedTensor, form: GroupFormat | None) -> int:
    """Bytes of a tensor as it is stored."""
    return tensor.elements * tensor.dtype_bytes(spec.torch_dtype) if form is None else form.nbytes(tensor.shape)


def compressed_bytes(elements: int, bits: int) -> int:
    """Group-wise compression (FlexGen, section 5): ``bits`` an element, a scale and a minimum a group."""
    return elements * bits // 8 + -(-elements // COMPRESSION_GROUP) * 4


def unit_of(
    spec: ModelSpec, layer: int, tensor: PackedTensor, experts_a_unit: int | None = None
) -> tuple[int, str] | None:
    """(layer, module) of the unit a tensor moves with; None for an embedding that is gathered by rows.

    A tied token embedding moves with the head, which multiplies by the whole of it. Routed experts move in groups.
    """
    module = tensor.module
    if module == "embedding":
        tied = spec.tie_word_embeddings and tensor.name == "token_embedding.weight"
        return (spec.num_layers, "head") if tied else None
    if module == "experts":
        return layer, f"experts.{expert_number(tensor) // (experts_a_unit or _experts_a_unit(spec))}"
    return layer, module


def expert_number(tensor: PackedTensor) -> int:
    """Which routed expert a tensor of module ``experts`` belongs to (``expert.7.down.weight`` -> 7)."""
    return int(tensor.name.split(".", 2)[1])


def _experts_a_unit(spec: ModelSpec) -> int:
    if spec.experts is None:
        return 1
    one = sum(inputs * outputs for inputs, outputs in spec.linear_shapes("expert")) * spec.dtype_bytes
    return max(EXPERT_UNIT_BYTES // one, -(-spec.experts.num_experts // EXPERT_UNITS))
