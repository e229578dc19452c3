"""EleutherAI's harness with our models: lm-eval's model `gpt2_jax`, and its tasks for `gpt2_jax.evaluate`.

Importing this module registers the model. It needs lm-eval.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from gpt2_jax.config import MeshConfig
from gpt2_jax.data.encode import encode_prompt
from gpt2_jax.data.tokenizer import TextStream
from gpt2_jax.errors import UserError, one_line
from gpt2_jax.evaluation.metrics import Metric, Reported
from gpt2_jax.evaluation.requests import Request, disjoint_windows
from gpt2_jax.evaluation.results import Result
from gpt2_jax.evaluation.scoring import Scorer
from gpt2_jax.evaluation.tasks import HARNESS
from gpt2_jax.generation import LanguageModel, Sampling, stream
from gpt2_jax.interop import load
from gpt2_jax.sharding import make_mesh

GENERATED_TOKENS = 256  # where a task names no limit, as in lm-eval
DTYPES = ("float32", "bfloat16", "float16")
TOP_K = 50  # of sampling where a task names none, as in transformers
PROMPTS_AT_ONCE = 32
BOOTSTRAPS = 1000  # for the standard errors of metrics that are not means
Pair = tuple[Any, list[int], list[int]]  # (texts, context, continuation)


@register_model("gpt2_jax")
class HarnessModel(TemplateLM):
    """A GPT-2 as lm-eval's models: the same tokens, windows, truncation and stops as its `hf` model.

    Args:
        pretrained: any MODEL, or a loaded one, whose parameters are on `mesh`.
        dtype: of activations and matmuls.
        mesh: the devices; all by default. Several processes evaluate the same requests together.
        seed: of sampled text.
        **ignored: `batch_size`, `max_batch_size` and `device`, which lm-eval passes to every model. The size of batches
            follows from the lengths of the requests.

    Raises:
        UserError: there is no such model, or its tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        seed: int = 0,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if unknown := ignored.keys() - {"batch_size", "max_batch_size", "device"}:
            raise UserError(f"the model gpt2_jax has no argument {min(unknown)}; it has pretrained, dtype and seed")
        mesh = mesh or make_mesh(MeshConfig())
        if dtype not in DTYPES:
            raise UserError(f"dtype = {dtype}; expected {', '.join(DTYPES)}")
        if isinstance(pretrained, str):
            pretrained = load(pretrained, mesh=mesh, dtype=jnp.dtype(dtype))
        self._gpt2, self._seed = pretrained, seed
        self._around = pretrained.boundaries
        if not self._around.ends:
            raise UserError("lm-eval needs an end-of-text token, which the tokenizer of this model does not have")
        self._end_text = pretrained.tokenizer.decode_bytes([self.eot_token_id]).decode("utf-8", "replace")
        self._scorer = Scorer(pretrained.model, mesh)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. It also precedes the first one."""
        return self._around.ends[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text."""
        return self.eot_token_id if self._around.start is None else self._around.start

    @property
    def max_length(self) -> int:
        """The most tokens that the model sees."""
        return self._gpt2.model.config.block_size

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests. GPT-2's have no chat template."""
        return f"gpt2_jax, {self._gpt2.tokenizer.n_vocab} tokens"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encodes a text. As in `transformers`, the text of the end-of-text token in it becomes the token."""
        tokens = [] if add_special_tokens is False else list(self._around.prefix)
        for index, part in enumerate(re.split(re.escape(self._end_text), string) if self._end_text else [string]):
            tokens += [self.eot_token_id] * (index > 0)
            tokens += encode_prompt(self._gpt2.tokenizer, part, "a request of lm-eval") if part else []
        return tokens

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **ignored: Any
    ) -> list[tuple[float, bool]]:
        """Scores pairs of tokens. Those with the same context share it.

        Raises:
            UserError: a continuation has no tokens of its own.
        """
        for texts, _, continuation in requests:
            if not continuation:
                raise UserError(f"lm-eval asks for {texts!r:.80}, whose continuation has no tokens of its own")
        places: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, tokens, _) in enumerate(requests):  # a context of spaces has no tokens of its own
            places[tuple(tokens or [self.prefix_token_id])].append(index)
        asked = [
            Request(context, tuple(requests[index][2] for index in indices)) for context, indices in places.items()
        ]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        scored = self._scorer.score(self._gpt2.params, asked)
        for same, scores in zip(places.values(), scored, strict=True):
            for index, score in zip(same, scores, strict=True):
                answers[index] = score.total, bool(score.greedy.all())
                if (texts := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[index])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probabilities of whole texts in disjoint windows."""
        asked: list[Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            windows = list(disjoint_windows(self.tok_encode(*request.args), self.prefix_token_id, self.max_length))
            asked += windows
            owners += [index] * len(windows)
        totals = [scores[0].total for scores in self._scorer.score(self._gpt2.params, asked)]
        answers = np.bincount(np.array(owners, int), totals, len(requests)).tolist()
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues texts up to a stop string, greedily unless a task samples.

        Raises:
            UserError: there are several processes: their decoding loops would run apart.
        """
        if jax.process_count() > 1:
            raise UserError("tasks of lm-eval that generate text need a single process; leave --processes out")
        # Prompts with the same settings are continued together. Equal prompts draw with different seeds.
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        seen: dict[tuple[str, str], int] = defaultdict(int)
        for index, request in enumerate(requests):
            prompt, settings = request.args[0], repr(sorted(request.args[1].items()))
            groups[settings, seen[prompt, settings]].append(index)
            seen[prompt, settings] += 1
        answers = [""] * len(requests)
        for (_, occurrence), indices in groups.items():
            indices.sort(key=lambda index: len(requests[index].args[0]))
            for start in range(0, len(indices), PROMPTS_AT_ONCE):
                part = indices[start : start + PROMPTS_AT_ONCE]
                prompts, wanted = [requests[index].args[0] for index in part], requests[part[0]].args[1]
                texts = self._generate(prompts, wanted, self._seed + occurrence)
                for index, text in zip(part, texts, strict=True):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return answers

    def _generate(self, prompts: Sequence[str], settings: dict[str, Any], seed: int) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings, GENERATED_TOKENS))
        until = handle_stop_sequences(options.pop("until", None), eos=self._end_text)
        new = options.pop("max_gen_toks")
        if options.pop("do_sample", False):
            options.setdefault("top_k", TOP_K)
        else:
            options["temperature"] = 0.0
        if unknown := options.keys() - {"temperature", "top_k", "top_p"}:
            raise UserError(f"a task asks for {min(unknown)} in its generation; gpt2_jax has temperature, top_k, top_p")
        room = self.max_length - new
        if room < 1:
            raise UserError(f"a task asks for {new} new tokens, and the model's block_size is {self.max_length}")
        tokens = [self.tok_encode(prompt)[-room:] or [self.prefix_token_id] for prompt in prompts]
        tokenizer, ends = self._gpt2.tokenizer, self._around.ends
        sampling = Sampling(**options, seed=seed, stop=self.eot_token_id, vocab_size=tokenizer.n_vocab)
        decoders = [TextStream(tokenizer, ends) for _ in prompts]
        texts = [""] * len(prompts)
        for chunk in stream(self._gpt2.model, self._gpt2.params, tokens, new, sampling):
            texts = [text + decoder.add(row) for text, decoder, row in zip(texts, decoders, chunk, strict=True)]
            if all(
                decoder.ended or any(term and term in text for term in until)
                for text, decoder in zip(texts, decoders, strict=True)
            ):
                break
        return [postprocess_generated_text(text, until, None) for text in texts]


def check_tasks(tasks: Sequence[str], manager: TaskManager | None = None) -> None:
    """Checks that the harness has these tasks.

    Raises:
        UserError: it lacks one.
    """
    known = (manager or TaskManager()).all_tasks
    for task in tasks:
        if task not in known:
            raise UserError(f"lm-eval has no task {task!r}; list them with lm_eval ls tasks")


def run_harness(
    gpt2: LanguageModel, tasks: Sequence[str], mesh: Mesh, limit: int | None = None, **options: Any
) -> dict[str, Result]:
    """Runs tasks of the harness.

    Args:
        gpt2: the model, with its parameters on `mesh`.
        tasks: names of lm-eval's tasks.
        limit: the most examples of a task.
        **options: further ones of `lm_eval.simple_evaluate`.

    Returns:
        The results by lm-eval:TASK; those of a group beside those of its tasks.

    Raises:
        UserError: there is no such task, or its data cannot be loaded.
    """
    manager = options.pop("task_manager", None) or TaskManager()
    options.setdefault("bootstrap_iters", BOOTSTRAPS)
    check_tasks(tasks, manager)
    loaded = [task for name in tasks for task in _load_task(manager, name)]
    # Its bootstrap would fork, and JAX's threads hold locks that stay locked in a fork. It prints, too.
    with mock.patch.dict(os.environ, DISABLE_MULTIPROC="1"), contextlib.redirect_stdout(sys.stderr):
        found = lm_eval.simple_evaluate(
            HarnessModel(gpt2, mesh=mesh), tasks=loaded, task_manager=manager, limit=limit, **options
        )
    assert found is not None  # in the only process that lm-eval knows of
    results: dict[str, Result] = {}
    for task in found["results"]:
        protocol = f"lm-eval {lm_eval.__version__}, task {task}, version {found['versions'].get(task)}"
        data = str(found["configs"].get(task, {}).get("dataset_path", "its tasks"))  # groups have no config
        metrics, known = dict(_metrics(task, found)), found["higher_is_better"].get(task, {})
        directions = {label: known[label.split(",")[0]] for label in metrics if label.split(",")[0] in known}
        name = f"{HARNESS}{task}"
        results[name] = Result(name, protocol, data, metrics, {}, directions=directions)
    return dict(sorted(results.items()))


def _load_task(manager: Any, name: str) -> list[Any]:
    """Loads a task or a group, or the tasks of a tag, with their data.

    Raises:
        UserError: its data cannot be loaded.
    """
    try:
        found = manager.load([name])
    except Exception as error:  # of datasets, of its HTTP stack and of the task's own code, which name no types
        raise UserError(
            f"the data of lm-eval's task {name} cannot be loaded ({one_line(error)}); run it once with network, so "
            "that Hugging Face's cache has it"
        ) from error
    return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())


def _metrics(task: str, found: dict[str, Any]) -> Iterator[tuple[str, Metric | Reported]]:
    """The metrics of a task: of those that are means over examples, with the value of each example."""
    results = found["results"][task]
    tasks = found["group_subtasks"].get(task) or [task]
    count = sum(found["n-samples"][one]["effective"] for one in tasks if one in found["n-samples"])
    for key, value in results.items():
        name, _, filtered = key.partition(",")
        if name.endswith("_stderr") or not filtered or not isinstance(value, int | float):
            continue
        label = name if filtered == "none" else f"{name}, {filtered}"
        values = [sample.get(name) for sample in found.get("samples", {}).get(task, []) if sample["filter"] == filtered]
        if len(values) == count and all(isinstance(one, int | float) for one in values):
            metric = Metric(label, np.array(values, float), np.ones(count))
            if abs(metric.value - value) < 1e-9:
                yield label, metric
                continue
        stderr = results.get(f"{name}_stderr,{filtered}")
        yield label, Reported(label, float(value), stderr if isinstance(stderr, float) else None, count)
