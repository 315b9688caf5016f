"""HELM's entry point: makes the models that FLEXRUN_HELM_MODELS names known to helm-run, with no file of HELM's own.

    FLEXRUN_HELM_MODELS=path/to/model FLEXRUN_HELM_OPTIONS='cpu_memory=8GiB' helm-run \\
        --runner-class-name flexrun.evals.helm_adapter.WholeScenarioRunner \\
        --run-entries synthetic_reasoning:mode=pattern_match,model=flexrun/model --suite s1 --max-eval-instances 100

HELM imports this module whenever it runs and flexrun is installed; without the variable nothing heavy is imported.
Several models are separated as folders are in PATH; the options are arguments of flexrun.LLM for all of them.
"""

from __future__ import annotations

import os

MODELS = [model for model in os.environ.get("FLEXRUN_HELM_MODELS", "").split(os.pathsep) if model]

if MODELS:
    from flexrun.evals.helm_adapter import llm_options, register

    for _model in MODELS:
        register(_model, **llm_options(os.environ.get("FLEXRUN_HELM_OPTIONS", "").split()))
