"""Which ways of placing tensors the search may use: those that pay, or everything that can be planned."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Features:
    """hidden_off_device: also plan passes larger than the device. They are run, but of 16 jobs planned with them (OPT,
    Llama and Mixtral on a T4 and an A5000) none ended more than 1 % sooner, and the larger search ended worse in seven:
    who wants them names them in the policy.
    half_batches: passes in two halves, where the CPU attends beside a GPU.
    weight_bits, kv_bits: choices, best accuracy first; the search takes fewer bits only where they are offered."""

    kv_on_disk: bool = True
    hidden_off_device: bool = False
    half_batches: bool = True
    weight_bits: tuple[int, ...] = (16,)
    kv_bits: tuple[int | str, ...] = (16,)


AUTO_CHOICES = {"weight_bits": (16, 8, 4), "kv_bits": (16, 8, "k8v4", 4)}  # where the user leaves them to the search
RUNNABLE = Features()
PLANNABLE = Features(hidden_off_device=True)
