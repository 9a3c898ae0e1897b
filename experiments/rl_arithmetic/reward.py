"""What the policy of `rl_arithmetic` is rewarded for."""


def reward(prompt: str, completion: str, record: dict[str, str]) -> float:
    """1 for the right sum, and nothing for any other."""
    return float(completion == record["response"])
