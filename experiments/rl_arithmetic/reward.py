"""What the policy of `rl_arithmetic` is rewarded for."""


def reward(prompt: str, completion: str, record: dict[str, str]) -> float:
    """1 for the right sum; for a wrong one half the share of its digits that are right, if it has as many."""
    right = record["response"]
    if completion == right:
        return 1.0
    if len(completion) != len(right):
        return 0.0
    return sum(one == other for one, other in zip(completion, right, strict=True)) / len(right) / 2
