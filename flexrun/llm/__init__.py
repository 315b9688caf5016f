"""The Python face: LLM(model).generate(prompts, SamplingParams(...))."""

from flexrun.llm.llm import LLM
from flexrun.llm.model_files import ModelFiles, open_model

__all__ = ["LLM", "ModelFiles", "open_model"]
