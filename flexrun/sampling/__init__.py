"""How the next token is chosen: what a request asks for, and the draw itself."""

from flexrun.sampling.params import UNSUPPORTED_OPTIONS, SamplingParams
from flexrun.sampling.sampler import Sampled, SamplerRow, TokenLogprob, UnusableLogits, sample, score
from flexrun.sampling.seeds import resolve_seed, uniforms

__all__ = [
    "UNSUPPORTED_OPTIONS",
    "Sampled",
    "SamplerRow",
    "SamplingParams",
    "TokenLogprob",
    "UnusableLogits",
    "resolve_seed",
    "sample",
    "score",
    "uniforms",
]
