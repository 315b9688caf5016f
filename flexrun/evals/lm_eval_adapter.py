"""lm-evaluation-harness on flexrun: all requests of a task go to the engine at once, which batches them itself.

    python -m flexrun.evals.lm_eval_adapter run --model flexrun --model_args pretrained=DIR,cpu_memory=8GiB --tasks ...

registers the model ``flexrun`` and is the harness's own command line from there on; harnesses that read the entry-point
group ``lm_eval.models`` find it by themselves. model_args are the arguments of flexrun.LLM, and ``pretrained``,
``max_length``, ``max_gen_toks`` and ``add_bos_token`` as the harness's Hugging Face backend has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from flexrun.errors import ConfigError, UnsupportedError
from flexrun.llm import LLM
from flexrun.sampling import SamplingParams

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UnsupportedError(
        f"lm-evaluation-harness cannot be imported: {error}", "pip install 'flexrun[lm-eval]'"
    ) from error

SAMPLING = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
)
BOOKKEEPING = ("do_sample", "temperature", "until", "max_gen_toks")


@register_model("flexrun")
class FlexrunLM(TemplateLM):
    """A model of the harness. batch_size and max_batch_size are taken and not needed; device: cuda if there is one."""

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        model: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = False,
        device: str | None = None,
        progress: bool = False,
        **options: Any,
    ):
        super().__init__()
        name = pretrained or model
        if name is None:
            raise ConfigError("the harness was given no model", "say --model_args pretrained=DIR")
        if max_length is not None:
            options["max_model_len"] = max_length
        on_gpu = (device or "cuda").startswith("cuda") and torch.cuda.is_available()  # the harness says cuda by default
        self._llm = LLM(str(name), device="cuda" if on_gpu else "cpu", **options)
        self._name, self._max_gen_tokens = str(name), max_gen_toks
        self._add_bos_token, self._progress = add_bos_token, progress
        if self._llm.tokenizer is None:
            raise ConfigError(f"{name} has no tokenizer", "name one with tokenizer=DIR")
        self._tokenizer = self._llm.tokenizer

    # What the harness asks about the model ---------------------------------------------------------------

    @property
    def eot_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has nothing before it."""
        bos = self._tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self._llm.max_model_len

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_tokens

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._tokenizer.apply_chat_template(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        special = self._add_bos_token if add_special_tokens is None else add_special_tokens
        return self._tokenizer.encode(string, add_special_tokens=special)

    # What it asks of it ----------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Too long a context loses its oldest tokens: the model sees ``max_length`` at most."""
        contexts, continuations = [], []
        for _text, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise UnsupportedError(
                    f"a continuation of {len(continuation)} tokens is longer than the context of {self.max_length}",
                    "raise max_length where the model allows",
                )
            contexts.append(context[-room:])
            continuations.append(continuation)
        answers = []
        for (text, *_rest), score in zip(
            requests, self._llm.score(contexts, continuations, use_tqdm=self._progress and not disable_tqdm)
        ):
            if score.error is not None:
                raise score.error
            answers.append((score.logprob, score.is_greedy))
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        parts: list[list[float]] = [[] for _ in requests]
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            parts[owner].append(logprob)
        totals = [math.fsum(part) for part in parts]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts, params = [], []
        for request in requests:
            context, asked = request.args
            params.append(self._sampling(asked))
            room = self.max_length - params[-1].max_tokens
            if room < 1:
                raise UnsupportedError(
                    f"max_gen_toks={params[-1].max_tokens} leaves no room in a context of {self.max_length}",
                    "lower max_gen_toks, or raise max_length where the model allows",
                )
            prompts.append(self.tok_encode(context)[-room:])
        answers = []
        outputs = self._llm.generate(prompts, params, use_tqdm=self._progress and not disable_tqdm)
        for request, output in zip(requests, outputs):
            if output.error is not None:
                raise output.error
            answers.append(output.outputs[0].text)
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _sampling(self, asked: dict[str, Any]) -> SamplingParams:
        """The harness's generation arguments in flexrun's terms. Raises UnsupportedError for one that would change the
        answer and is not run."""
        asked = normalize_gen_kwargs(asked, self._max_gen_tokens)
        unknown = set(asked) - {*SAMPLING, *BOOKKEEPING}
        if unknown:
            raise UnsupportedError(f"generation argument {sorted(unknown)[0]!r} is not run", "take it out of the task")
        until = [text for text in asked["until"] or [] if text]
        return SamplingParams(
            temperature=float(asked["temperature"]) if asked["do_sample"] else 0.0,
            max_tokens=asked["max_gen_toks"],
            stop=tuple(until),
            **{name: asked[name] for name in SAMPLING if asked.get(name) is not None},
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
