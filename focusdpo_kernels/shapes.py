"""The named shapes that kernels are tuned and measured for, and the bytes that have to move there."""

# Sizes of real models: layers N, target tokens P, reference tokens Q, width D, subjects R, channels C of a token.
SHAPES = {
    "uno-512": {"N": 19, "P": 1024, "Q": 800, "D": 3072, "R": 2, "C": 64},
    "uno-1024": {"N": 57, "P": 4096, "Q": 1600, "D": 3072, "R": 4, "C": 64},
    "flux2-klein-4b": {"N": 25, "P": 4096, "Q": 8192, "D": 3072, "R": 2, "C": 128},
    "flux2-dev": {"N": 56, "P": 4096, "Q": 8192, "D": 6144, "R": 2, "C": 128},
    "qwen-edit-plus": {"N": 60, "P": 4096, "Q": 8192, "D": 3072, "R": 2, "C": 64},
}


def bytes_moved(N: int, P: int, Q: int, D: int, R: int, C: int) -> dict[str, int]:
    """Bytes of one sample that have to move, each input read and each output written once.

    Hidden states and predictions are bf16, pixels fp32 RGB, noised and clean latents, scores and masks fp32, priors and
    reference masks one byte.
    """
    return {
        "similarity": 2 * N * (P + Q) * D + R * Q + 4 * R * P,
        "structure field": 4 * R * P + P + 4 * P,
        "entropy": 4 * 3 * 256 * P + 4 * P,
        "fusion": 4 * P + 4 * P + P + 4 * P,
        "residual forward": 6 * 2 * P * C + 4 * P,
        "residual backward": 4 * 2 * P * C + 4 * P + 2 * 2 * P * C,
        "where subjects are": R * P,
        "estimate": 2 * P * C + 3 * 4 * P * C + 4 * P,
    }
