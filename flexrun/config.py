"""What a user can set about the engine: the policy, the budgets, the machine it runs on. All frozen."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from flexrun.core import strict_dataclass
from flexrun.errors import ConfigError, UnsupportedError


@dataclass(frozen=True)
class Placement:
    """Fractions of one kind of tensor on each tier; they sum to 1."""

    gpu: float = 0.0
    cpu: float = 1.0
    disk: float = 0.0

    def __post_init__(self):
        for tier, fraction in dataclasses.asdict(self).items():
            if not 0.0 <= fraction <= 1.0:
                raise ConfigError(f"placement fraction {tier}={fraction} is outside [0, 1]")
        if abs(self.gpu + self.cpu + self.disk - 1.0) > 1e-6:
            raise ConfigError(
                f"placement fractions gpu={self.gpu} cpu={self.cpu} disk={self.disk} do not sum to 1",
                "give all three fractions; they must add up to 1",
            )


KV_BITS: dict[int | str, tuple[int, int] | None] = {16: None, 8: (8, 8), "k8v4": (8, 4), 4: (4, 4)}


@dataclass(frozen=True)
class Policy:
    """Where tensors live and how much runs together. One JSON document; see configs/policies/.

    sequences_in_flight: slots that decode or prefill at once.
    tokens_per_pass: most tokens (decode + prefill chunks) one sweep through the layers carries.
    attention_micro_batch: sequences attended together; each micro-batch has one home tier for its KV.
    token_micro_batch: rows of one linear-layer call inside a module.
    expert_batch: rows of one call of a routed expert (0: all that were sent to it). Each runs on all rows of the pass
        that chose it, whatever the micro-batches of the other modules are.
    kv_tokens: tokens the KV cache has room for (0: sequences_in_flight times the longest request).
    weights, kv: Placement fractions. hidden: where the hidden states of a pass wait while other rows are worked on;
        ``gpu`` is the compute device, whichever it is: with a share of it below 1, the device keeps room for that share
        of the rows of a full pass (for two token_micro_batches at least). A pass of more rows runs each layer part by
        part, as few parts as fit two at a time, whose rows come from the host and go back; a micro-batch is then given
        at most the rows of one part.
    weight_bits, kv_bits: 16 keeps the model's dtype, 8 and 4 are group-wise compressed; kv_bits may be "k8v4", 8 bits
        a key and 4 a value.
    keep: matrices of other bits, as "PATTERN=BITS"; see compress.WeightBits. weight_group: weights that share a scale.
    activation_bits: 8 rounds what compressed matrices are multiplied by, on a CPU; see compress.GroupwiseMatrix.
    cpu_attention_share: share of host-resident KV micro-batches attended in place on the CPU
        (the rest is copied to the GPU and attended there). Meaningless without a GPU.
    kv_device_tokens_share: of each sequence whose KV the CPU attends in place, the share of its cache room, its newest
        tokens, that lives on the device and is attended there; what both find is joined exactly. A sequence keeps the
        border it was given for good: nothing is moved across it. 0 keeps each sequence whole.
    cpu_experts_share: of the routed experts that live in RAM beside a GPU, the share that the CPU runs where they lie:
        they never cross the link, only the rows of tokens do. Meaningless without a GPU.
    half_batches: where the CPU attends beside a GPU, run each pass as two halves that take turns: the CPU attends one
        while the GPU runs the matmuls of the other. Weights are moved once all the same, but read twice by the GPU.
    """

    sequences_in_flight: int = 64
    tokens_per_pass: int = 2048
    attention_micro_batch: int = 32
    token_micro_batch: int = 512
    expert_batch: int = 1024
    kv_tokens: int = 0
    weights: Placement = field(default_factory=Placement)
    kv: Placement = field(default_factory=Placement)
    hidden: Placement = field(default_factory=lambda: Placement(gpu=1.0, cpu=0.0))
    cpu_attention_share: float = 1.0
    kv_device_tokens_share: float = 0.0
    weight_bits: int = 16
    kv_bits: int | str = 16
    half_batches: bool = False
    cpu_experts_share: float = 0.0
    keep: tuple[str, ...] = ()
    weight_group: int = 64
    activation_bits: int = 16

    def __post_init__(self):
        for name in ("sequences_in_flight", "tokens_per_pass", "attention_micro_batch", "token_micro_batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"policy {name}={value!r} must be a whole number of at least 1")
        if not isinstance(self.expert_batch, int) or isinstance(self.expert_batch, bool) or self.expert_batch < 0:
            raise ConfigError(f"policy expert_batch={self.expert_batch!r} must be a whole number; 0 sets no limit")
        if not isinstance(self.kv_tokens, int) or isinstance(self.kv_tokens, bool) or self.kv_tokens < 0:
            raise ConfigError(f"policy kv_tokens={self.kv_tokens!r} must be a whole number; 0 sizes it by the requests")
        for name in ("cpu_attention_share", "kv_device_tokens_share", "cpu_experts_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"policy {name}={getattr(self, name)} is outside [0, 1]")
        if not isinstance(self.half_batches, bool):
            raise ConfigError(f"policy half_batches={self.half_batches!r} must be true or false")
        if isinstance(self.keep, str) or not all(isinstance(rule, str) for rule in self.keep):
            raise ConfigError(f"policy keep={self.keep!r} must be a list of texts, each PATTERN=BITS")
        object.__setattr__(self, "keep", tuple(self.keep))
        if self.weight_group not in (32, 64, 128):
            raise ConfigError(f"policy weight_group={self.weight_group!r} must be 32, 64 or 128")
        if self.weight_bits not in (16, 8, 4):
            raise ConfigError(f"policy weight_bits={self.weight_bits!r} must be 16, 8 or 4")
        if self.activation_bits not in (16, 8):
            raise ConfigError(f"policy activation_bits={self.activation_bits!r} must be 16 or 8")
        if not isinstance(self.kv_bits, (int, str)) or self.kv_bits not in KV_BITS:
            raise ConfigError(f"policy kv_bits={self.kv_bits!r} must be one of {', '.join(map(str, KV_BITS))}")

    @property
    def key_value_bits(self) -> tuple[int, int] | None:
        """Bits of a key and of a value in the cache; None where they keep the model's dtype."""
        return KV_BITS[self.kv_bits]

    def check_runnable(
        self, *, on_device: bool = True, on_gpu: bool = False, latents: bool = False, latents_on_cpu: bool = False
    ) -> None:
        """Raise UnsupportedError for what can be planned but is not run in this version.

        on_gpu: whether the device is a real one. latents: whether the model's KV is latent. latents_on_cpu: whether the
            CPU would attend it beside a GPU (it is compute-bound: it would never pay).
        """
        splits, whole = self.kv_device_tokens_share > 0, "set kv_device_tokens_share to 0"
        coded, uncoded = self.key_value_bits is not None, "set kv_bits to 16"
        for asked, what, remedy in (
            (splits and not on_device, "splits KV by token between the CPU and a device, and there is none", whole),
            (splits and latents, "splits latent KV by token", whole),
            (self.hidden.disk > 0, "keeps hidden states on disk", "set hidden.disk to 0"),
            (self.hidden.gpu < 1 and not on_device, "keeps hidden states off the CPU", "set hidden.gpu to 1"),
            (latents_on_cpu, "attends latent KV on the CPU beside a GPU", "set cpu_attention_share to 0"),
            (on_gpu and self.activation_bits < 16, "rounds activations on a GPU", "set activation_bits to 16"),
            (coded and latents, "compresses latent KV", uncoded),
            (coded and splits, "compresses KV that is split by token", whole),
            (coded and self.hidden.gpu < 1, "compresses KV and keeps hidden states off the device", uncoded),
        ):
            if asked:
                raise UnsupportedError(f"the policy {what}, which this version plans but does not run", remedy)

    @classmethod
    def from_json(cls, path: str | Path) -> Policy:
        """Read a policy document. Raises ConfigError on bad JSON, unknown keys or bad values."""
        try:
            values = json.loads(Path(path).read_text())
        except FileNotFoundError as error:
            raise ConfigError(f"policy file {path} does not exist", "see configs/policies/ for examples") from error
        except OSError as error:
            raise ConfigError(f"policy file {path} cannot be read: {error.strerror}") from error
        except ValueError as error:  # not JSON, or not even text
            raise ConfigError(f"policy file {path} is not JSON: {error}") from error
        return strict_dataclass(cls, values, f"policy {path}")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)
