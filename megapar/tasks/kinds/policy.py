"""Reinforcement learning by a group-relative policy gradient (GRPO: Shao et al. 2024, section 4.1): the model writes
several completions of a prompt, and those become likelier that are rewarded more than the others of their group."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megapar.config.errors import UserError
from megapar.config.run_schema import SampleConfig
from megapar.config.schema import TrainConfig
from megapar.data.source import Split
from megapar.generate.tokens import Text
from megapar.parallel.collectives import all_gather
from megapar.parallel.context import StageContext
from megapar.pipeline.stage import Batch, Stage, Tensors
from megapar.tasks.completions import Judged, Writer
from megapar.tasks.kind import Figure, TaskKind
from megapar.tasks.kinds.sft import laid_out
from megapar.tasks.reference import Reference
from megapar.tasks.sampled import IGNORED, SampledTask

NEVER = -1e4  # a logit whose probability is 0 in every dtype
EPSILON = 1e-4  # added to the standard deviation of a group's rewards
# Most nats that a token's log-probability may be apart between the model that writes, token by token with a cache, and
# the model that trains, all tokens at once. Both round each product in another order: fp64 comes to 1e-13, fp32 to
# 1e-5; in bf16 a logit of 20 has steps of 0.125. What has read another token, or from another place, is nats apart.
GAPS = {"fp64": 1e-9, "fp32": 1e-2, "bf16": 1.0}


class PolicyGradient(SampledTask):
    """A completion to a sample, behind its prompt in a row of its own: sample n is completion n % group of prompt
    n // group. Its loss is the mean over its tokens of -min(r A, clip(r) A) + kl D, where r is a token's probability
    by what it was when it was drawn, A the completion's advantage, and D the divergence from the frozen reference.

    The policy is the model at `task.temperature`, over the tokens that the tokenizer has.
    """

    num_measures = 3

    def __init__(self, config: TrainConfig, context: StageContext, stages: Mapping[int, Stage]) -> None:
        super().__init__(config, context, stages)
        self.writer = Writer(config, context, stages)
        self.reference = Reference(config, self.mesh) if config.task.kl else None
        self._step, self._figures = 0, dict[str, float]()
        self._seen: list[Tensor] = []
        self._microbatches = 0

    def arrays(self, split: Split, numbers: np.ndarray, counted: np.ndarray | None) -> dict[str, np.ndarray]:
        """Beside rows of tokens `advantages` and `written` [M, B] (how many were chosen), and, [M, B, S] where labels
        are, `sampled`, the log-probabilities that tokens were drawn with, and `weights`, one by the completion's
        tokens. Of an evaluation `rewards` [M, B]."""
        group, flat = self.config.task.group if split == "train" else 1, numbers.reshape(-1).tolist()
        prompts = self.samples[split].batch([number // group for number in flat])
        rewarded = flat if counted is None else np.where(counted, numbers, -1).reshape(-1).tolist()
        samples = [self._sample(split, number) for number in flat]
        found = self.writer.write(prompts, samples, rewarded)
        arrays = self._rows(found.texts, numbers.shape, counted)
        if split == "valid":
            rewards = [found.judged[number].reward if number >= 0 else 0.0 for number in rewarded]
            return arrays | {"rewards": np.array(rewards).reshape(numbers.shape)}
        first = min(found.judged)
        judged = [found.judged[number] for number in range(first, first + self.config.train.global_batch_size)]
        advantages, self._figures = self._judge(judged)
        return arrays | {"advantages": advantages[numbers - first]}

    def count(self, split: Split, numbers: np.ndarray) -> int:
        return len(numbers)

    def batches(self, step: int) -> list[Batch]:
        """With `reference` [T] fp64 on the last stage, if there is a reference."""
        self._step = step
        batches = self._beside_reference(super().batches(step))
        self._microbatches = len(batches)
        return batches

    def examples(self) -> list[Batch]:
        """Nothing is written and nothing rewarded: drawn tokens behind the prompts, every second one to be likelier."""
        task, draw = self.config.task, np.random.default_rng(self.config.train.seed)
        numbers = np.arange(2 * self.config.train.micro_batch_size).reshape(2, -1)
        texts = []
        for prompt in self.samples["train"].batch(range(numbers.size)):
            drawn = draw.integers(self.writer.tokenizer.vocab_size, size=task.max_tokens)
            likely = [-float(np.log(self.writer.tokenizer.vocab_size))] * task.max_tokens
            tokens = [*prompt.tokens, *drawn.tolist()]
            texts.append(Text(tokens, SampleConfig(), prompt=len(prompt.tokens), logprobs=likely, ended="length"))
        arrays = self._rows(texts, numbers.shape, None) | {"advantages": 1.0 - numbers % 2 * 2, "samples": numbers}
        return self._beside_reference(self._sent(arrays, 1, numbers.size))

    def log_probabilities(self, outputs: Tensors, batch: Batch) -> Tensor:
        """Of every token of the completions as the policy has it, in nats, fp64 [T]; 0 elsewhere."""
        logits, temperature = outputs["logits"], self.config.task.temperature
        if temperature != 1.0:
            logits = logits / temperature
        rows = self.first_id + torch.arange(logits.shape[1], device=logits.device)
        if self.first_id + logits.shape[1] > self.writer.tokenizer.vocab_size:  # rows without a token are never drawn
            beyond = rows >= self.writer.tokenizer.vocab_size
            logits = logits.masked_fill(beyond, NEVER)
        return -self.token_losses({"logits": logits}, batch).double()

    def loss(self, outputs: Tensors, batch: Batch) -> Tensor:
        """Equation 3 of Shao et al. 2024, negated; of D their equation 4 is an unbiased estimate."""
        task, logprobs = self.config.task, self.log_probabilities(outputs, batch)
        sampled, weights = batch["sampled"].reshape(-1), batch["weights"].reshape(-1)
        ratios = (logprobs - sampled).exp()
        advantages = batch["advantages"].repeat_interleave(batch["ids"].shape[1])
        losses = -torch.minimum(ratios * advantages, ratios.clamp(1 - task.clip, 1 + task.clip) * advantages)
        divergences = torch.zeros_like(losses)
        if "reference" in batch:
            apart = batch["reference"] - logprobs
            divergences = torch.expm1(apart) - apart
        self._see(logprobs - sampled, divergences, batch)
        return ((losses + task.kl * divergences) * weights).sum() / batch["count"]

    def step_figures(self) -> dict[str, float]:
        """Raises UserError, on all ranks alike, where the model that trains is not the one that wrote."""
        mine = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        if self._seen:
            # Of a step that was computed more than once (`run.recheck_every`) the last time.
            gaps, divergences = torch.stack(self._seen[-self._microbatches :]).unbind(1)
            mine = torch.stack([gaps.max(), divergences.sum() * self.mesh.first_along("weights", None)])
        gaps, divergences = all_gather(mine.unsqueeze(0), self.mesh["world"]).cpu().unbind(1)
        gap, dtype = float(gaps.max()), self.config.train.dtype
        most = GAPS[dtype] / min(
            1.0, self.config.task.temperature
        )  # logits are divided by it, and so is their rounding
        if not gap <= most:
            problem = f"a token's log-probability is {gap:.1e} nats apart between the model that wrote it and the same "
            problem += f"model in training, where train.dtype={dtype} explains {most:.0e}"
            raise UserError(f"step {self._step}: {problem}; try kernels.backend=torch, or correct your model.module")
        found = self._figures | ({"kl": float(divergences.sum())} if self.reference else {})
        return found | {"logprob_gap": gap, "write_s": self.writer.seconds}

    def measure(self, outputs: Tensors, batch: Batch) -> Tensor:
        """Of the likeliest completions the mean reward, negated and as it is, and how many tokens they have."""
        rewards = batch["rewards"].sum()
        return torch.stack([-rewards, rewards, batch["written"].sum()]) / batch["count"]

    def figures(self, measured: Sequence[float]) -> dict[str, float | None]:
        return {"val_reward": measured[1], "val_completion_tokens": measured[2]}

    def _sample(self, split: Split, number: int) -> SampleConfig:
        """Training draws, by a seed of every completion's own; an evaluation takes the likeliest tokens."""
        task = self.config.task
        if split == "valid":
            return SampleConfig(max_tokens=task.max_tokens, temperature=0.0)
        seed = (number + 1 << 64) + self.config.train.seed
        return SampleConfig(max_tokens=task.max_tokens, temperature=task.temperature, seed=seed)

    def _rows(self, texts: Sequence[Text], shape: tuple[int, ...], counted: np.ndarray | None) -> dict[str, np.ndarray]:
        """Of texts [M * B]; see `arrays`."""
        length, sequences = self.config.train.seq_length, [self.writer.sequence(text) for text in texts]
        arrays = laid_out([[sequence] for sequence in sequences], shape, length, counted)
        chosen = arrays["labels"] != IGNORED
        written = chosen.sum(2).astype(np.float64)
        sampled = np.zeros(chosen.shape)
        for row, places, text in zip(sampled.reshape(-1, length), chosen.reshape(-1, length), texts, strict=True):
            if places.any():
                row[places] = text.logprobs
        weights = chosen / np.maximum(written, 1.0)[..., None]
        return arrays | {"sampled": sampled, "weights": weights, "written": written}

    def _judge(self, judged: Sequence[Judged]) -> tuple[np.ndarray, dict[str, float]]:
        """Advantages of a step's completions, fp64 [n], and what the step says of them: how far a reward is above the
        mean of its group, in standard deviations; 0 where the group has one reward."""
        rewards = np.array([one.reward for one in judged])
        groups = rewards.reshape(-1, self.config.task.group)
        flat = groups.max(1, keepdims=True) == groups.min(1, keepdims=True)
        above = groups - groups.mean(1, keepdims=True)
        advantages = np.where(flat, 0.0, above / (groups.std(1, keepdims=True) + EPSILON))
        figures = {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            "flat_groups": float(flat.mean()),
            "completion_tokens": float(np.mean([one.length for one in judged])),
            "cut_completions": float(np.mean([one.cut for one in judged])),
        }
        return advantages.reshape(-1), figures

    def _beside_reference(self, batches: list[Batch]) -> list[Batch]:
        self._seen.clear()
        if self.reference is None:
            return batches
        batches = self.reference.beside(batches, self.log_probabilities)
        self.mesh.timeline.forget()  # a step's spans are those of its schedule
        return batches

    def _see(self, apart: Tensor, divergences: Tensor, batch: Batch) -> None:
        """Keep the largest gap of a micro-batch, and its part of the mean divergence, for `step_figures`."""
        with torch.no_grad():
            divergence = (divergences * batch["weights"].reshape(-1)).sum() / batch["count"]
            self._seen.append(torch.stack([apart.abs().max(), divergence]))


TASK = TaskKind(
    name="policy",
    about="completions that are rewarded",
    make=PolicyGradient,
    loss=Figure("loss", "objective", 4),
    figures=(Figure("val_reward", "reward", 3), Figure("val_completion_tokens", "tokens", 1)),
    of_steps=(Figure("reward", "reward", 3),),
)
