"""What training costs: arithmetic and memory, counted before it begins.

Built in chapter 22, "Train it on many machines"
(chapters/many_machines.md). Edit the chapter, not this file.
"""

from t5_book.checks import check_choice
from t5_book.config import StackConfig, T5Config

__all__ = ["training_flops", "training_memory"]


def attention_flops(stack: StackConfig, queries: int, keys: int) -> int:
    """Operations of one attention for so many queries and keys."""
    inner = stack.heads * stack.dim_head
    maps = 2 * (2 * queries + 2 * keys) * stack.dim * inner  # q and o; k and v
    return maps + 2 * 2 * queries * keys * inner  # scores and mixtures


def feed_forward_flops(stack: StackConfig, tokens: int) -> int:
    """Operations of one feed-forward layer for so many tokens."""
    maps = 2 if stack.feed_forward == "relu" else 3
    return 2 * maps * tokens * stack.dim * stack.mlp_dim


def training_flops(config: T5Config, src_length: int, tgt_length: int) -> int:
    """Count the operations in which a T5 learns from one example.

    Only products of matrices count. The backward pass takes twice as many as
    the forward pass, since each product has two factors to be differentiated.

    Args:
        config: of the model.
        src_length, tgt_length: tokens of the source and the target.

    Returns:
        Floating-point operations, additions and multiplications.
    """
    s, t, encoder, decoder = src_length, tgt_length, config.encoder, config.decoder
    read = attention_flops(encoder, s, s) + feed_forward_flops(encoder, s)
    write = attention_flops(decoder, t, t) + attention_flops(decoder, t, s)
    write += feed_forward_flops(decoder, t)
    head = 2 * t * config.dim * config.dec_num_tokens
    return 3 * (encoder.depth * read + decoder.depth * write + head)


STATE_BYTES = {"adamw": 8, "muon": 4, "adafactor": 0}  # for each parameter


def training_memory(
    parameters: int, optimizer: str = "adamw", processes: int = 1
) -> dict[str, int]:
    """Count the bytes that weights, gradients and optimizer take in a process.

    Args:
        parameters: of the model.
        optimizer: ``"adamw"``, ``"muon"`` or ``"adafactor"``. Muon's tables and
            norms are trained by AdamW, which is not counted; Adafactor keeps less
            than a hundredth of a number for each parameter of a large matrix.
        processes: among which FSDP shares them out; default 1.

    Raises:
        ValueError: if ``optimizer`` is another one.

    Returns:
        Bytes by name: ``weights``, ``gradients``, ``optimizer``.
    """
    check_choice("optimizer", optimizer, STATE_BYTES)
    each = {"weights": 4, "gradients": 4, "optimizer": STATE_BYTES[optimizer]}
    return {name: size * parameters // processes for name, size in each.items()}
