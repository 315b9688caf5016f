"""LLM: opens a model, settles a policy, and turns requests into outputs. Wires the house; computes nothing itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flexrun.compress import GroupFormat
from flexrun.config import Policy
from flexrun.core import parse_bytes
from flexrun.errors import ConfigError, FlexrunError
from flexrun.hardware import Hardware
from flexrun.llm.accelerator import Accelerator
from flexrun.llm.given_policy import check_runnable, found_bits, given_plan, given_policy, prefix_unit
from flexrun.llm.intake import Intake, Prompt, as_chat_requests, as_request_error, as_requests, check_room
from flexrun.llm.lengths import Lengths
from flexrun.llm.machine_profile import settle_hardware, use_threads, with_device
from flexrun.llm.model_files import ModelFiles, open_model
from flexrun.llm.packing import PackedModel
from flexrun.llm.replanning import better_plan
from flexrun.llm.scoring import Text, as_score, score_requests
from flexrun.llm.sharing import arranged, longest_first, prefixes_at_hand, serves
from flexrun.llm.totals import busy_seconds, forecasts_document, joined_documents, run_document
from flexrun.machine import available_memory_bytes, free_disk_bytes
from flexrun.offload.engine import Engine
from flexrun.offload.sequence import Group
from flexrun.outputs import Request, RequestOutput, Score
from flexrun.placement import part_tokens, weight_bits_of
from flexrun.policy.explain import forecast_line
from flexrun.policy.layout import Budgets
from flexrun.policy.search import Plan, search_worth
from flexrun.prefixes import Prefixes
from flexrun.report.side_files import SideFiles
from flexrun.sampling import SamplingParams
from flexrun.weights.catalog import default_cache_dir
from flexrun.weights.packed import PackedWeights
from flexrun.workload import Workload

MEMORY_SHARE = 0.8  # of the RAM that is free, when no --cpu-memory is given
LAZY_SEQUENCES = 64  # sized for when requests come from an iterator that tells nothing about itself


class LLM:
    """A model ready to run piles of prompts.

    model: a folder with config.json and safetensors, a .gguf file, or a catalog name (``smollm2-135m-instruct``).
    dtype: float32, bfloat16, float16, or auto (the checkpoint's; bfloat16 for GGUF).
    policy: None or "auto" chooses one for each workload; else a Policy or the path of its JSON document.
    cpu_memory, gpu_memory: hard budgets for weights, KV cache and buffers, as bytes or text ("8GiB"). A
        ``gpu_memory`` above 0 with ``device="cpu"`` emulates an accelerator of that size; with ``device="cuda"`` the
        default is 90 % of the GPU memory that is free.
    disk_dir: folder of the packed weight cache and of KV cache on disk (default: inside cache_dir). disk_memory: budget
        of bytes there for both; default: what is free.
    hardware: what to plan for, a Hardware or the path of its document (default: this machine, measured once).
    lane_bandwidths: bytes a second (as for the budgets) that lanes are held to: disk_read, disk_write, and of an
        emulated accelerator h2d and d2h; {"h2d": "2GiB"} emulates a slow link. Default: FLEXRUN_LANE_BANDWIDTHS in the
        environment, else none. Plans do not know of it: name a hardware with those rates.
    weight_bits, keep, weight_group: in place of the policy's: bits of the matrices ("auto": the first plan weighs 16,
        8 and 4, and later ones keep to them), of some of them (``["*.down_proj=8"]``), and how many weights share a
        scale. kv_bits: also, of the KV cache ("auto": of 16, 8, "k8v4", 4). activation_bits: of what they multiply by.
    save_expert_profile: file that tells how many tokens each expert of a mixture got, written on close().
        expert_profile: such a file of an earlier run; the most used experts then live on the fastest tiers.
    shared_prefixes: what prompts begin with in common is run once, kept once and attended together, where that pays.
    seed: seeds every request that brings none. trace: path of a Chrome trace written on close().

    Raises ConfigError, CheckpointError, UnsupportedError or BudgetError, each naming its remedy.
    """

    def __init__(
        self,
        model: str | Path | ModelFiles,
        *,
        tokenizer: str | Path | None = None,
        dtype: str = "auto",
        policy: Policy | str | Path | None = None,
        gpu_memory: int | str | None = None,
        cpu_memory: int | str | None = None,
        disk_memory: int | str | None = None,
        disk_dir: str | Path | None = None,
        cache_dir: str | Path | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        seed: int = 0,
        trace: str | Path | None = None,
        device: str = "cpu",
        threads: int | None = None,
        progress: bool = False,
        direct_io: bool = True,
        hardware: Hardware | str | Path | None = None,
        lane_bandwidths: Mapping[str, int | str] | None = None,
        weight_bits: int | str | None = None,
        keep: Sequence[str] | None = None,
        weight_group: int | None = None,
        kv_bits: int | str | None = None,
        activation_bits: int | None = None,
        expert_profile: str | Path | None = None,
        save_expert_profile: str | Path | None = None,
        shared_prefixes: bool = True,
        log: Callable[[str], None] | None = None,
    ):
        self._side_files = SideFiles(trace, save_expert_profile)
        self._accelerator = Accelerator.of(device, gpu_memory, lane_bandwidths)
        if max_num_seqs is not None and max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs={max_num_seqs} must be at least 1", "leave it out for what fits")
        use_threads(threads)
        self.files = (
            model
            if isinstance(model, ModelFiles)
            else open_model(
                model,
                tokenizer=tokenizer,
                dtype=dtype,
                max_model_len=max_model_len,
                cache_dir=cache_dir,
                expert_profile=expert_profile,
            )
        )
        self.spec, self.tokenizer, self.max_model_len = self.files.spec, self.files.tokenizer, self.files.max_model_len
        decided = (policy, weight_bits, keep, weight_group, kv_bits, activation_bits)
        self._policy, self._fixed, bits, self._offered = given_policy(self.spec, *decided)
        self._cpu_budget = parse_bytes(cpu_memory) if cpu_memory is not None else None
        self._disk_budget = parse_bytes(disk_memory) if disk_memory is not None else None
        self._hardware, self._log, self._cache_dir = hardware, log, cache_dir
        packed_dir = Path(disk_dir) if disk_dir else Path(cache_dir or default_cache_dir()) / "packed"
        self._packed = PackedModel(self.files, packed_dir, bits, progress)
        self._max_num_seqs = max_num_seqs
        self._shared_prefixes = shared_prefixes
        self._prefix_unit = prefix_unit(self._policy, self._fixed, self._offered)
        self._intake = Intake(self.files, seed)
        self._direct_io, self._expert_counts = direct_io, None
        if save_expert_profile is not None and self.spec.experts is None:
            self.files.close()
            raise ConfigError("the model has no experts to save a profile of", "leave save_expert_profile out")
        self._engine: Engine | None = None
        self._events: list = []
        self._generating = False
        self._run_seconds = 0.0  # of the engine at hand
        self._plan: Plan | None = None
        self.chosen: dict[str, Any] = {}  # what was left to the first plan and decides the answers, as arguments
        self._better: Plan | None = None
        self._before: list[dict] = []  # what engines did that the one at hand goes on from
        self._planned_rows, self._open_seconds = 0, 0.0
        self._answered = Lengths()

    # Generating ---------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts (text, token ids, or vLLM's prompt dicts); outputs in the order of the prompts.

        A request that cannot be served comes back with ``error`` set; it never fails the others.
        """
        return self._all(as_requests(prompts, sampling_params), use_tqdm)

    def chat(
        self,
        messages: Sequence,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them, through the model's chat template."""
        return self._all(as_chat_requests(messages, sampling_params), use_tqdm)

    def score(
        self,
        texts: Text | Iterable[Text],
        continuations: Text | Iterable[Text] | None = None,
        use_tqdm: bool = True,
    ) -> list[Score]:
        """How likely each continuation is after its text; without continuations, each text after its first token.

        Texts or lists of token ids; see scoring.score_requests for where a text ends. A pair that cannot be served has
        ``error`` set.
        """
        requests = score_requests(self.tokenizer, texts, continuations)
        return [as_score(*pair) for pair in zip(requests, self._all(requests, use_tqdm))]

    def _all(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        prepared = longest_first(requests, self._intake)
        prepared, workload = arranged(prepared, self._intake, shares=self._shared_prefixes, unit=self._prefix_unit)
        place = {request.request_id: number for number, request in enumerate(requests)}
        outputs: list[RequestOutput | None] = [None] * len(requests)
        with tqdm(total=len(requests), desc="requests", disable=not use_tqdm) as bar:
            for output in self.generate_iter(prepared, workload):
                number = place[output.request_id]
                output.prompt = requests[number].prompt
                outputs[number] = output
                bar.update()
        return outputs

    def generate_iter(
        self,
        requests: Iterable[Request],
        workload: Workload | None = None,
        on_pass: Callable[[int, int], None] | None = None,
        on_tokens: Callable[[list[tuple[str, int, int]]], None] | None = None,
    ) -> Iterator[RequestOutput]:
        """Outputs in completion order; requests are drawn as slots free up, so the pile may be endless.

        workload: what the requests will ask for, to size the run by, and the prefixes that they name; without it each
        is taken to be as long as max_model_len allows. A bad request yields an output with ``error`` set. on_pass:
        called after each pass with the prompt tokens it brought into the cache and the tokens it generated; on_tokens:
        with (request id, choice, token) of the latter.
        Raises ConfigError while another iterator of this LLM is neither exhausted nor closed.
        """
        if self._generating:
            raise ConfigError("this LLM is already generating", "exhaust or close() the other iterator first")
        if isinstance(requests, list) and workload is None:
            workload = self._intake.workload(requests)
        if workload is not None and not len(workload):
            workload = Workload.uniform(1, 1, 1)  # nothing but refusals: no cache to speak of
        self.prepare(workload)
        name_of = self.tokenizer and (lambda token: self.tokenizer.decode([token], skip_special_tokens=False))
        start_seconds = time.perf_counter()
        self._generating = True
        prefixes = prefixes_at_hand(self._engine, workload)
        self._answered.begin(prefixes)
        was_cut_short, self._answered.cut_short = self._answered.cut_short, True  # unless this comes to its end
        outputs = self._engine.run(self._groups(iter(requests), prefixes), name_of, on_pass, on_tokens, prefixes)
        try:
            for output in outputs:
                self._answered.add(output)
                yield output
            self._answered.cut_short = was_cut_short
        finally:
            self._generating = False
            outputs.close()
            self._run_seconds += time.perf_counter() - start_seconds

    def _groups(self, requests: Iterator[Request], prefixes: Prefixes) -> Iterator[tuple[Group, list] | RequestOutput]:
        """What the engine draws from: a request's group and sequences, or the output of one that cannot be served."""
        longest = self._engine.kv.largest_sequence_tokens
        for request in requests:
            try:
                group, sequences = self._intake.group(request, prefixes=prefixes)
                if not sequences:
                    yield group.output(time.perf_counter())
                    continue
                check_room(sequences[0], longest, part_tokens(self._engine.policy))
            except FlexrunError as error:
                yield RequestOutput.refused(request, as_request_error(error))
            else:
                self._answered.sent(request, group.prefix)
                yield group, sequences

    @property
    def plan(self) -> Plan | None:
        """What the engine at hand was planned to do; None before ``prepare``."""
        return self._plan

    def pack(self) -> PackedWeights:
        """Write the packed weights, unless they are there."""
        return self._packed.open()

    def compressed(self, layer: int, name: str, form: GroupFormat) -> AbstractContextManager[None]:
        """See WeightStore.compressed; of the engine that the last call prepared."""
        return self._engine.weights.compressed(layer, name, form)

    # The engine ---------------------------------------------------------------------------------------

    def prepare(self, workload: Workload | None = None, *, anew: bool = False) -> Policy:
        """Settle the policy for a workload and load the weights, unless the engine at hand already serves it.

        anew: make another one even then.
        """
        if workload is None:
            workload = Workload.uniform(self._max_num_seqs or LAZY_SEQUENCES, self.max_model_len - 1, 1)
        engine, better, self._better = self._engine, self._better, None
        usable = not anew and better is None and engine is not None and not engine.failed
        if usable and serves(engine, workload, self._planned_rows):
            return engine.policy
        self._retire_engine(goes_on=better is not None)
        budgets, self._planned_rows = self._budgets(), len(workload)
        self._plan = better or self._settle(workload, budgets)
        self._first_forecast = self._plan.forecast if better is None else self._first_forecast
        self._say(forecast_line(self._plan.layout, self._plan.forecast))
        start_seconds = time.perf_counter()
        layout = self._plan.layout
        check_runnable(self.spec, layout, on_gpu=self._accelerator.is_cuda)
        self._engine = Engine(
            self.spec,
            self.pack(),
            layout.policy,
            layout.placement,
            layout.account,
            layout.kv_tokens,
            cpu_budget_bytes=budgets.cpu_bytes,
            gpu_budget_bytes=self._accelerator.planned_bytes,
            disk_budget_bytes=budgets.disk_bytes,
            accelerator=self._accelerator.open(),
            bytes_per_second=self._accelerator.bytes_per_second,
            trace=self._side_files.trace is not None,
            direct=self._direct_io,
            prefix_tokens=layout.prefix_tokens,
        )
        self._open_seconds = time.perf_counter() - start_seconds
        return layout.policy

    def _budgets(self) -> Budgets:
        """What is free on the disk changes, so it is looked at before each plan; the packed weights are part of it."""
        if self._cpu_budget is None:
            self._cpu_budget = int(available_memory_bytes() * MEMORY_SHARE)
        free = free_disk_bytes(self._packed.folder) + self._packed.bytes_on_disk()
        disk = free if self._disk_budget is None else self._disk_budget
        return Budgets(self._cpu_budget, self._accelerator.planned_bytes, disk)

    def _settle(self, workload: Workload, budgets: Budgets) -> Plan:
        """The plan of the policy that was given, or the best one."""
        hardware = self._settled_hardware()
        if self._policy is not None:
            return given_plan(self.spec, self._policy, self._max_num_seqs, workload, budgets, hardware)
        fixed = self._kept_fields(workload)
        plan = search_worth(self.spec, hardware, workload, budgets, fixed=fixed, features=self._offered)
        self.chosen = found_bits(self._offered, plan.policy)
        self._fixed |= self.chosen
        if "weight_bits" in self.chosen:
            self._packed.choose(weight_bits_of(plan.policy))
        return plan

    def _kept_fields(self, workload: Workload) -> dict[str, Any]:
        """Fields of the policy that a search keeps: those that the user decided."""
        most = self._max_num_seqs
        return self._fixed if most is None else {**self._fixed, "sequences_in_flight": min(most, len(workload))}

    def reconsider(self, workload: Workload) -> bool:
        """Whether another plan ends ``workload``, what is left of a job, sooner; the next ``prepare`` then opens it. To
        be asked once more is known of how long answers get; a policy that was given is kept."""
        if self._policy is None:
            known = (self._settled_hardware(), self._budgets(), self._kept_fields(workload), self._offered)
            self._better = better_plan(self._plan, workload, *known, self._open_seconds)
        return self._better is not None

    def _settled_hardware(self) -> Hardware:
        """What to plan for; a GPU of the machine does not count while it is only emulated."""
        if not isinstance(self._hardware, Hardware):
            self._hardware = settle_hardware(self._hardware, self._cache_dir, self._packed.folder, self._say)
        return with_device(self._hardware, self._accelerator.is_cuda, self._say)

    def _say(self, text: str) -> None:
        if self._log is not None:
            self._log(text)

    def _retire_engine(self, goes_on: bool = False) -> None:
        """goes_on: the next one goes on with the same job, and totals are of both."""
        if self._engine is not None:
            self._events += self._engine.events or []
            if self._side_files.expert_profile is not None:
                before = 0 if self._expert_counts is None else self._expert_counts
                self._expert_counts = self._engine.expert_counts + before
            if goes_on:
                self._before.append(run_document(self._engine, self._run_seconds, {}))
                self._answered.cut_short = False
            else:
                self._before, self._answered = [], Lengths()
            self._engine.close()
            self._engine = None
            self._run_seconds = 0.0

    def lane_seconds(self) -> dict[str, float]:
        """Busy seconds of each lane of the engine at hand, and those before it in the same job, so far."""
        parts = [document["lanes"] for document in self._before]
        return busy_seconds([*parts, self._engine.lane_statistics()])

    def summary(self) -> dict:
        """Totals of the engine at hand and those before it in the same job: tokens, seconds, phases, lanes, and the
        peak bytes of each tier."""
        if self._engine is None:
            return {}
        came = self._answered.workload() if len(self._answered) and not self._answered.cut_short else None
        totals = joined_documents([*self._before, run_document(self._engine, self._run_seconds, {})])
        forecasts = (self._first_forecast, self._plan.layout, came, totals["seconds"], self._settled_hardware())
        return {**totals, "forecast": forecasts_document(*forecasts)}

    def close(self) -> None:
        """Write trace and expert profile, free the memory, close the files. Safe to call twice."""
        self._retire_engine()
        self._side_files.write(self._events, self._expert_counts, self._say)
        self._events, self._expert_counts = [], None
        self.files.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
