"""Mixture of experts: who gets which token, tokens in the order of their experts, and experts at work on them."""

from flexrun.moe.batching import Assignment, add_weighted, assign, chunks
from flexrun.moe.experts import ExpertBuffers, run_experts
from flexrun.moe.profile import with_expert_profile, write_expert_profile
from flexrun.moe.router import route

__all__ = [
    "Assignment",
    "ExpertBuffers",
    "add_weighted",
    "assign",
    "chunks",
    "route",
    "run_experts",
    "with_expert_profile",
    "write_expert_profile",
]
