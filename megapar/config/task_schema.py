"""The keys of a task."""

from dataclasses import dataclass

from megapar.config.keys import option


@dataclass(frozen=True)
class TaskConfig:
    """What is learned."""

    name: str = option("lm", "a file of megapar/tasks/kinds/; lm: next-token prediction", kept=True)
    mask_share: float = option(
        0.15, "masked_lm: share of the tokens that are hidden and predicted", above=0, at_most=1, kept=True
    )
    beta: float = option(0.1, "dpo: how strongly the reference holds the model back", above=0, kept=True)
    reference: str | None = option(
        None,
        "dpo, policy: checkpoint of the frozen model; default: the weights that the run starts from",
        verbatim=True,
        path=True,
        kept=True,
    )
    modalities: list[str] | None = option(
        None, "multimodal: which of image, audio and text are read; default: all that the model and a sample have"
    )
    modality_dropout: float = option(
        0.0,
        "multimodal: how often each modality of a sample is left out in training, though never all",
        at_least=0,
        below=1,
        kept=True,
    )
    group: int = option(
        4,
        "policy: completions of a prompt, which are judged beside each other; global_batch_size counts completions",
        at_least=2,
        kept=True,
        also=("num_generations", "group_size"),
    )
    max_tokens: int = option(
        64, "policy: tokens of a completion at most", at_least=1, kept=True, also=("max_completion_length",)
    )
    temperature: float = option(
        1.0, "policy: softmax temperature of completions, and so of what is learned", above=0, kept=True
    )
    clip: float = option(
        0.2, "policy: bound of how far a token's probability may move from when it was drawn", above=0, kept=True
    )
    kl: float = option(
        0.04, "policy: weight of the divergence from the frozen reference; 0: without one", at_least=0, kept=True
    )
    write_batch: int = option(
        64, "policy: completions that are written at a time; changes no text", at_least=1, identity=False
    )
    sample_tokens: int = option(0, "tokens of text that the model writes after training; 0: none")
    sample_prompt: str = option("", "what that text begins with, verbatim", verbatim=True)
