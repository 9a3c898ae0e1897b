"""A run's model for lm-evaluation-harness, in one process or as ranks that torchrun started.

    from megapar.library.harness import MegaparLM
    lm_eval.simple_evaluate(model=MegaparLM(run="runs/demo"), tasks=["hellaswag"])

or the harness's own command line, with this model in it:

    python -m megapar.library.harness --model megapar --model_args run=runs/demo --tasks hellaswag
    torchrun --nproc-per-node 2 -m megapar.library.harness --model megapar --model_args run=runs/demo,layout=tp2 ...

It needs `pip install 'megapar[lm_eval]'`. This file alone imports lm_eval, and nothing imports this file.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megapar.config.check import check_forward
from megapar.config.derive import resolve_forward
from megapar.config.errors import ConfigError, UserError
from megapar.config.file import load_config
from megapar.config.keys import changed
from megapar.config.layout import Layout
from megapar.evaluate.config import EvalConfig
from megapar.evaluate.kinds.text import windows
from megapar.evaluate.scorer import Scorer, Span
from megapar.generate.run import in_layout, refuse_other_tokenizer
from megapar.generate.text import run_tokenizer
from megapar.library.ranks import join
from megapar.part import open_part

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    problem = "megapar.library.harness needs lm_eval, which is not installed; pip install 'megapar[lm_eval]'"
    raise (SystemExit if __name__ == "__main__" else ImportError)(problem) from None

BATCH_SIZE = 8  # where the harness says "auto"
MAX_GEN_TOKS = 256  # where a task does not say how much to write


@register_model("megapar")
class MegaparLM(TemplateLM):
    """The model of a run.

    run, checkpoint: its directory, and a checkpoint in it other than the last
    layout: such as tp2pp2, of as many ranks as torchrun started. All of them call alike and return the same, so to the
        harness they are one: rank 0 of 1.
    dtype: fp64, fp32 or bf16
    device: cpu; anything else is cuda where there is one, as the harness's command line says `cuda` unasked
    batch_size: rows of a forward pass; changes no figure

    Raises UserError, one line, for what can't be run.
    """

    def __init__(
        self,
        run: str | Path,
        layout: str = "single",
        dtype: str = "fp32",
        device: str | None = None,
        batch_size: int | str = BATCH_SIZE,
        checkpoint: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        values: dict[str, Any] = {f"parallel.{axis}": size for axis, size in Layout.parse(layout).items()}
        values |= {"run.dir": str(run), "dtype": dtype, "device": "cpu" if device == "cpu" else "auto"}
        gpus = torch.cuda.device_count()
        config = resolve_forward(changed(EvalConfig(), values), num_gpus=gpus)
        trained = load_config(run)
        if trained.model.output != "lm" or not trained.model.causal or trained.model.encoder.layers:
            raise ConfigError("run", run, "its model predicts no next token; name the run of a causal language model")
        check_forward(config, trained, num_gpus=gpus)
        trained = in_layout(trained, config)
        self.context_length = trained.train.seq_length
        self._tokenizer = run_tokenizer(Path(run), trained)
        rank, self._started = join(trained)
        self.part, manifest = open_part(trained, checkpoint or run, rank)
        refuse_other_tokenizer(self._tokenizer, manifest)
        self.scorer = Scorer(self.part, BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size))

    def close(self) -> None:
        """Leave the ranks' groups. Then the model is of no use."""
        self.part.close()
        if self._started:
            dist.destroy_process_group()

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """Texts begin as documents do in training: behind the end of the one before."""
        return self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Without control tokens, whatever is asked for: there are none in front of a text."""
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of requests (texts, tokens before, tokens to predict); of long ones the model sees the end."""
        spans = []
        for _, before, behind in requests:
            if not 0 < len(behind) <= self.context_length:
                fit = f"1 to train.seq_length={self.context_length} can be predicted; give the task other texts"
                raise UserError(f"a continuation of {len(behind)} tokens, and {fit}")
            tokens = [*before, *behind][-self.context_length - 1 :]
            spans.append(Span(tokens, len(tokens) - len(behind)))
        answers = []
        for (texts, _, _), span, (nats, hits) in zip(
            requests, spans, self.scorer.log_likelihoods(spans).tolist(), strict=True
        ):
            answers.append((nats, int(hits) == span.predicted))
            self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that don't overlap, as the harness's own models have it."""
        texts = self._tokenizer.encode_batch([request.args[0] for request in requests])
        parts = [windows([self.prefix_token_id, *ids], self.context_length, self.context_length) for ids in texts]
        found = iter(self.scorer.log_likelihoods([span for spans in parts for span in spans])[:, 0].tolist())
        return [sum(next(found) for _ in spans) for spans in parts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts up to the first of the strings in `until`."""
        prompts, most, stops = [], [], []
        for prompt, options in (request.args for request in requests):
            if options.get("do_sample") and options.get("temperature", 1.0):
                raise UserError("generate_until: texts are written greedily; use do_sample=False")
            until = options.get("until") or []
            stops.append([until] if isinstance(until, str) else until)
            prompts.append(self._tokenizer.encode(prompt) or [self.prefix_token_id])
            most.append(int(options.get("max_gen_toks", MAX_GEN_TOKS)))
        texts = [text for text, _ in self.scorer.greedy(prompts, most, self._tokenizer)]
        for number, until in enumerate(stops):
            for stop in filter(None, until):
                texts[number] = texts[number].partition(stop)[0]
        return texts


def main() -> None:
    """The harness's command line. Of several ranks the first one speaks and writes."""
    from lm_eval.__main__ import cli_evaluate

    with ExitStack() as stack:
        if int(os.environ.get("RANK", "0")) > 0:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            sys.argv = [*_without_files(sys.argv)]
        try:
            cli_evaluate()
        except UserError as error:
            raise SystemExit(str(error)) from None


def _without_files(words: Sequence[str]) -> list[str]:
    kept = [word for word in words if not word.startswith("--output_path=") and word not in ("--log_samples", "-s")]
    for name in ("--output_path", "-o"):
        if name in kept:
            del kept[kept.index(name) : kept.index(name) + 2]
    return kept


if __name__ == "__main__":
    main()
