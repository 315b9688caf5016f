"""HELM on flexrun: every request of a scenario goes to the engine at once, where HELM would send a few at a time.

    python -m flexrun.evals.helm_adapter --model DIR --run-entries synthetic_reasoning:mode=pattern_match --suite s1 \
        --max-eval-instances 100 --llm cpu_memory=8GiB

registers the model as ``flexrun/NAME``, adds ``model=flexrun/NAME`` to each run entry that names none, and is helm-run
from there on; helm-summarize reads what it writes. ``flexrun bench helm`` does the same and prints what came of it.
With helm-run itself: see helm_plugin.py, or name the classes below in HELM's own YAML files; and in both cases give
``--runner-class-name flexrun.evals.helm_adapter.WholeScenarioRunner``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexrun.errors import ConfigError, UnsupportedError
from flexrun.evals.helm_results import Execution
from flexrun.llm import LLM
from flexrun.outputs import CompletionOutput, RequestOutput
from flexrun.outputs import Request as EngineRequest
from flexrun.sampling import SamplingParams
from flexrun.workload import Workload

try:
    from helm.benchmark.adaptation.scenario_state import ScenarioState
    from helm.benchmark.executor import ExecutionSpec, Executor
    from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, register_model_deployment
    from helm.benchmark.model_metadata_registry import get_unknown_model_metadata, register_model_metadata
    from helm.benchmark.run import build_parser, helm_run
    from helm.benchmark.run_spec import RunSpec
    from helm.benchmark.runner import Runner
    from helm.benchmark.tokenizer_config_registry import TokenizerConfig, TokenizerSpec, register_tokenizer_config
    from helm.clients.client import Client, truncate_sequence
    from helm.common.hierarchical_logger import hlog
    from helm.common.request import ErrorFlags, GeneratedOutput, Request, RequestResult, Token
    from helm.tokenizers.caching_tokenizer import CachingTokenizer
except ImportError as error:
    raise UnsupportedError(f"HELM cannot be imported: {error}", "pip install 'flexrun[helm]'") from error


EXECUTIONS: dict[str, Execution] = {}  # by the name of the run, of this process
_MODELS: dict[str, LLM] = {}  # one for each model and settings, whatever clients and tokenizers ask for it
_OPENING = threading.Lock()


def shared_llm(model: str, options: dict[str, Any]) -> LLM:
    """The LLM of a model; opened once a process."""
    with _OPENING:
        key = f"{model} {sorted(options.items())}"
        if key not in _MODELS:
            _MODELS[key] = LLM(model, **options)
            if _MODELS[key].tokenizer is None:
                raise ConfigError(f"{model} has no tokenizer", "name one with tokenizer=DIR")
        return _MODELS[key]


class FlexrunClient(Client):
    """A client of HELM. model: as for flexrun.LLM, whose arguments the others are.

    apply_chat_template: whether a prompt is a user's turn; default: where the model has a template, as HELM's Hugging
    Face client does.
    """

    def __init__(
        self,
        model: str,
        end_of_text_token: str | None = None,
        apply_chat_template: bool | None = None,
        **options: Any,
    ):
        self._llm = shared_llm(model, options)
        self._end_of_text_token = end_of_text_token
        has_template = bool(self._llm.tokenizer.chat_template)
        self._chats = has_template if apply_chat_template is None else apply_chat_template
        self._running = threading.Lock()
        self.latest = Execution(0, 0.0, 0, 0)

    def make_request(self, request: Request) -> RequestResult:
        return self.make_requests([request])[0]

    def make_requests(self, requests: Sequence[Request]) -> list[RequestResult]:
        """All at once, in one run of the engine. A request that cannot be served is an error of its own, not retried.

        request_time of each is an equal share of the run's: no request has a time to itself.
        """
        asked: list[EngineRequest] = []
        refused: dict[int, str] = {}
        for number, request in enumerate(requests):
            try:
                asked.append(self._engine_request(number, request))
            except (UnsupportedError, ConfigError, ValueError) as error:
                refused[number] = str(error)
        workload = self._workload(asked)
        with self._running:
            self._llm.prepare(workload)  # planning and loading are no request's time
            started, start_seconds = time.time(), time.perf_counter()
            outputs = {int(output.request_id): output for output in self._llm.generate_iter(asked, workload)}
            seconds = time.perf_counter() - start_seconds
        self.latest = Execution(
            len(requests),
            seconds,
            sum(len(output.prompt_token_ids or ()) for output in outputs.values()),
            sum(len(answer.token_ids) for output in outputs.values() for answer in output.outputs),
        )
        results = []
        for number, request in enumerate(requests):
            output = outputs.get(number)
            error = refused.get(number) or (str(output.error) if output.error is not None else None)
            if error is not None:
                flags = ErrorFlags(is_retriable=False, is_fatal=False)
                results.append(RequestResult(False, [], [], False, error=error, error_flags=flags))
                continue
            results.append(
                RequestResult(
                    success=True,
                    embedding=[],
                    completions=self._completions(request, output),
                    cached=False,
                    request_time=seconds / max(len(asked), 1),
                    request_datetime=int(started),
                    batch_size=len(asked),
                    batch_request_time=seconds,
                )
            )
        return results

    def _workload(self, requests: Sequence[EngineRequest]) -> Workload:
        """What the requests ask for, those that are too long left out."""
        rows = []
        for request in requests:
            tokens, params = len(request.token_ids), request.params
            room = self._llm.max_model_len - tokens
            if tokens and room >= 0:
                scored = 0 if params.prompt_logprobs is None else tokens - 1
                rows += [(tokens, min(params.max_tokens, room), scored)] * params.n
        return Workload.of(*zip(*rows)) if rows else Workload.uniform(1, 1, 1)

    def _engine_request(self, number: int, request: Request) -> EngineRequest:
        if request.embedding or request.multimodal_prompt or request.image_generation_parameters:
            raise UnsupportedError("flexrun completes text only")
        if request.response_format:
            raise UnsupportedError("response_format is not run")
        tokenizer = self._llm.tokenizer
        text = request.prompt
        if self._chats or request.messages:
            turns = request.messages or [{"role": "user", "content": request.prompt}]
            text = tokenizer.apply_chat_template(turns)
        seed = None
        if request.random is not None:
            seed = int.from_bytes(hashlib.blake2b(request.random.encode(), digest_size=7).digest(), "little")
        params = SamplingParams(
            n=request.num_completions if request.temperature > 0 else 1,
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=request.max_tokens,
            stop=tuple(stop for stop in request.stop_sequences if stop),
            include_stop_str_in_output=True,  # HELM cuts text and tokens itself
            logprobs=0,
            prompt_logprobs=0 if request.echo_prompt else None,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            seed=seed,
        )
        return EngineRequest(str(number), tokenizer.encode(text), text, params=params)

    def _completions(self, request: Request, output: RequestOutput) -> list[GeneratedOutput]:
        """num_completions of them: greedy ones are all alike, so one was generated for all."""
        found = [self._completion(request, output, each) for each in output.outputs]
        return found * (request.num_completions // len(found))

    def _completion(self, request: Request, output: RequestOutput, answer: CompletionOutput) -> GeneratedOutput:
        decode = self._llm.tokenizer.decode
        token_ids = list(answer.token_ids)
        logprobs = [found[token].logprob for token, found in zip(token_ids, answer.logprobs)]
        text = answer.text
        if request.echo_prompt:
            prompt_ids, scored = output.prompt_token_ids, output.prompt_logprobs
            before = [0.0 if found is None else found[token].logprob for token, found in zip(prompt_ids, scored)]
            token_ids, logprobs, text = [*prompt_ids, *token_ids], [*before, *logprobs], decode(prompt_ids) + text
        tokens = [
            Token(decode([token], skip_special_tokens=False), logprob) for token, logprob in zip(token_ids, logprobs)
        ]
        whole = GeneratedOutput(text, sum(logprobs), tokens)
        kept = truncate_sequence(whole, request, end_of_text_token=self._end_of_text_token, print_warning=False)
        ended_by_token = answer.finish_reason == "stop" and answer.stop_reason is None
        reason = "endoftext" if ended_by_token else answer.finish_reason
        return dataclasses.replace(kept, finish_reason={"reason": reason})


class FlexrunTokenizer(CachingTokenizer):
    """The tokenizer of a model of flexrun, for HELM's windows; also where Hugging Face's library cannot read it."""

    def __init__(self, cache_config: Any, model: str, **options: Any):
        super().__init__(cache_config)
        self._tokenizer = shared_llm(model, options).tokenizer

    def _tokenize_do_it(self, request: dict[str, Any]) -> dict[str, Any]:
        token_ids = self._tokenizer.encode(request["text"], add_special_tokens=False)
        if request["truncation"]:
            token_ids = token_ids[: max(request["max_length"], 0)]
        if request["encode"]:
            return {"tokens": token_ids}
        return {"tokens": [self._tokenizer.decode([token], skip_special_tokens=False) for token in token_ids]}

    def _decode_do_it(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"text": self._tokenizer.decode(request["tokens"], skip_special_tokens=False)}


class WholeScenarioExecutor(Executor):
    """Hands all requests for flexrun's models to the engine at once; those of other clients go HELM's way.

    run_name: of the run whose requests come next; what they take is put down in EXECUTIONS.
    """

    run_name = ""

    def execute(self, scenario_state: ScenarioState) -> ScenarioState:
        if self.execution_spec.dry_run:
            return super().execute(scenario_state)
        states = list(scenario_state.request_states)
        by_client: dict[int, tuple[FlexrunClient, list[int]]] = {}
        others = []
        for place, state in enumerate(states):
            client = self.context.client._get_client(state.request.model_deployment)
            if isinstance(client, FlexrunClient):
                by_client.setdefault(id(client), (client, []))[1].append(place)
            else:
                others.append(place)
        for client, places in by_client.values():
            results = client.make_requests([states[place].request for place in places])
            EXECUTIONS[self.run_name] = client.latest
            for place, result in zip(places, results):
                if not result.success:
                    hlog(f"flexrun: {result.error}; treated as an empty completion")
                    result.completions = [GeneratedOutput(text="", logprob=0, tokens=[])]
                states[place] = dataclasses.replace(states[place], result=result)
        if others:
            rest = dataclasses.replace(scenario_state, request_states=[states[place] for place in others])
            for place, state in zip(others, super().execute(rest).request_states):
                states[place] = state
        return dataclasses.replace(scenario_state, request_states=states)


class WholeScenarioRunner(Runner):
    """HELM's runner over WholeScenarioExecutor."""

    def __init__(self, execution_spec: ExecutionSpec, *arguments: Any, **named: Any):
        super().__init__(execution_spec, *arguments, **named)
        self.executor = WholeScenarioExecutor(execution_spec)

    def run_one(self, run_spec: RunSpec) -> None:
        self.executor.run_name = run_spec.name
        super().run_one(run_spec)


def register(model: str, name: str | None = None, *, chat: bool | None = None, **options: Any) -> str:
    """Make a model known to HELM; returns its name there. options: arguments of flexrun.LLM."""
    llm = shared_llm(model, options)
    helm_name = f"flexrun/{name or Path(model).name}"
    arguments = {"model": model, **options}
    chatting = {} if chat is None else {"apply_chat_template": chat}
    end = llm.tokenizer.eos_token_id
    end_of_text = "" if end is None else llm.tokenizer.decode([end], skip_special_tokens=False)
    prefix = llm.tokenizer.bos_token_id
    register_model_metadata(get_unknown_model_metadata(helm_name))
    register_model_deployment(
        ModelDeployment(
            name=helm_name,
            client_spec=ClientSpec(f"{__spec__.name}.FlexrunClient", args={**arguments, **chatting}),
            model_name=helm_name,
            tokenizer_name=helm_name,
            max_sequence_length=llm.max_model_len,
            max_sequence_and_generated_tokens_length=llm.max_model_len,
        )
    )
    register_tokenizer_config(
        TokenizerConfig(
            name=helm_name,
            tokenizer_spec=TokenizerSpec(f"{__spec__.name}.FlexrunTokenizer", args=arguments),
            end_of_text_token=end_of_text,
            prefix_token="" if prefix is None else llm.tokenizer.decode([prefix], skip_special_tokens=False),
        )
    )
    return helm_name


def main(arguments: Sequence[str]) -> None:
    """helm-run with a model of flexrun; see the top of the file."""
    parser = argparse.ArgumentParser(prog="python -m flexrun.evals.helm_adapter", epilog="all else is helm-run's")
    parser.add_argument("--model", required=True, help="folder, .gguf file or catalog name")
    parser.add_argument("--name", help="what HELM calls it, after flexrun/ (default: the last part of --model)")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, help="wrap prompts in the chat template")
    parser.add_argument("--llm", nargs="*", default=[], metavar="KEY=VALUE", help="arguments of flexrun.LLM")
    ours, rest = parser.parse_known_args(arguments)
    helm_name = register(ours.model, ours.name, chat=ours.chat, **llm_options(ours.llm))
    run_helm(helm_name, rest)


def llm_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Arguments of flexrun.LLM from texts KEY=VALUE. Raises ConfigError for one without a value."""
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise ConfigError(f"{wrong[0]} names no value", "write KEY=VALUE, as in cpu_memory=8GiB")
    return {key: int(value) if value.isdigit() else value for key, value in (pair.split("=", 1) for pair in pairs)}


def run_helm(helm_name: str, arguments: Sequence[str]) -> list[str]:
    """helm-run with its own ``arguments``; run entries that name no model get ``helm_name``. Returns the entries."""
    runner = f"{__spec__.name}.WholeScenarioRunner"
    args = build_parser().parse_args([*arguments, "--disable-cache", "--runner-class-name", runner])
    args.run_entries = [
        entry if "model=" in entry else f"{entry}{',' if ':' in entry else ':'}model={helm_name}"
        for entry in args.run_entries
    ]
    helm_run(args)
    return args.run_entries


if __name__ == "__main__":
    from flexrun.evals.helm_adapter import main as run  # HELM finds the classes by this name, not by __main__

    run(sys.argv[1:])
