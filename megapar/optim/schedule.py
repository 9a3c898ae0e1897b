"""The learning rate of every step: a linear warm-up, and what follows it by `optim.schedule`."""

import math

from megapar.config.schema import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of step 1..steps: linear warm-up to lr, then by `optim.schedule`, to min_lr * lr at the last step.

    wsd stays at lr and goes down linearly over the last decay_steps (warmup-stable-decay: Hu et al. 2024, arXiv
    2404.06395, section 4, who decay exponentially; of these shapes a line is the one with nothing to choose).
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    floor, falling = config.lr * config.min_lr, steps - config.warmup_steps
    if config.schedule == "wsd":
        falling = min(config.decay_steps or math.ceil(steps / 10), falling)
    done = min(1.0, max(0, step - (steps - falling)) / max(1, falling))
    match config.schedule:
        case "constant":
            return config.lr
        case "cosine":
            return floor + (config.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr - (config.lr - floor) * done
